import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from helpers import needs_mm

needs_mm()

import mmdet.models  # noqa: E402
import mmseg.models  # noqa: E402
from mmengine.config import ConfigDict  # noqa: E402
from mmengine.model import BaseModule, revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from svit.adapters import TimmBackbone  # noqa: E402
from svit.convert import CheckpointError  # noqa: E402
from svit.models.original import to_original  # noqa: E402


def build(**kwargs) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(**{"arch": "test_svit", **kwargs})


def batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def image(*size: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("registry", [MODELS, mmdet.registry.MODELS, mmseg.registry.MODELS])
def test_found_by_name(registry):
    backbone = registry.build(dict(type="TimmBackbone", arch="test_svit"))
    assert isinstance(backbone, TimmBackbone)


def test_needs_mmengine_alone():
    """Without mmcv, mmdet and mmseg; a class in place of a name, as pure-Python configs have it."""
    code = (
        "import sys; sys.modules.update(mmcv=None, mmdet=None, mmseg=None)\n"
        "from mmengine.registry import MODELS\n"
        "from svit.adapters import TimmBackbone\n"
        "print(type(MODELS.build(dict(type=TimmBackbone, arch='test_svit'))).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TimmBackbone\n"


def test_maps_are_timms():
    backbone = build(out_norm=False).eval()
    model = timm.create_model("test_svit").eval()
    missing, _ = model.load_state_dict(backbone.model.state_dict(), strict=False)
    assert all(key.startswith(("final_conv", "head")) for key in missing)
    x = image(64, 96)
    for ours, theirs in zip(backbone(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(31, 31), (112, 137), (64, 64), (1, 1)])
def test_any_size(size, memory_format):
    """31 x 31 and 112 x 137 are those of MMDetection's and MMSegmentation's own tests of backbones."""
    backbone = build().eval().to(memory_format=memory_format)
    maps = backbone(image(*size).contiguous(memory_format=memory_format))
    assert isinstance(maps, tuple)
    assert backbone.channels == (8, 16, 24, 32)
    assert backbone.strides == (4, 8, 16, 32)
    for m, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert m.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert m.is_contiguous()


def test_out_norm():
    with_norm, without = build().eval(), build(out_norm=False).eval()
    with torch.no_grad():
        with_norm.norm1.weight.uniform_(0.5, 2)
        with_norm.norm1.bias.normal_()
    x = image(64, 64)
    m = without(x)[1]
    expected = (m - m.mean(1, keepdim=True)) / (m.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = expected * with_norm.norm1.weight.view(1, -1, 1, 1) + with_norm.norm1.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(with_norm(x)[1], expected, rtol=1e-4, atol=1e-5)
    assert not [key for key in without.state_dict() if key.startswith("norm")]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0,), (2,)])
def test_every_parameter_is_used(out_indices):
    backbone = build(out_indices=out_indices).train()
    sum(m.square().sum() for m in backbone(image(64, 64))).backward()
    assert [len(backbone(image(64, 64))), backbone.strides] == [
        len(out_indices),
        tuple(4 * 2**i for i in out_indices),
    ]
    unused = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert not unused


@pytest.mark.parametrize("frozen", [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen):
    backbone = build(frozen_stages=frozen, drop_path_rate=0.5)
    assert backbone.train() is backbone
    parts = [backbone.model.stem, *backbone.model.stages]
    for i, part in enumerate(parts):
        assert {m.training for m in part.modules()} == {i > frozen}
        assert {p.requires_grad for p in part.parameters()} == {i > frozen}
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    sum(m.square().sum() for m in backbone(image(64, 64))).backward()
    statistics = [k for k, v in backbone.state_dict().items() if "running" in k and not torch.equal(v, before[k])]
    learning = ("model.stem", *(f"model.stages.{i}" for i in range(4)))[frozen + 1 :]
    assert {k.rpartition(".")[0].split(".norm")[0] for k in statistics} or frozen == 4
    assert all(k.startswith(learning) for k in statistics)
    for name, p in backbone.model.named_parameters():
        assert (p.grad is not None) == f"model.{name}".startswith(learning), name
    assert not any(m.training for m in backbone.eval().modules())


def test_dropout_behind_a_frozen_stem_is_off():
    backbone = build(frozen_stages=1, out_norm=False, model_args=dict(proj_drop_rate=0.5)).train()
    x = image(64, 64)
    assert torch.equal(backbone(x)[0], backbone(x)[0])
    assert build(model_args=dict(proj_drop_rate=0.5)).train().model.stem_drop.training


@pytest.mark.parametrize("arch", ["test_svit", "test_efficientnet"])
def test_weights_without_counters(tmp_path, arch):
    """timm's frozen BatchNorms count no batches."""
    weights = {k: v + 0.5 if "running_mean" in k else v for k, v in timm.create_model(arch).state_dict().items()}
    file = tmp_path / "frozen.safetensors"
    safetensors.torch.save_file({k: v for k, v in weights.items() if "num_batches" not in k}, file)
    backbone = build(arch=arch, init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    backbone.init_weights()
    means = {k: v for k, v in backbone.model.state_dict().items() if "running_mean" in k}
    assert means
    assert all(torch.equal(v, weights[k]) for k, v in means.items())


def test_norm_eval():
    backbone = build(norm_eval=True).train()
    norms = batch_norms(backbone)
    assert len(norms) > 8
    assert not any(norm.training for norm in norms)
    assert backbone.model.stages.training
    assert all(p.requires_grad for norm in norms for p in norm.parameters())
    assert all(norm.training for norm in batch_norms(build().train()))


def test_sync_bn():
    backbone = build(norm_eval=True, frozen_stages=1).train()
    names = {name for name, m in backbone.named_modules() if m in batch_norms(backbone)}
    keys = list(backbone.state_dict())
    expected = backbone.eval()(image(64, 64))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    assert {name for name, m in synced.named_modules() if isinstance(m, nn.SyncBatchNorm)} == names
    assert list(synced.state_dict()) == keys
    assert not any(m.training for m in batch_norms(synced.train()))  # norm_eval knows them too
    frozen = [synced.model.stem, synced.model.stages[0]]
    assert not any(m.training for part in frozen for m in part.modules())
    reverted = revert_sync_batchnorm(synced).eval()
    for m, e in zip(reverted(image(64, 64)), expected, strict=True):
        torch.testing.assert_close(m, e, rtol=0, atol=1e-6)


def test_frozen_norms_stay_frozen_as_sync_bn():
    """A ResNet's first norm is a module of its own, which the conversion replaces."""
    backbone = build(arch="resnet18", out_indices=(1, 2, 3, 4), frozen_stages=0)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(backbone).train()
    assert isinstance(synced.model.bn1, nn.SyncBatchNorm)
    assert not synced.model.bn1.training
    assert synced.model.layer1[0].bn1.training


def test_with_cp():
    """The same maps, gradients and statistics, with blocks run again in the backward pass."""
    grads, buffers = [], []
    for with_cp in (False, True):
        backbone = build(with_cp=with_cp).train()
        assert [stage.grad_checkpointing for stage in backbone.model.stages] == [with_cp] * 4
        sum(m.square().sum() for m in backbone(image(64, 64))).backward()
        grads.append([p.grad for p in backbone.parameters()])
        buffers.append(list(backbone.buffers()))
    for a, b in zip(grads[0] + buffers[0], grads[1] + buffers[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_model_options():
    backbone = build(in_channels=4, drop_path_rate=0.3, stoken_size=(8, (4, 2), 2, 1))
    rates = [getattr(stage.blocks[0].drop_path2, "drop_prob", 0.0) for stage in backbone.model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert [stage.blocks[0].attn.cell for stage in backbone.model.stages] == [(8, 8), (4, 2), (2, 2), (1, 1)]
    assert backbone.eval()(torch.randn(1, 4, 40, 40))[0].shape == (1, 8, 10, 10)


def test_rounds_of_each_stage():
    cfg = ConfigDict(type="TimmBackbone", arch="test_svit", model_args=dict(n_iter=[2, 3, 1, 1]))
    backbone = MODELS.build(cfg)
    assert [stage.blocks[0].attn.n_iter for stage in backbone.model.stages] == [2, 3, 1, 1]
    with pytest.raises(ValueError, match=r"n_iter: expected one value for each of the 4 stages, got \[2, 3\]"):
        build(model_args=ConfigDict(n_iter=[2, 3]))


@pytest.mark.parametrize(
    ("arch", "kwargs", "strides"),
    [
        ("resnet18", dict(out_indices=(1, 2, 3, 4)), (4, 8, 16, 32)),
        ("convnext_atto.no_such_tag", {}, (4, 8, 16, 32)),
        ("efficientnet_b0", dict(out_indices=(1, 2, 3, 4)), (4, 8, 16, 32)),
        (
            "swin_tiny_patch4_window7_224",
            dict(model_args=dict(strict_img_size=False, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))),
            (4, 8, 16, 32),
        ),
    ],
)
def test_other_models(arch, kwargs, strides):
    backbone = build(arch=arch, frozen_stages=1, norm_eval=True, **kwargs).train()
    assert backbone.strides == strides
    maps = backbone(image(64, 96))
    assert [m.shape[1:] for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(backbone.channels, strides, strict=True)
    ]
    assert all(m.is_contiguous() for m in maps)
    sum(m.square().sum() for m in maps).backward()
    grads = [p.grad is not None for p in backbone.model.parameters()]
    assert not grads[0]
    assert all(grads[grads.index(True) :])
    assert not any(norm.training for norm in batch_norms(backbone))


class Detector(BaseModule):
    """Initialises its parts as MMDetection's detectors do."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Conv2d(8, 8, 1)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {k: v.clone() for k, v in timm.create_model("test_svit", num_classes=7).state_dict().items()}


def layouts(weights: dict, layout: str) -> dict:
    """A checkpoint as others write it."""
    if layout == "original":
        return {"model": to_original(weights), "model_ema": {}}
    if layout == "timm":
        return {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
    if layout == "detector":
        inside = {f"backbone.model.{k}": v for k, v in weights.items() if not k.startswith(("head", "final_conv"))}
        return {"state_dict": {**inside, "backbone.norm0.weight": torch.ones(8), "neck.bias": torch.ones(8)}}
    if layout == "other detector":  # with a backbone that is the model itself
        return {"state_dict": {f"backbone.{k}": v for k, v in weights.items()}}
    return weights


@pytest.mark.parametrize("layout", ["bare", "safetensors", "original", "timm", "detector", "other detector"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2)])
def test_checkpoint(tmp_path, weights, layout, out_indices):
    file = tmp_path / ("weights.safetensors" if layout == "safetensors" else "weights.pth")
    if layout == "safetensors":
        safetensors.torch.save_file(weights, file)
    else:
        torch.save(layouts(weights, layout), file)
    backbone = build(out_indices=out_indices, init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    Detector(backbone).init_weights()  # which must not start them anew afterwards
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_start_values_are_timms():
    backbone = build()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    Detector(backbone).init_weights()
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_pretrained_is_deprecated(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.warns(DeprecationWarning, match="init_cfg"):
        backbone = build(pretrained=str(tmp_path / "weights.pth"))
    backbone.init_weights()
    assert torch.equal(backbone.model.stem.layers[0].weight, weights["stem.layers.0.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="pretrained: expected None beside init_cfg"):
            build(pretrained="a", init_cfg=dict(type="Pretrained", checkpoint="b"))


def test_other_channels(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pth")
    backbone = build(in_channels=1, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth")))
    backbone.init_weights()
    first = backbone.model.stem.layers[0].weight
    torch.testing.assert_close(first, weights["stem.layers.0.weight"].sum(1, keepdim=True))


def test_address(tmp_path, weights, monkeypatch):
    """A checkpoint on a server is fetched once."""
    calls = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def download(url: str, file: str) -> None:
        calls.append(url)
        torch.save(weights, file)

    monkeypatch.setattr("svit.adapters.backbone.download_url_to_file", download)
    for _ in range(2):
        url = "https://example.org/some/weights.pth?download=1"
        backbone = build(init_cfg=dict(type="Pretrained", checkpoint=url))
        backbone.init_weights()
    assert calls == [url]
    assert torch.equal(backbone.model.stem.layers[0].weight, weights["stem.layers.0.weight"])


def test_addresses_whose_files_have_one_name(tmp_path, weights, monkeypatch):
    """As on the Hub, where each is model.safetensors."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def download(url: str, file: str) -> None:
        torch.save({key: value + url.count("two") for key, value in weights.items()}, file)

    monkeypatch.setattr("svit.adapters.backbone.download_url_to_file", download)
    for repo in ("one", "two"):
        address = f"https://example.org/{repo}/resolve/main/weights.pth"
        backbone = build(init_cfg=dict(type="Pretrained", checkpoint=address))
        backbone.init_weights()
        expected = weights["stem.layers.0.weight"] + (repo == "two")
        assert torch.equal(backbone.model.stem.layers[0].weight, expected)


@pytest.mark.parametrize(
    "init_cfg",
    [
        [dict(type="Pretrained", checkpoint="a.pth")],
        dict(type="Pretrained"),
        dict(type="Pretrained", checkpoint=None),
        dict(type="Xavier", layer="Conv2d"),
    ],
)
def test_other_ways_to_begin_are_refused(init_cfg):
    with pytest.raises(ValueError, match=r"init_cfg: expected dict\(type='Pretrained', checkpoint=...\), got "):
        build(init_cfg=init_cfg)


def test_address_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def download(url: str, file: str) -> None:
        raise OSError("no route")

    monkeypatch.setattr("svit.adapters.backbone.download_url_to_file", download)
    backbone = build(init_cfg=dict(type="Pretrained", checkpoint="https://example.org/weights.pth"))
    with pytest.raises(CheckpointError, match=r"example.org/weights.pth: cannot be fetched \(no route\)"):
        backbone.init_weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"fc.weight": torch.zeros(2)}, "holds no weight of test_svit; it has fc.weight"),
        (lambda w: timm.create_model("svit_nano").state_dict(), "is not of test_svit; .*other shapes"),
        (
            lambda w: {k: v for k, v in w.items() if "stages.2" not in k},
            r"is not of test_svit; missing keys: \d+ \(stages.2",
        ),
        (lambda w: {**w, "stages.1.blocks.1.norm1.weight": torch.ones(16)}, "is not of test_svit; unexpected keys: 1"),
    ],
)
def test_wrong_checkpoint(tmp_path, weights, change, message):
    file = tmp_path / "weights.pth"
    torch.save(dict(change(weights)), file)
    backbone = build(init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"{file}: {message}"):
        backbone.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_weights_that_are_not_finite(tmp_path, weights):
    file = tmp_path / "weights.pth"
    torch.save({**weights, "stages.1.blocks.0.norm1.weight": torch.full((16,), torch.inf)}, file)
    backbone = build(init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    with pytest.raises(CheckpointError, match=f"{file} holds numbers that are not finite, in stages.1.blocks.0.norm1"):
        backbone.init_weights()


def test_convert_weights_off(tmp_path, weights):
    torch.save(to_original(weights), tmp_path / "weights.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth"))
    with pytest.raises(CheckpointError, match="of test_svit; it has patch_embed"):
        build(convert_weights=False, init_cfg=init_cfg).init_weights()


def test_missing_weights():
    backbone = build(arch="svit_small", init_cfg=dict(type="Pretrained", checkpoint="none/there.pth"))
    with pytest.raises(CheckpointError) as error:
        backbone.init_weights()
    for part in ("none/there.pth: no such file", "stvit-small-224.pth", "hhb072/STViT", "init_cfg.checkpoint=FILE"):
        assert part in str(error.value)
    assert "model.backbone.init_cfg=None" in str(error.value)


def test_damaged_checkpoint(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not a checkpoint")
    backbone = build(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "weights.pth")))
    with pytest.raises(CheckpointError, match=r"weights\.pth: cannot be read"):
        backbone.init_weights()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(arch="svit_smal"), "arch: no model 'svit_smal' in timm; did you mean svit_small"),
        (dict(arch="vgg11", drop_path_rate=0.1), "arch: vgg11 does not take drop_path_rate"),
        (dict(arch="convnext_atto", stoken_size=(1, 1, 1, 1)), "arch: convnext_atto does not take stoken_size"),
        (dict(out_indices=(0, 4)), r"out_indices: .*3 of stride 32.*got \(0, 4\)"),
        (dict(out_indices=(-1,)), r"out_indices: .*got \(-1,\)"),
        (dict(out_indices=(2, 1)), r"out_indices: expected rising numbers"),
        (dict(out_indices=()), "out_indices"),
        (dict(frozen_stages=5), "frozen_stages: expected -1 to 4 for test_svit, got 5"),
        (dict(frozen_stages=-2), "frozen_stages"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize("init_cfg", [dict(type="Kaiming", layer="Conv2d"), [dict(type="Pretrained", checkpoint="a")]])
def test_bad_init_cfg(init_cfg):
    with pytest.raises(ValueError, match="init_cfg: expected dict"):
        build(init_cfg=init_cfg).init_weights()


def test_layer_depth():
    backbone = build()
    # the stem, four stages of a block (a downsampling goes with the block that follows it), then everything else
    order = [
        "model.stem.layers.0.weight",
        "model.stages.0.blocks.0.norm1.weight",
        "model.stages.1.downsample.conv.weight",
        "model.stages.1.blocks.0.attn.qkv.weight",
        "model.stages.2.downsample.conv.weight",
        "model.stages.2.blocks.0.mlp.fc1.weight",
        "model.stages.3.downsample.norm.bias",
        "model.stages.3.blocks.0.mlp.fc2.bias",
        "norm0.weight",
    ]
    depths = [backbone.get_layer_depth(f"backbone.{name}", "backbone.") for name in order]
    assert [depth for depth, _ in depths] == sorted(depth for depth, _ in depths)
    assert depths[0] == (0, depths[-1][0] + 1)
    assert backbone.get_layer_depth("neck.weight", "backbone.") == depths[-1]
    assert {backbone.get_layer_depth(n, "")[0] for n, _ in backbone.named_parameters()} == set(range(depths[0][1]))
