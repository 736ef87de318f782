"""The stem at inference, where one pass follows each convolution: with exact kernels in float64, and with Triton's."""

import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import exact
from svit.layers import Stem
from svit.ops import _dispatch, triton

needs_kernels = pytest.mark.skipif(
    not triton.available or not (triton.INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or interprets"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def trained(in_chans: int = 3, dim: int = 16, stride: int = 4, **kwargs) -> Stem:
    """In eval mode, with statistics and weights of BatchNorm that are not those of the start."""
    torch.manual_seed(0)
    stem = Stem(in_chans, dim, stride, **kwargs)
    for norm in (m for m in stem.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return stem.eval()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Exact kernels run; the list names each."""
    exact.install(monkeypatch)
    backend, names = _dispatch.BACKENDS["exact"], []
    for op in exact.PARTS:
        run = getattr(backend, op)
        monkeypatch.setattr(backend, op, lambda *args, op=op, run=run: [names.append(op), run(*args)][1])
    return names


@pytest.mark.parametrize("size", [(2, 9, 7), (1, 32, 40), (0, 8, 8)], ids=str)
@pytest.mark.parametrize(("in_chans", "stride"), [(3, 1), (1, 2), (5, 4)])
@torch.no_grad()
def test_one_pass_is_the_same(in_chans, stride, size, calls):
    stem = trained(in_chans, stride=stride).double()
    batch, *sides = size
    x = torch.randn(batch, in_chans, *sides, dtype=torch.float64)
    y = stem(x)
    assert calls == ["bias_gelu_affine"] * 4
    torch.testing.assert_close(y, stem.layers(x), rtol=1e-12, atol=1e-12)
    assert batch == 0 or y.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_weights_may_change_between_calls(calls):
    stem = trained().double()
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    stem(x)
    for tensor in (*stem.parameters(), *stem.buffers()):
        tensor.data.mul_(1.25) if tensor.is_floating_point() else tensor
    torch.testing.assert_close(stem(x), stem.layers(x), rtol=1e-12, atol=1e-12)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def replaced(stem: Stem, i: int, layer: nn.Module) -> None:
    stem.layers[i] = layer.double()


CHANGES = {
    "hook of the layers": lambda stem: hooked(stem.layers),
    "hook of a convolution": lambda stem: hooked(stem.layers[3]),
    "hook of a GELU": lambda stem: hooked(stem.layers[4]),
    "hook of a norm": lambda stem: hooked(stem.layers[11]),
    "another convolution": lambda stem: replaced(stem, 0, nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1))),
    "no bias": lambda stem: replaced(stem, 0, nn.Conv2d(3, 8, 3, 2, 1, bias=False)),
    "tanh GELU": lambda stem: replaced(stem, 1, nn.GELU("tanh")),
    "ReLU": lambda stem: replaced(stem, 1, nn.ReLU()),
    "no norm": lambda stem: replaced(stem, 2, nn.Identity()),
    "norm without weights": lambda stem: replaced(stem, 2, nn.BatchNorm2d(8, affine=False).eval()),
    "norm without statistics": lambda stem: replaced(stem, 2, nn.BatchNorm2d(8, track_running_stats=False).eval()),
    "another eps": lambda stem: setattr(stem.layers[5], "eps", 0.1),
    "one norm trains": lambda stem: stem.layers[5].train(),
    "no sequence": lambda stem: setattr(stem, "layers", nn.Conv2d(3, 8, 3).double()),
    "one layer more": lambda stem: stem.layers.append(nn.Identity()),
    "asked for": lambda stem: setattr(stem, "backend", "reference"),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_other_layers_run_one_by_one(change, calls):
    stem = trained().double()
    CHANGES[change](stem)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = copy.deepcopy(stem).layers(x)
    torch.testing.assert_close(stem(x), expected, rtol=1e-12, atol=1e-12)
    assert not calls


def test_training_and_frozen_stems_run_layer_by_layer(calls):
    stem = trained()
    x = torch.randn(2, 3, 16, 16)
    stem(x).sum().backward()
    with torch.no_grad():
        stem.train()(x)
    assert not calls


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_programs_for_others_keep_the_layers(calls):
    stem = trained()
    x = torch.randn(2, 3, 16, 16)
    traced = torch.jit.trace(stem, x, check_trace=False)  # the check runs the module itself
    exported = torch.export.export(stem, (x,))
    scripted = torch.jit.script(stem)
    symbolic = torch.fx.symbolic_trace(stem)
    assert not calls
    assert "bias_gelu_affine" not in str(traced.inlined_graph) + exported.graph_module.code + symbolic.code
    expected = stem(x)
    assert calls
    for program in (traced, exported.module(), scripted, symbolic):
        torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiled_to_one_graph(calls):
    stem = trained().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = torch.compile(stem, backend="aot_eager", fullgraph=True)(x)
    assert calls == ["bias_gelu_affine"] * 4
    torch.testing.assert_close(y, stem.layers(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["autocast", "cast", "half the norms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_16_bit(dtype, way, calls):
    stem = trained().to(dtype).float()
    x = torch.randn(2, 3, 32, 32).to(dtype).float()
    expected = copy.deepcopy(stem).double().layers(x.double())
    if way == "cast":
        stem, x = stem.to(dtype), x.to(dtype)
    if way == "half the norms":
        for norm in stem.layers[2:6:3]:
            norm.to(dtype)
    with torch.autocast("cpu", dtype, enabled=way != "cast"):
        y = stem(x)
    assert calls == ["bias_gelu_affine"] * 4
    assert y.dtype == dtype
    # Four layers, each with three roundings (of the convolution's operands, of its result, at the end).
    assert (y.double() - expected).abs().max() < 12 * torch.finfo(dtype).eps / 2 * expected.abs().max()


def test_the_model_passes_its_backend_on():
    assert timm.create_model("test_svit").stem.backend is None
    assert timm.create_model("test_svit", backend="reference").stem.backend == "reference"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["cast", "autocast"])
@torch.no_grad()
def test_triton(dtype, way):
    stem = trained(backend="triton").to(dtype).float().to(DEVICE)
    x = torch.randn(2, 3, 20, 24).to(dtype).float().to(DEVICE)
    expected = copy.deepcopy(stem).double().layers(x.double())
    if way == "cast":
        stem, x = stem.to(dtype), x.to(dtype)
    assert stem.can_fuse(x)
    with torch.autocast(DEVICE, dtype, enabled=way == "autocast" and dtype != torch.float32):
        y = stem(x)
    assert (y.double() - expected).abs().max() < 12 * torch.finfo(dtype).eps / 2 * expected.abs().max()
    seen = []
    stem.layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert not stem.can_fuse(x)
    with torch.autocast(DEVICE, dtype, enabled=way == "autocast" and dtype != torch.float32):
        stem(x)
    assert seen


@needs_kernels
@torch.no_grad()
def test_triton_does_not_serve_odd_channels():
    stem = trained(dim=20, backend="triton").to(DEVICE)
    x = torch.randn(1, 3, 16, 16, device=DEVICE)
    assert not stem.can_fuse(x)
    torch.testing.assert_close(stem(x), stem.layers(x))


@pytest.mark.skipif(not triton.available or triton.INTERPRETED or DEVICE == "cuda", reason="there are kernels here")
def test_triton_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "test_triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed, 1 skipped" in done.stdout
