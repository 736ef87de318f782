"""`fuse()` computes the same afterwards, or refuses and changes nothing."""

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, GroupNorm1, LayerNorm2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops.misc import FrozenBatchNorm2d

from svit.layers import ConvFFN, Downsample, FinalConv, LayerScale


def trained(module: nn.Module) -> nn.Module:
    """In eval mode, with statistics, weights and factors that are not those of the start."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)):
            for name, low, high in (
                ("running_mean", -1, 1),
                ("running_var", 0.5, 2),
                ("weight", 0.5, 2),
                ("bias", -1, 1),
            ):
                if getattr(m, name) is not None:
                    nn.init.uniform_(getattr(m, name), low, high)
        if isinstance(m, LayerScale):
            nn.init.uniform_(m.gamma, 0.2, 2)
    return module.eval()


def build(**options) -> nn.Module:
    return trained(timm.create_model("test_svit", num_classes=5, **{"layer_scale_init": 0.3, **options}))


@torch.no_grad()
def check_same(module: nn.Module, x: torch.Tensor, tolerance: float) -> nn.Module:
    """Fuses a copy, and once more."""
    expected = module(x)
    fused = copy.deepcopy(module).fuse()
    assert (fused(x) - expected).abs().max() <= tolerance * expected.abs().max()
    again = copy.deepcopy(fused).fuse()
    assert torch.equal(again(x), fused(x))
    return fused


LAYERS = {"conv-FFN": ConvFFN, "downsampling": Downsample, "final": FinalConv}


def without(name: str):
    def build(*args, **kwargs) -> nn.Module:
        norm = nn.BatchNorm2d(*args, **kwargs)
        setattr(norm, name, None)
        return norm

    return build


FOLDED = {
    "BatchNorm2d": nn.BatchNorm2d,
    "no weights": partial(nn.BatchNorm2d, affine=False),
    "no weight": without("weight"),
    "no bias": without("bias"),
    "another eps": partial(nn.BatchNorm2d, eps=0.1),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
}


class Subclass(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).tanh()


LEFT = {
    "an activation inside": BatchNormAct2d,
    "no statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "a subclass": Subclass,
    "LayerNorm": LayerNorm2d,
    "GroupNorm": GroupNorm1,
    "InstanceNorm": nn.InstanceNorm2d,
    "Identity": nn.Identity,
}


@pytest.mark.parametrize("bias", [True, False], ids=["", "no-bias"])
@pytest.mark.parametrize("norm", [*FOLDED, *LEFT])
@pytest.mark.parametrize("layer", LAYERS)
def test_norms(layer, norm, bias):
    module = LAYERS[layer](6, 10)
    module.norm = {**FOLDED, **LEFT}[norm](module.norm.num_features)
    conv = module.fc1 if layer == "conv-FFN" else module.conv
    if not bias:
        conv.bias = None
    module = trained(module).double()
    fused = check_same(module, torch.randn(2, 6, 5, 7, dtype=torch.float64), 1e-12)
    assert type(fused.norm) is (nn.Identity if norm in FOLDED else type(module.norm))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_models_in_each_dtype(dtype, tolerance):
    model = build().to(dtype)
    fused = check_same(model, torch.randn(2, 3, 37, 50, dtype=dtype), tolerance)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    kinds = [type(m) for name, m in fused.named_modules() if not name.startswith("stem")]
    assert nn.BatchNorm2d not in kinds
    assert LayerScale not in kinds


@pytest.mark.parametrize("norm", ["no weights", "an activation inside", "LayerNorm", "no statistics"])
def test_models_with_other_norms(norm):
    check_same(build(norm_layer={**FOLDED, **LEFT}[norm]), torch.randn(2, 3, 64, 64), 1e-5)


def test_frozen_weights_stay_frozen():
    model = build()
    model.stages[1].requires_grad_(False)
    fused = model.fuse()
    assert not any(p.requires_grad for p in fused.stages[1].parameters())
    assert all(p.requires_grad for p in fused.stages[2].parameters())


class LowRank(nn.Module):
    """A convolution with LoRA around it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding)
        self.up = nn.Conv2d(2, conv.out_channels, 1)

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def patch(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def subclass(model: nn.Module, path: str) -> None:
    conv = model.get_submodule(path)
    put(model, path, Doubled(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding))


# Each takes the model and the path of what it changes.
CHANGES = {
    "pruned": lambda model, path: prune.l1_unstructured(model.get_submodule(path), "weight", 0.3),
    "weight norm": lambda model, path: parametrizations.weight_norm(model.get_submodule(path)),
    "old weight norm": lambda model, path: nn.utils.weight_norm(model.get_submodule(path)),
    "spectral norm": lambda model, path: parametrizations.spectral_norm(model.get_submodule(path)),
    "LoRA": lambda model, path: put(model, path, LowRank(model.get_submodule(path))),
    "subclass": subclass,
    "hook": lambda model, path: model.get_submodule(path).register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook": lambda model, path: model.get_submodule(path).register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "patched": lambda model, path: patch(model.get_submodule(path)),
    "sequence": lambda model, path: put(model, path, nn.Sequential(model.get_submodule(path))),
}
CONVOLUTIONS = ["stages.3.blocks.0.mlp.fc1", "stages.3.blocks.0.mlp.fc2", "stages.3.blocks.0.attn.proj",
                "stages.3.downsample.conv", "final_conv.conv"]  # fmt: skip


def check_refused(model: nn.Module, path: str) -> None:
    """`fuse` names `path`, and the model has the very modules and tensors that it had."""
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    modules, tensors = dict(model.named_modules()), dict([*model.named_parameters(), *model.named_buffers()])
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=rf"^{path}: expected "):
        model.fuse()
    assert dict(model.named_modules()) == modules
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[name] is tensor and torch.equal(tensor, values[name]) for name, tensor in tensors.items())
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("path", CONVOLUTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_convolutions_are_named(change, path):
    model = build()
    CHANGES[change](model, path)
    check_refused(model.eval(), path)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ("hook", "stages.3.blocks.0.mlp.norm"),
        ("pruned", "stages.3.downsample.norm"),
        ("patched", "final_conv.norm"),
        ("hook", "stages.3.blocks.0.ls1"),
        ("hook", "stages.3.blocks.0.attn"),
        ("hook", "stages.3.blocks.0.mlp"),
        ("hook", "stages.3.blocks.0.mlp.drop2"),
        ("sequence", "stages.3.blocks.0.attn"),
        ("sequence", "stages.3.blocks.0.mlp"),
        ("patched", "stages.3.blocks.0.attn.proj_drop"),
    ],
)
def test_other_changed_modules_are_named(change, path):
    model = build()
    CHANGES[change](model, path)
    check_refused(model, path)


def test_parametrized_norms_and_factors_are_named():
    model = build()
    nn.utils.parametrize.register_parametrization(model.stages[3].blocks[0].mlp.norm, "weight", nn.Tanh())
    check_refused(model, "stages.3.blocks.0.mlp.norm")
    model = build()
    nn.utils.parametrize.register_parametrization(model.stages[3].blocks[0].ls2, "gamma", nn.Tanh())
    check_refused(model, "stages.3.blocks.0.ls2")


def test_other_convolutions_before_a_folded_norm_are_named():
    model = build()
    model.stages[2].blocks[0].mlp.fc1 = nn.Conv2d(24, 96, 3, padding=1)
    check_refused(model, "stages.2.blocks.0.mlp.fc1")


def test_train_mode_is_refused():
    model = build()
    model.stages[2].blocks[0].mlp.norm.train()
    with pytest.raises(ValueError, match=r"^stages.2.blocks.0.mlp.norm: expected eval mode, .* call eval\(\) first"):
        model.fuse()
    model.eval().fuse()


@torch.no_grad()
def test_timms_helper_folds_a_model_as_it_is_created():
    """timm's validate.py folds before it calls eval()."""
    model, x = build(), torch.randn(2, 3, 64, 64)
    expected = model(x)
    fused = reparameterize_model(model.train()).eval()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.stages[2].blocks[0].mlp.modules())
    assert (fused(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_convolution_that_is_dilated_later_is_so_in_inference():
    fused = build().fuse()
    conv = fused.stages[3].downsample.conv
    conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
    x = torch.randn(1, conv.in_channels, 10, 10)
    expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2)
    torch.testing.assert_close(fused.stages[3].downsample(x), expected, rtol=0, atol=1e-5)


def test_float16_that_overflows_is_refused():
    model = build()
    norm = model.stages[1].downsample.norm
    nn.init.constant_(norm.running_var, 1e-12)
    nn.init.constant_(norm.weight, 6e4)
    check = copy.deepcopy(model).half()
    with pytest.raises(ValueError, match=r"^stages.1.downsample.conv: its folded weights overflow float16"):
        check.fuse()
    model.fuse()


def test_pruning_made_permanent_folds():
    model = build()
    for path in CONVOLUTIONS:
        conv = model.get_submodule(path)
        prune.l1_unstructured(conv, "weight", 0.3)
        prune.remove(conv, "weight")
    check_same(model, torch.randn(2, 3, 64, 64), 1e-5)


def share(model: nn.Module, name: str) -> None:
    """Gives the second block of a stage a part of the first one."""
    first, second = model.stages[2].blocks
    if name == "block":
        model.stages[2].blocks[1] = first
    elif name == "tied weights":
        second.mlp.fc1.weight, second.mlp.fc2.bias = first.mlp.fc1.weight, first.mlp.fc2.bias
    else:
        parent, _, child = name.rpartition(".")
        setattr(second.get_submodule(parent), child, first.get_submodule(name))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "name", ["block", "mlp", "attn", "mlp.fc1", "mlp.fc2", "mlp.norm", "attn.proj", "ls1", "ls2", "tied weights"]
)
@torch.no_grad()
def test_shared_parts(name, in_place):
    model = build(depths=(1, 1, 2, 1))
    share(model, name)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    fused = model.fuse() if in_place else reparameterize_model(model)
    assert (fused(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not [n for n, m in fused.named_modules() if isinstance(m, LayerScale)]
    if not in_place:
        assert torch.equal(model(x), expected)
