"""Weights that oneDNN keeps in its own layout after `fuse()`: the same numbers, whatever changes in between."""

import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.profiler import profile

from svit.layers import Downsample
from svit.ops import onednn

pytestmark = pytest.mark.filterwarnings("error:svit.ops")

OP = "mkldnn::_convolution_pointwise"


def build(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_svit", num_classes=5, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


@torch.no_grad()
def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the model computes from its weights as they are now, in float64."""
    again = copy.deepcopy(model).double()
    for module in again.modules():
        vars(module).pop("packed", None)
    return again(x.double()).to(x.dtype)


def close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((y - expected).abs().max() <= tolerance * expected.abs().max())


@torch.inference_mode()
def calls(model: nn.Module, x: torch.Tensor) -> int:
    with profile() as profiled:
        model(x)
    return sum(event.count for event in profiled.key_averages() if event.key.startswith(OP))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (72, 56), (160, 96)])
def test_the_same_for_every_shape_in_turn(n, size):
    model = build(layer_scale_init=0.5).fuse()
    with torch.inference_mode():
        model(torch.randn(2, 3, 64, 64))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format)
        for shape in ((n, 3, *size), (1, 3, 64, 64), (n, 3, *size)):
            x = torch.randn(shape)
            with torch.inference_mode():
                assert close(model(x), plain(model, x))


def test_it_serves_the_fused_model_alone_and_never_the_reference():
    x = torch.randn(1, 3, 64, 64)
    convs = sum(isinstance(m, nn.Conv2d) and m.groups == 1 for m in build().stages.modules()) + 1
    assert calls(build().fuse(), x) == convs
    assert calls(build(), x) < convs
    assert calls(build(backend="reference").fuse(), x) == 0


CHANGES = {
    "in place": lambda w: w.mul_(2),
    "through .data": lambda w: w.data.mul_(2),
    "one channel through .data": lambda w: w.data[1].zero_(),
    "a later channel through .data": lambda w: w.data[w.shape[1]].mul_(99),
    "another tensor": lambda w: setattr(w, "data", w.data * 2),
    "copied": lambda w: w.copy_(w.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_weight_counts(change):
    model, x = build().fuse(), torch.randn(2, 3, 64, 64)
    before = model(x)
    for name in ("stages.0.blocks.0.mlp.fc1", "stages.2.blocks.0.attn.qkv", "stages.1.downsample.conv"):
        CHANGES[change](model.get_submodule(name).weight)
    assert close(model(x), plain(model, x))
    assert not close(model(x), before, 1e-3)


@torch.no_grad()
def test_other_weights_and_other_convolutions_count():
    model, x = build().fuse(), torch.randn(2, 3, 64, 64)
    model(x)
    state = {name: t * 1.5 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert close(model(x), plain(model, x))
    fc2 = model.stages[2].blocks[0].mlp.fc2
    fc2.weight = nn.Parameter(fc2.weight * 3)
    assert close(model(x), plain(model, x))
    model.stages[0].blocks[0].attn.proj = nn.Conv2d(8, 8, 1)
    assert close(model(x), plain(model, x))
    prune.l1_unstructured(model.stages[0].blocks[0].attn.qkv, "weight", 0.5)
    pruned = model(x)
    prune.remove(model.stages[0].blocks[0].attn.qkv, "weight")
    assert close(pruned, plain(model, x))
    seen = []
    model.stages[1].downsample.conv.register_forward_hook(lambda m, inputs, y: seen.append(y.shape))
    model(x)
    assert len(seen) == 1


def test_copies_and_files_hold_no_layout():
    model, x = build().fuse(), torch.randn(1, 3, 64, 64)
    keys = list(build().fuse().state_dict())
    with torch.no_grad():
        expected = model(x)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            conv = again.stages[0].blocks[0].mlp.fc1
            assert conv.packed.kept is None
            assert torch.equal(again(x), expected)
            conv.weight.mul_(2)
            assert not torch.equal(again(x), expected)
            assert torch.equal(model(x), expected)
        assert list(model.state_dict()) == keys


def test_a_cpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(onednn, "BFLOAT16", False)
    with torch.inference_mode():
        x = torch.randn(1, 8, 8, 8)
        assert onednn.usable("conv_ffn", x) == (True, "")
        assert onednn.usable("conv_ffn", x.bfloat16()) == (False, "this CPU has no instructions for bfloat16")
        model, x = build().bfloat16().fuse(), torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)
        assert calls(model, x) == 0


def test_float64_stays_so_under_autocast():
    model, x = build().double(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients_other_dtypes_and_a_nan():
    model, x = build().fuse(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    weight = model.stages[0].blocks[0].mlp.fc1.weight
    y = model(x)
    y.square().sum().backward()
    assert close(y.detach(), expected)
    assert weight.grad.abs().max() > 0
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            assert close(model(x).float(), expected, 0.1)
        assert close(copy.deepcopy(model).bfloat16()(x.bfloat16()).float(), expected, 0.1)
        assert close(model.to(torch.float64)(x.double()).float(), expected)
    model.float()
    with torch.no_grad():
        weight[0, 0] = float("nan")
        assert model(x).isnan().all()


def test_scripted_traced_and_under_transforms():
    model, x = build().fuse(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert close(torch.jit.script(copy.deepcopy(model))(x), expected)
        assert close(torch.jit.trace(model, x)(x), expected)
        assert close(torch.func.vmap(model, in_dims=0)(x[:, None])[:, 0], expected)
        y, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert close(y, expected)
    assert tangent.abs().max() > 0


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass(dtype):
    """GELU, residual, stride and padding, with a weight that is kept and one that is not."""
    x, weight, bias = (torch.randn(s).to(dtype) for s in ((2, 16, 9, 7), (8, 16, 3, 3), (8,)))
    x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x.double(), weight.double(), bias.double(), stride=2, padding=1)
    residual = torch.randn(y.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for packed in (None, onednn.PackedWeight()):
        where = dict(stride=(2, 2), padding=(1, 1), packed=packed)
        for _ in range(2):
            assert close(onednn.convolution(x, weight, bias, **where).double(), y, tolerance)
            assert close(onednn.convolution(x, weight, bias, gelu=True, **where).double(), F.gelu(y), tolerance)
            added = onednn.convolution(x, weight, bias, residual=residual, **where)
            assert close(added.double(), y + residual.double(), tolerance)
            assert added.is_contiguous(memory_format=torch.channels_last)
    assert (packed.kept is not None) == (not weight.is_inference())


@torch.no_grad()
def test_what_oneDNN_has_no_layout_for_stays():
    layer = Downsample(8, 16, backend=None).eval()
    layer.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="reflect")
    x = torch.randn(1, 8, 9, 9)
    expected = layer(x)
    assert close(layer.fuse()(x), expected)
    assert "packed" not in vars(layer.conv)


@torch.inference_mode()
@pytest.mark.parametrize(("H", "W"), [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize(("C", "channels"), [(1, 1), (1, 4), (4, 1), (128, 32)])
def test_strides_of_one_channel_and_one_pixel(H, W, C, channels):
    weight, packed = torch.randn(channels, C, 1, 1), onednn.PackedWeight()
    maps = lambda C: [torch.randn(2, C, H, W), torch.randn(2, H, W, C).permute(0, 3, 1, 2)]  # noqa: E731
    for x in maps(C):
        for residual in maps(channels):
            y = onednn.convolution(x, weight, None, residual=residual, packed=packed)
            assert close(y, residual + F.conv2d(x, weight))
