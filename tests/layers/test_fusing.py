"""1x1 convolutions as products, which is how a GPU runs them: on the CPU, where the choice is patched."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import goldens
from svit.layers import ConvFFN, FinalConv, SuperTokenAttention, fusing
from svit.layers.fusing import pointwise, runs_as_product


@pytest.fixture
def as_products(monkeypatch) -> list[nn.Module]:
    """1x1 convolutions run as products wherever they would on a GPU in 16 bit; the list names those that did."""
    taken = []

    def runs(conv, x):
        if not fusing.is_plain_pointwise(conv):
            return False
        taken.append(conv)
        return True

    monkeypatch.setattr(fusing, "runs_as_product", runs)
    return taken


def outputs_and_gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    return [y, leaf.grad, *(p.grad for p in module.parameters())]


LAYERS = {
    "attention": (lambda: SuperTokenAttention(8, 2, 1), 2),
    "super tokens": (lambda: SuperTokenAttention(8, 2, (2, 3)), 2),
    "conv-FFN": (lambda: ConvFFN(8, 20), 2),
    "final": (lambda: FinalConv(8, 12), 1),
    "final, no conv": (lambda: FinalConv(8, None), 0),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [2, 0])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_the_same(name, batch, memory_format, as_products, monkeypatch):
    build, convolutions = LAYERS[name]
    torch.manual_seed(0)
    module = build().double()
    if batch == 0:
        module.eval()  # BatchNorm has no statistics of nothing
    x = torch.randn(batch, 8, 5, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    products = outputs_and_gradients(module, x)
    assert len(as_products) == convolutions
    monkeypatch.undo()
    for actual, expected in zip(products, outputs_and_gradients(module, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if batch and convolutions and memory_format == torch.channels_last:
        assert products[0].is_contiguous(memory_format=torch.channels_last)


def test_goldens_hold(as_products):
    golden = goldens.load("stvit_small_200x264")
    model = timm.create_model("svit_small").double().eval()
    model.load_state_dict(goldens.state_dict("small"))
    x = goldens.image(1, (2, 3, 200, 264)).requires_grad_()  # with autograd no other path runs the conv-FFN
    assert goldens.error(model(x), golden["logits"]) < 1e-9
    assert len(as_products) == 4 * 20 + 1


class LowRank(nn.Module):
    """What LoRA puts in the place of a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = conv
        self.down, self.up = nn.Conv2d(conv.in_channels, 2, 1), nn.Conv2d(2, conv.out_channels, 1)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv


def hooked_before(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return conv


def parametrized(conv: nn.Conv2d) -> nn.Conv2d:
    return parametrize.register_parametrization(conv, "weight", nn.Tanh())


def patched(conv: nn.Conv2d) -> nn.Conv2d:
    forward = conv.forward
    conv.forward = lambda x: 2 * forward(x)
    return conv


CHANGES = {
    "hook": hooked,
    "pre-hook": hooked_before,
    "LoRA": LowRank,
    "parametrization": parametrized,
    "subclass": lambda conv: Doubled(conv.in_channels, conv.out_channels, 1),
    "patched forward": patched,
    "3 x 3": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1),
    "3 x 3, no padding": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3),
    "padding": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1, padding=1),
    "stride": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1, stride=2),
    "groups": lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=2),
    "no convolution": lambda conv: nn.Identity(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_stock_convolution_runs_itself(change, as_products):
    conv = CHANGES[change](nn.Conv2d(4, 6, 1)).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    assert torch.equal(pointwise(conv, x), conv(x))
    assert not as_products


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_hooks_and_wrappers_of_a_block_run(path, as_products):
    model = timm.create_model("test_svit").eval()
    block = model.stages[1].blocks[0]
    parent, name = (block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2])
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    setattr(parent, name, LowRank(getattr(parent, name)))
    wrapper = getattr(parent, name)
    seen = []
    wrapper.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(path))
    assert not torch.allclose(model(x), expected)
    assert seen == [path]


def test_no_bias(as_products):
    conv = nn.Conv2d(4, 6, 1, bias=False).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(pointwise(conv, x), conv(x), rtol=1e-12, atol=1e-12)
    assert as_products


def test_autocast(as_products):
    conv = nn.Conv2d(64, 32, 1)
    x = torch.randn(2, 64, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = pointwise(conv, x), conv(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-2)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_the_bias_is_part_of_the_product(dtype):
    """Told by tensors that claim to be on one: no pass of its own adds the bias, in 16 bit."""
    with FakeTensorMode(), torch.no_grad(), Recorder() as recorder:
        conv = nn.Conv2d(8, 16, 1, device="cuda", dtype=dtype)
        x = torch.empty(2, 8, 5, 6, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
        recorder.names.clear()
        y = pointwise(conv, x)
    views = ("prim.", "aten.view.", "aten.permute.", "aten.t.")
    computes = [name for name in recorder.names if not name.startswith(views)]
    assert computes == (["aten.addmm.default"] if dtype.itemsize == 2 else ["aten.convolution.default"])
    assert y.shape == (2, 16, 5, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_where_it_stays_a_convolution():
    conv = nn.Conv2d(8, 16, 1)
    assert not runs_as_product(conv, torch.empty(2, 8, 5, 6, dtype=torch.bfloat16))
    with FakeTensorMode():
        x = torch.empty(2, 8, 5, 6, device="cuda", dtype=torch.bfloat16)
        assert runs_as_product(conv, x)
    assert not runs_as_product(hooked(conv), x)
    assert torch.fx.symbolic_trace(FinalConv(8, 16)).graph.find_nodes(op="call_module", target="conv")


@pytest.mark.parametrize("strict", [False, True])
def test_exports_keep_the_convolutions(strict):
    model = timm.create_model("test_svit").eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to("cuda", torch.bfloat16)
        x = torch.randn(2, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
        code = torch.export.export(model, (x,), strict=strict).graph_module.code
    assert code.count("ops.aten.linear") == 1  # the classifier
    assert code.count("ops.aten.conv2d") == 4 + 3 + 4 * 4 + 1


def test_compiled_to_one_graph(as_products):
    torch.manual_seed(0)
    model = nn.Sequential(SuperTokenAttention(8, 2, 1), FinalConv(8, 12)).double()
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    expected = outputs_and_gradients(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for actual, eager in zip(outputs_and_gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(actual, eager, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_compiler_sees_the_product(dtype):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = FinalConv(8, 16, device="cuda", dtype=dtype).eval()
        x = torch.randn(2, 8, 5, 6, device="cuda", dtype=dtype)
        torch.compile(module, backend=keep, fullgraph=True)(x)
    (code,) = graphs
    assert ("linear(" in code, "conv2d(" in code) == ((True, False) if dtype == torch.bfloat16 else (False, True))
