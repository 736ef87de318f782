import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import nn
from torch.autograd import gradcheck

import goldens
from svit.layers import SuperTokenAttention
from svit.ops import aggregate, sample, spread


@pytest.fixture(params=["fused", "unfused"])
def attention_path(request):
    set_fused_attn(request.param == "fused")
    yield request.param
    set_fused_attn(True)


def from_golden(case: dict) -> SuperTokenAttention:
    dim, heads, h, w, n_iter = case["meta"].tolist()
    layer = SuperTokenAttention(dim, heads, (h, w), n_iter).double()
    names = {name: f"stoken_refine.{name}" for name in layer.state_dict()}
    layer.load_state_dict(
        {k: torch.from_numpy(goldens.tensor(v, tuple(layer.state_dict()[k].shape))) for k, v in names.items()}
    )
    return layer


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("number", goldens.STA_CASES)
def test_golden_cases(number, memory_format, attention_path):
    case = goldens.load(f"sta_case{number}")
    layer = from_golden(case)
    assert layer.fused_attn == (attention_path == "fused")
    x = torch.from_numpy(case["x"]).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(case["gy"]))
    assert goldens.error(y, case["y"]) < 1e-9
    assert goldens.error(x.grad, case["gx"]) < 1e-9
    for name, parameter in layer.named_parameters():
        assert goldens.error(parameter.grad, case[f"g/stoken_refine.{name}"]) < 1e-9


def test_float32_and_bfloat16_errors():
    case = goldens.load("sta_case0")
    layer = from_golden(case).float()
    x = torch.from_numpy(case["x"]).float()
    assert goldens.error(layer(x), case["y"]) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert goldens.error(layer(x), case["y"]) < 0.03


def test_cell_of_one_pixel_is_global_attention():
    layer = SuperTokenAttention(8, 2, 1).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    # qkv is head-major: each head's q, k and v stand together.
    q, k, v = layer.qkv(x).reshape(2, 2, 3, 4, 12).transpose(-1, -2).unbind(2)
    attn = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = layer.proj((attn @ v).transpose(-1, -2).reshape(2, 8, 3, 4))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_pair_and_int_cells():
    layer = SuperTokenAttention(4, 1, 2)
    other = SuperTokenAttention(4, 1, (2, 2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 5, 6)
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(SuperTokenAttention(4, 1, (1, 2)).requires_grad_(False)(x), layer(x))


@pytest.mark.parametrize("n_iter", [1, 2])
def test_differentiable_association(n_iter):
    layer = SuperTokenAttention(4, 2, 2, n_iter, differentiable_association=True).double()
    detached = SuperTokenAttention(4, 2, 2, n_iter).double()
    detached.load_state_dict(layer.state_dict())
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x)
    assert torch.equal(layer(x), detached(x))
    grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, detached)]
    assert (grads[0] - grads[1]).abs().max() > 1e-4


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("n_iter", [1, 3])
def test_forward_mode_holds_the_association_constant(n_iter, enabled):
    """Against differences of the layer with q as it was."""
    torch.manual_seed(0)
    layer = SuperTokenAttention(8, 2, (2, 3), n_iter).double()
    x, u = (torch.randn(2, 8, 5, 7, dtype=torch.float64) for _ in range(2))
    _, q = sample(x.permute(0, 2, 3, 1), (2, 3), n_iter)

    def linear(x):
        total, mass = aggregate(x.permute(0, 2, 3, 1), q, (2, 3))
        s = layer.attend((total / mass[..., None]).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return spread(s, q, (2, 3), (5, 7)).permute(0, 3, 1, 2)

    with torch.set_grad_enabled(enabled):
        y, tangent = torch.func.jvp(layer, (x,), (u,))
        expected = (linear(x + 1e-5 * u) - linear(x - 1e-5 * u)) / 2e-5
        torch.testing.assert_close(y, linear(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)
        assert (tangent - (layer(x + 1e-5 * u) - layer(x - 1e-5 * u)) / 2e-5).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 8, 1, 9), (0, 8, 6, 6), (2, 8, 3, 3)])
def test_small_and_empty_inputs(shape):
    layer = SuperTokenAttention(8, 2, 4)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape
    assert torch.isfinite(y).all()


def test_nan_stays_in_its_image():
    x = torch.randn(2, 8, 6, 6)
    x[0, 0, 0, 0] = float("nan")
    y = SuperTokenAttention(8, 2, 2)(x)
    assert y[0].isnan().any()
    assert torch.isfinite(y[1]).all()


def test_dropout_acts_in_training_only(attention_path):
    x = torch.randn(1, 8, 6, 6)
    layer = SuperTokenAttention(8, 2, 1, attn_drop=0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer = SuperTokenAttention(8, 2, 2, proj_drop=1.0).train()
    assert not layer(x).any()


@pytest.mark.parametrize("cell", [1, 2])
def test_another_layer_in_the_place_of_the_attention_dropout_runs(cell):
    layer = SuperTokenAttention(8, 2, cell)
    x = torch.randn(1, 8, 6, 4)
    expected, tokens = layer(x), 24 // cell**2
    seen = []
    layer.attn_drop = nn.Sequential(nn.Identity())
    layer.attn_drop.register_forward_hook(lambda m, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), expected)
    assert seen[0].shape == (1, 2, tokens, tokens)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(1, 2, tokens))
    layer.attn_drop = nn.Sequential(nn.Dropout(1.0))
    bias = layer.proj.bias[:, None, None].expand(8, 6, 4)[None]
    if cell == 1:
        torch.testing.assert_close(layer(x), bias)
    assert not torch.allclose(layer(x), expected)


def test_no_attention_map_in_memory():
    """The fused path never holds heads * N * N numbers: not in one tensor, saved for backward or not."""
    layer = SuperTokenAttention(8, 2, 1)
    x = torch.randn(1, 8, 32, 32, requires_grad=True)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: largest.append(t.numel()) or t, lambda t: t):
        layer(x).sum().backward()
    assert max(largest) <= 3 * x.numel()
    calls = []
    original = F.scaled_dot_product_attention
    try:
        F.scaled_dot_product_attention = lambda *a, **k: calls.append(1) or original(*a, **k)
        layer(x)
    finally:
        F.scaled_dot_product_attention = original
    assert calls


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=3), r"num_heads: expected a divisor of dim 8, got 3"),
        (dict(num_heads=1.5, dim=3), "num_heads: expected a divisor of dim 3, got 1.5"),
        (dict(num_heads=True), "num_heads: expected a divisor of dim 8, got True"),
        (dict(num_heads=0), r"num_heads: expected a divisor of dim 8, got 0"),
        (dict(stoken_size=0), r"stoken_size: expected a positive int or a pair of them, got 0"),
        (dict(stoken_size=(2, 2, 2)), r"stoken_size: .* got \(2, 2, 2\)"),
        (dict(stoken_size=2.5), r"stoken_size: .* got 2\.5"),
        (dict(n_iter=0), r"n_iter: expected at least 1, got 0"),
        (dict(n_iter=1.5), r"n_iter: expected at least 1, got 1\.5"),
        (dict(n_iter=(1, 2)), r"n_iter: expected at least 1, got \(1, 2\)"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SuperTokenAttention(**{"dim": 8, "num_heads": 2, **kwargs})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("drops", [False, True])
def test_dropout_is_in_the_mode_of_its_module(fused, drops):
    """So that Monte Carlo dropout can turn it on alone."""
    set_fused_attn(fused)
    try:
        layer = SuperTokenAttention(8, 2, 2, attn_drop=0.5)
    finally:
        set_fused_attn(True)
    layer.train(not drops)
    layer.attn_drop.train(drops)
    x = torch.randn(1, 8, 8, 8)
    assert torch.equal(layer(x), layer(x)) == (not drops)


@pytest.mark.parametrize("shape", [(8, 4, 4), (1, 4, 4, 4), (1, 8, 0, 4), (1, 8, 4, 0)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"x: expected \(B, 8, H, W\) with H and W of at least 1, got \["):
        SuperTokenAttention(8, 2, 2)(torch.zeros(shape))
