"""torch.func, forward-mode AD and modes over whole models, on a CPU, in inference and with gradients."""

import copy
import io
import warnings

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import svit  # noqa: F401

OPTIONS = {
    "stock": {},
    "cells of one pixel": dict(stoken_size=(1, 1, 1, 1)),
    "rounds": dict(n_iter=(2, 3, 1, 1)),
    "differentiable": dict(differentiable_association=True, n_iter=2),
    "drops": dict(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2, layer_scale_init=0.3),
    "stem of stride 1": dict(stem_stride=1, in_chans=1),
    "other norm": dict(norm_layer="layernorm2d", act_layer="silu", head_width=0),
}


def build(name: str = "stock", dtype=torch.float32, fused: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_svit", num_classes=5, **OPTIONS[name]).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return (model.fuse() if fused else model).to(dtype)


def images(model: nn.Module, n: int = 2, size=(37, 50), seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, model.in_chans, *size, generator=g).to(next(model.parameters()).dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")  # of `linearize`
        yield


@pytest.mark.parametrize("fused", [False, True], ids=["", "folded"])
@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_over_images(name, fused):
    model = build(name, fused=fused)
    x = images(model, 3)
    with torch.no_grad():
        expected = torch.stack([model(image[None]) for image in x])
        close(vmap(model)(x[:, None]), expected)
        close(vmap(model)(x.contiguous(memory_format=torch.channels_last)[:, None]), expected)
    close(vmap(model)(x[:, None]), expected)


@torch.no_grad()
def test_vmap_gives_feature_maps():
    model = timm.create_model("test_svit", features_only=True).eval()
    x = torch.randn(2, 1, 3, 37, 50)
    for maps, expected in zip(vmap(model)(x), zip(*map(model, x), strict=True), strict=True):
        close(maps, torch.stack(expected))


@pytest.mark.parametrize("name", ["stock", "rounds", "drops"])
@torch.no_grad()
def test_ensemble(name):
    models = [build(name), build(name)]
    for p in models[1].parameters():
        p.mul_(1.1)
    x = images(models[0])
    call = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))
    close(call(*stack_module_state(models), x), torch.stack([model(x) for model in models]))


@pytest.mark.parametrize("name", ["stock", "rounds", "differentiable"])
def test_gradients_of_each_sample(name):
    model = build(name, torch.float64)
    weights, buffers, x = dict(model.named_parameters()), dict(model.named_buffers()), images(model)
    loss = lambda weights, x: functional_call(model, (weights, buffers), (x[None],)).square().sum()  # noqa: E731
    found = vmap(grad(loss), (None, 0))(weights, x)
    for i, image in enumerate(x):
        expected = torch.autograd.grad(model(image[None]).square().sum(), list(weights.values()))
        for key, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(found[key][i], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("enabled", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_mode_is_the_transpose_of_backward(name, enabled):
    """<v, J u> = <J^T v, u>, with the J of backward, which the goldens hold: for the image and for the weights."""
    model = build(name)
    x, u = images(model), images(model, seed=2)
    oracle = copy.deepcopy(model).double()
    leaf = x.double().requires_grad_()
    out = oracle(leaf)
    v = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    dx, *dweights = torch.autograd.grad(out, [leaf, *oracle.parameters()], v)
    with torch.set_grad_enabled(enabled):
        y, tangent = jvp(model, (x,), (u,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, u)))
        weights = {k: p.detach() for k, p in model.named_parameters()}
        steps = {k: torch.randn(p.shape, generator=torch.Generator().manual_seed(4)) for k, p in weights.items()}
        along = jvp(lambda w: functional_call(model, w, (x,)), (weights,), (steps,))[1]
    close(y.double(), out)
    close(dual.primal, y)
    close(dual.tangent, tangent)
    scale = (tangent.double() * v).abs().sum()
    assert abs((tangent * v).sum() - (dx * u).sum()) < 1e-5 * scale
    expected = sum((d * step).sum() for d, step in zip(dweights, steps.values(), strict=True))
    assert abs((along * v).sum() - expected) < 1e-5 * (along.double() * v).abs().sum()


def test_checkpointed_models():
    """What checkpoints save memory with, no transform knows: blocks run as they are."""
    model = build()
    x = images(model)
    expected = [vmap(model)(x[:, None]), grad(lambda x: model(x).sum())(x), *jvp(model, (x,), (x,))]
    model.set_grad_checkpointing()
    actual = [vmap(model)(x[:, None]), grad(lambda x: model(x).sum())(x), *jvp(model, (x,), (x,))]
    for a, b in zip(actual, expected, strict=True):
        close(a, b)


def test_second_derivatives():
    model = build("differentiable", torch.float64)  # without a constant, so that differences show the same
    x, u = images(model, 1, (13, 18)), images(model, 1, (13, 18), seed=2)
    f = lambda x: model(x).square().sum()  # noqa: E731
    expected = (grad(f)(x + 1e-5 * u) - grad(f)(x - 1e-5 * u)) / 2e-5
    close(jvp(grad(f), (x,), (u,))[1], expected, 1e-6)
    close(grad(lambda x: (grad(f)(x) * u).sum())(x), expected, 1e-6)


def test_jacobians_and_linearize():
    block = build("rounds", torch.float64).stages[0].blocks[0].requires_grad_(False)
    x, u = (torch.randn(1, 8, 5, 6, dtype=torch.float64) for _ in range(2))
    jacobian = jacrev(block)(x)
    close(jacfwd(block)(x), jacobian, 1e-9)
    y, linear = linearize(block, x)
    close(y, block(x), 1e-9)
    close(linear(u), torch.einsum("bchwdijk,dijk->bchw", jacobian, u), 1e-9)


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_modes_see_stock_operations():
    model = build()
    x = images(model)
    expected = model(x)
    with Seen() as seen:
        close(model(x), expected)
    # Of the stem, the downsamplings, four pointwise and two depthwise ones a block, and the final one.
    assert seen.functions.count(torch.conv2d) == 4 + 3 + 4 * 6 + 1
    assert not any("mkldnn" in str(f) for f in seen.functions)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as training, torch.enable_grad():
        model(x)
    assert inference.get_total_flops() == training.get_total_flops() > 0
    with torch.device("meta"):  # where factories make tensors, which is no business of a map that exists
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("way", ["symbolic", "timm's extractor"])
def test_graphs_of_torch_fx_pickle(way):
    model = build("rounds")
    graph = torch.fx.symbolic_trace(model) if way == "symbolic" else create_feature_extractor(model, ["head"])
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = images(model)
    result = loaded(x)
    close(result if way == "symbolic" else result["head"], model(x))
