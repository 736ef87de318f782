import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from svit.layers import ConvFFN
from svit.ops.conv_ffn import onednn


def weights(dim: int, hidden: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(hidden, dim, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (dim, hidden, 1, 1), (dim,)]
    return [torch.randn(shape, generator=g) * 0.3 for shape in shapes]


def expected(x, w1, b1, wd, bd, w2, b2):
    """In float64, step by step."""
    x, w1, b1, wd, bd, w2, b2 = (t.double() for t in (x, w1, b1, wd, bd, w2, b2))
    u = F.gelu(F.conv2d(x, w1, b1))
    u = u + F.conv2d(u, wd, bd, padding=1, groups=len(bd))
    return F.conv2d(u, w2, b2)


@pytest.mark.parametrize("tile", [1, 600, 2000, 10**9])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (3, 8, 11, 7), (2, 8, 24, 5), (0, 8, 4, 4)])
def test_tiles_give_the_whole(monkeypatch, shape, tile):
    monkeypatch.setattr(onednn, "TILE", tile)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    args = weights(8, 24)
    y = onednn.conv_ffn(x, *args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected(x, *args), rtol=1e-5, atol=1e-5)


def test_bfloat16_by_dtype_and_by_autocast():
    x = torch.randn(2, 8, 9, 9)
    args = weights(8, 32)
    want = expected(x, *args)
    scale = want.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        y = onednn.conv_ffn(x, *args)
    z = onednn.conv_ffn(x.bfloat16(), *(t.bfloat16() for t in args))
    for got in (y, z):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).abs().max() / scale < 0.02


@torch.no_grad()
def test_usable_names_its_reason(monkeypatch):
    x = torch.randn(1, 8, 4, 4)
    assert onednn.usable("conv_ffn", x) == (True, "")
    assert "float64" in onednn.usable("conv_ffn", x.double())[1]
    assert "meta" in onednn.usable("conv_ffn", x.to("meta"))[1]
    with torch.enable_grad():
        assert "autograd" in onednn.usable("conv_ffn", x)[1]
    with FlopCounterMode(display=False):
        assert "dispatch mode" in onednn.usable("conv_ffn", x)[1]
    with BaseTorchFunctionMode():
        assert "__torch_function__" in onednn.usable("conv_ffn", x)[1]
    with torch.device("cpu"):
        assert onednn.usable("conv_ffn", x) == (True, "")
    with forward_ad.dual_level():
        assert "forward-mode" in onednn.usable("conv_ffn", x)[1]
    reasons = []
    torch.func.vmap(lambda x: reasons.append(onednn.usable("conv_ffn", x)[1]) or x)(x)
    assert "torch.func" in reasons[0]
    assert "float64" in onednn.usable("conv_ffn", x, weights=[x.double()])[1]
    assert "meta" in onednn.usable("conv_ffn", x, weights=[x.to("meta")])[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.usable("conv_ffn", x, weights=[x.bfloat16()]) == (True, "")
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "oneDNN" in onednn.usable("conv_ffn", x)[1]


def count_calls(monkeypatch) -> list:
    calls = []
    original = onednn.conv_ffn
    monkeypatch.setattr(onednn, "conv_ffn", lambda *args: calls.append(1) or original(*args))
    return calls


def test_conv_ffn_takes_it_for_inference_only(monkeypatch):
    calls = count_calls(monkeypatch)
    ffn = ConvFFN(8, 32).eval()
    x = torch.randn(2, 8, 6, 6)
    slow = ffn(x)
    assert not calls
    with torch.no_grad():
        fast = ffn(x)
        assert len(calls) == 1
        torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-6)
        ffn.drop1.p = 0.5
        ffn.train()(x)
        assert len(calls) == 1


@torch.no_grad()
def test_conv_ffn_leaves_hooks_wrappers_and_other_activations_alone(monkeypatch):
    calls = count_calls(monkeypatch)
    x = torch.randn(2, 8, 6, 6)
    seen = []
    hooked = ConvFFN(8, 32).eval()
    hooked.act.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    hooked(x)
    assert seen == [(2, 32, 6, 6)]
    wrapped = ConvFFN(8, 32).eval()
    wrapped.fc1 = torch.nn.Sequential(wrapped.fc1)
    wrapped(x)
    ConvFFN(8, 32, act_layer="relu").eval()(x)
    assert not calls


class Halved(nn.Parameter):
    """A tensor that is more than its numbers, as a quantized one is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        halved = [a.as_subclass(torch.Tensor) / 2 if isinstance(a, cls) and func is torch.conv2d else a for a in args]
        return super().__torch_function__(func, types, halved, kwargs or {})


def changed_weight(ffn: ConvFFN) -> None:
    ffn.fc1.weight = Halved(ffn.fc1.weight.detach())


def conv3x3(ffn: ConvFFN) -> None:
    ffn.fc1 = nn.Conv2d(8, 32, 3, padding=1)


def no_bias(ffn: ConvFFN) -> None:
    ffn.fc2.bias = None


def parametrized(ffn: ConvFFN) -> None:
    parametrize.register_parametrization(ffn.dwconv, "weight", nn.Tanh())


def pruned(ffn: ConvFFN) -> None:
    prune.l1_unstructured(ffn.fc1, "weight", 0.5)


def patched(ffn: ConvFFN) -> None:
    forward = ffn.fc2.forward
    ffn.fc2.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [changed_weight, conv3x3, no_bias, parametrized, pruned, patched])
def test_changed_layers_run_themselves(change, monkeypatch):
    calls = count_calls(monkeypatch)
    ffn = ConvFFN(8, 32).eval()
    x = torch.randn(2, 8, 6, 6)
    before = ffn(x)
    change(ffn)
    expected = ffn(x)
    with torch.no_grad():
        assert torch.equal(ffn(x), expected)
    assert not calls
    assert not torch.allclose(before, expected)


@torch.no_grad()
def test_global_hooks_see_each_layer(monkeypatch):
    calls = count_calls(monkeypatch)
    ffn = ConvFFN(8, 32).eval()
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda m, inputs, output: seen.append(m)):
        ffn(torch.randn(2, 8, 6, 6))
    assert {ffn.fc1, ffn.act, ffn.dwconv, ffn.fc2} <= set(seen)
    assert not calls


@torch.no_grad()
def test_weights_of_another_dtype_are_an_error_as_ever():
    ffn = ConvFFN(8, 32).eval()
    ffn.fc1.double()
    with pytest.raises(RuntimeError, match="type"):
        ffn(torch.randn(2, 8, 6, 6))


@torch.no_grad()
def test_flop_counter_sees_every_convolution():
    ffn = ConvFFN(8, 32).eval()
    with FlopCounterMode(display=False) as counter:
        ffn(torch.randn(1, 8, 6, 6))
    assert counter.get_total_flops() == 2 * 36 * (8 * 32 + 9 * 32 + 32 * 8)
