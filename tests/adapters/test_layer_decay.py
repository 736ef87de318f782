import pytest
import torch

from helpers import needs_mm

needs_mm()

from mmengine.optim import build_optim_wrapper  # noqa: E402
from torch import nn  # noqa: E402

import svit.adapters  # noqa: E402


class Detector(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(8, 8, 1)


def optimizer(model: nn.Module, **paramwise) -> dict[str, dict]:
    """The group of each parameter, by its name."""
    config = dict(
        type="OptimWrapper",
        constructor="LayerDecayOptimWrapperConstructor",
        optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1),
        paramwise_cfg=paramwise,
    )
    wrapper = build_optim_wrapper(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group["params"]}


def test_rates():
    torch.manual_seed(0)
    groups = optimizer(
        Detector(svit.adapters.TimmBackbone(arch="test_svit", frozen_stages=0)),
        layer_decay_rate=0.5,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={"neck": dict(lr_mult=0.1)},
    )
    assert not [name for name in groups if "stem" in name]  # frozen
    # 6 layers: the stem, four blocks (a downsampling goes with the one that follows it), the rest
    rates = {
        "backbone.model.stages.0.blocks.0.attn.qkv.weight": 0.5**4,
        "backbone.model.stages.1.downsample.conv.weight": 0.5**3,
        "backbone.model.stages.3.blocks.0.mlp.fc2.bias": 0.5,
        "backbone.norm0.weight": 1.0,
        "neck.weight": 0.1,
    }
    for name, rate in rates.items():
        assert groups[name]["lr"] == pytest.approx(rate), name
    assert groups["backbone.model.stages.0.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    for name in ("backbone.norm0.weight", "backbone.model.stages.0.blocks.0.norm1.weight"):
        assert groups[name]["weight_decay"] == 0.0
    assert groups["backbone.model.stages.3.blocks.0.mlp.norm.weight"]["weight_decay"] == 0.0  # a BatchNorm


def test_any_timm_model():
    groups = optimizer(
        Detector(svit.adapters.TimmBackbone(arch="resnet18", out_indices=(1, 2, 3, 4))), layer_decay_rate=0.9
    )
    rates = [groups[f"backbone.model.{name}"]["lr"] for name in ("conv1.weight", "layer1.0.conv1.weight")]
    assert rates[0] < rates[1] < groups["backbone.model.layer4.1.conv2.weight"]["lr"] < groups["neck.weight"]["lr"] == 1


@pytest.mark.parametrize("paramwise", [{}, *({"layer_decay_rate": rate} for rate in (None, 0, 1.5, "0.5"))])
def test_bad_rate(paramwise):
    with pytest.raises(ValueError, match=r"layer_decay_rate: expected a number in \(0, 1\]"):
        optimizer(Detector(svit.adapters.TimmBackbone(arch="test_svit")), **paramwise)


def test_bad_model():
    with pytest.raises(ValueError, match="get_layer_depth"):
        optimizer(Detector(nn.Conv2d(3, 8, 1)), layer_decay_rate=0.5)
