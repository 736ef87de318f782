"""The models with fused kernels on a GPU: what `make gpu-check` runs beside tests/ops/triton/test_kernels.py.

Without a GPU exact kernels run in their place, on the CPU (exact.py): what is asserted here holds for kernels that are
right, and for others, as `TestAWrongKernelShows` shows, it does not. Only what is marked `needs_gpu` or `needs_two` is
left out there: the choice of the backend, streams, the memory of a GPU, Inductor's CUDA graphs, a second device.
"""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import exact
import goldens
import svit
from svit.models.svit import Block
from svit.ops import cuda, depthwise3x3, reference, sample, spread

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU: make gpu-check")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_cuda_backend = pytest.mark.skipif(GPU and cuda.compiled is None, reason=cuda.version)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Relative errors allowed, in steps of the dtype (eps). A result goes through N roundings of half a step at most, which
# add up like a random walk: sqrt(N) / 2 steps, for some 250 in a forward pass of SViT-S and 1000 in a training step.
# Exact kernels show 1.6, 3.7 and 0.3 on the CPU.
LOGITS, GRADIENTS, HALF_BLOCK = 8, 16, 2


def tolerance(dtype: torch.dtype, steps: int) -> float:
    """In float32 sums of thousands of terms round too, which is 64 times as much; in 16 bit sums are float32."""
    return steps * torch.finfo(dtype).eps * (64 if dtype == torch.float32 else 1)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The fused kernels of a GPU, whose float32 is float32 in PyTorch's convolutions too, or exact ones on the CPU."""
    if GPU:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    else:
        exact.install(monkeypatch)


def autocast(dtype: torch.dtype, **arguments) -> torch.autocast:
    return torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32, **arguments)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """SViT-S with the goldens' weights, in float32."""
    model = timm.create_model("svit_small")
    model.load_state_dict(goldens.state_dict("small"))
    return model.to(DEVICE).eval()


@pytest.fixture
def golden() -> tuple[torch.Tensor, dict]:
    return goldens.image(1, (2, 3, 200, 264)).float().to(DEVICE), goldens.load("stvit_small_200x264")


@needs_gpu
def test_it_is_used():
    x = torch.empty(1, 8, 8, 64, device="cuda")
    assert svit.ops.choose("sample", x) == "triton"
    assert svit.ops.choose("depthwise3x3", x) == "triton"
    svit.ops.info()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_golden_logits(small, golden, dtype, folded):
    x, expected = golden
    model = copy.deepcopy(small).fuse() if folded else small
    with autocast(dtype):
        logits = model(x)
    assert goldens.error(logits.cpu(), expected["logits"]) < tolerance(dtype, LOGITS)


@needs_gpu
@torch.inference_mode()
def test_side_stream(small, golden):
    x, _ = golden
    expected = small(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = small(x)
    torch.cuda.current_stream().wait_stream(side)
    assert difference(y, expected) < tolerance(torch.float32, LOGITS)


# Gradients, each layer's against float64. Not against the reference in the same dtype: its own errors are larger than
# what is looked for, several times the gradient of some LayerNorms.


def shallow(dtype: torch.dtype = torch.float32, **arguments) -> nn.Module:
    """The stages of SViT-S with one block each, so that few roundings add up, and layer scale in two of them."""
    torch.manual_seed(0)
    arguments = {"depths": (1, 1, 1, 1), "layer_scale_init": (None, 0.5, None, 0.5), **arguments}
    return timm.create_model("svit_small", **arguments).to(DEVICE, dtype)


def images(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 72, 104, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def backward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits; the gradients of a cross entropy are scaled so that float16 holds them."""
    model.zero_grad()
    logits = model(x)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    (1024 * nn.functional.cross_entropy(logits, torch.arange(len(x), device=x.device))).backward()
    return logits.detach()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A layer's gradients in one vector: that of a bias before a BatchNorm is zero, and its errors are to no scale."""
    layers = {name: [*m.parameters(recurse=False)] for name, m in model.named_modules()}
    return {name: torch.cat([p.grad.flatten() for p in ps]) for name, ps in layers.items() if ps}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], allowed: float) -> None:
    differences = {name: difference(actual[name], expected[name]) for name in expected}
    worst = max(differences, key=differences.get)
    assert differences[worst] < allowed, f"{worst}: {differences[worst]}, allowed {allowed}"


@pytest.fixture(scope="module")
def exact_gradients() -> dict[bool, dict[str, torch.Tensor]]:
    """Of a step in training mode and in eval mode."""
    steps = {}
    for train in (True, False):
        model = shallow(torch.float64, backend="reference").train(train)
        logits = backward(model, images(torch.float64))
        steps[train] = {"logits": logits, **gradients(model)}
    return steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_gradients(train, dtype, exact_gradients):
    model = shallow().train(train)
    with autocast(dtype):
        logits = backward(model, images())
    assert_near({"logits": logits, **gradients(model)}, exact_gradients[train], tolerance(dtype, GRADIENTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=needs_gpu)])
def test_compiled(mode, dtype, exact_gradients):
    """With 'reduce-overhead' the first calls run without a CUDA graph, the next capture it and replay it."""
    model = shallow().train()
    compiled = torch.compile(model, fullgraph=True, **({"mode": mode} if GPU else {"backend": "aot_eager"}))
    calls = 3 if mode == "reduce-overhead" else 1
    for _ in range(calls):
        with autocast(dtype):
            logits = backward(compiled, images())
        assert_near({"logits": logits, **gradients(model)}, exact_gradients[True], tolerance(dtype, GRADIENTS))
    model.load_state_dict(shallow().state_dict())
    model.eval()
    for _ in range(calls):
        with torch.no_grad(), autocast(dtype):
            logits = compiled(images()).clone()
        assert difference(logits, exact_gradients[False]["logits"]) < tolerance(dtype, LOGITS)


@needs_gpu
def test_training_takes_less_memory_than_the_reference():
    peaks = []
    for backend in (None, "reference"):
        model = timm.create_model("svit_small", backend=backend).cuda()
        x = torch.randn(8, 3, 224, 224, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().sum()
        loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        del model, loss
    assert peaks[0] < peaks[1]


def test_maps_of_more_than_2_to_the_31_elements():
    """On the CPU of fewer, for want of memory."""
    B, H, W, C = (3, 4096, 3072, 64) if GPU else (2, 96, 128, 64)  # 2.4e9
    assert not GPU or B * H * W * C > 2**31
    torch.manual_seed(0)
    x = torch.zeros(B, H, W, C, device=DEVICE, dtype=torch.bfloat16)
    corner = torch.randn(1, 64, 64, C).to(x)
    x[-1:, -64:, -64:] = corner
    s, q = sample(x, (8, 8))
    y = spread(s, q, (8, 8), (H, W))
    inner = slice(-32, None)  # away from what lies beyond the corner
    allowed = 4 * torch.finfo(x.dtype).eps  # of the largest value: q, s, products and results are rounded
    s64, q64, _ = reference.sample(corner.double(), (8, 8))
    expected = reference.spread(s64, q64, (8, 8), (64, 64))[:, inner, inner]
    assert (y[-1:, inner, inner].double() - expected).abs().max() < allowed * expected.abs().max()
    taps, bias = torch.randn(C, 1, 3, 3).to(DEVICE), torch.randn(C).to(DEVICE)
    leaf, corner64 = x.requires_grad_(), corner.double().requires_grad_()
    y = depthwise3x3(leaf, taps, bias)
    expected = reference.depthwise3x3(corner64, taps.double(), bias.double())
    assert (y[-1:, -63:, -63:].double() - expected[:, 1:, 1:]).abs().max() < allowed * expected.abs().max()
    (grad,) = torch.autograd.grad(y[-1:, inner, inner].sum(), leaf)
    (expected,) = torch.autograd.grad(expected[:, inner, inner].sum(), corner64)
    assert (grad[-1:, -64:, -64:].double() - expected).abs().max() < allowed * expected.abs().max()


# CUDA graphs (docs/ops.md). On the CPU calls stand in for replays, so that the assertions run there too.


class Calls:
    def __init__(self, run: Callable[[], torch.Tensor], y: torch.Tensor) -> None:
        self.run, self.y = run, y

    def replay(self) -> None:
        self.y.copy_(self.run())


def capture(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph | Calls, torch.Tensor]:
    """A CUDA graph of `run`, and the result that each replay writes; a call before compiles and checks the kernels."""
    if not GPU:
        return Calls(run, y := run().clone()), y
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    return graph, y


def check_replay(run: Callable[[], torch.Tensor], x: torch.Tensor, allowed: float) -> None:
    """What a graph of `run`, which reads x, gives for another x is what `run` gives."""
    graph, y = capture(run)
    graph.replay()
    before = y.clone()
    x.copy_(5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)))
    graph.replay()
    assert difference(y, run()) <= allowed
    assert difference(before, y) > allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.inference_mode()
def test_inference_in_a_graph(dtype):
    model, x = shallow().eval(), images()
    with autocast(dtype, cache_enabled=False):
        check_replay(lambda: model(x), x, tolerance(dtype, HALF_BLOCK))


def graphed(model: nn.Module) -> nn.Module:
    return torch.cuda.make_graphed_callables(model, (images(),)) if GPU else model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_in_a_graph(dtype):
    with autocast(dtype, cache_enabled=False):
        ours, eager = graphed(shallow().train()), shallow().train()
        eager.load_state_dict(ours.state_dict())  # the calls before the capture moved BatchNorm's statistics
        start = copy.deepcopy(eager.state_dict())
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-5) for model in (ours, eager)]
        for step in range(3):
            logits, expected = (backward(model, images(seed=step)) for model in (ours, eager))
            assert difference(logits, expected) < tolerance(dtype, GRADIENTS)
            assert_near(gradients(ours), gradients(eager), tolerance(dtype, GRADIENTS))
            for optimizer in optimizers:
                optimizer.step()
    statistics = {name: t for name, t in eager.named_buffers() if name.endswith("running_var")}
    assert_near(dict(ours.named_buffers()), statistics, tolerance(dtype, HALF_BLOCK))
    assert all(difference(t, start[name]) > tolerance(dtype, HALF_BLOCK) for name, t in statistics.items())


def test_each_replay_drops_other_paths():
    model = graphed(shallow(drop_path_rate=0.5).train())
    assert not torch.equal(model(images()).clone(), model(images()).clone())


# The CUDA backend: half blocks in one kernel.


def whole_block(C: int, dtype: torch.dtype, **arguments) -> tuple[Block, torch.Tensor]:
    """A block whose halves add a third to a half of what they are given, and a map: the sums do not hide them."""
    torch.manual_seed(0)
    (h, w), head = cuda.CELLS[C]
    block = Block(C, C // head, (h, w), **arguments)
    with torch.no_grad():
        block.attn.qkv.weight.mul_(4)
        block.attn.proj.weight.mul_(16)
        block.mlp.fc2.weight.mul_(4)
    x = torch.randn(3, C, 7 * h, 6 * w).contiguous(memory_format=torch.channels_last)
    return block.to(DEVICE, dtype), x.to(DEVICE, dtype)


@needs_cuda_backend
@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_cuda_backend_is_exact_to_its_dtype(C, dtype, clusters, monkeypatch):
    if clusters and not (GPU and cuda.has_clusters(torch.device("cuda"))):
        pytest.skip("no GPU here has thread-block clusters")
    monkeypatch.setattr(cuda, "has_clusters", lambda device: clusters)
    check_whole_block(C, dtype, monkeypatch)


def attention_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    plan = block.choose_attention(x)
    if plan.backend == "reference":
        return x + block.scale_attention(block.attn(block.norm1(x)))
    return block.attn.forward_residual(x, block.norm1, block.scale_attention, plan)


def ffn_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    plan = block.choose_ffn(x)
    if plan is not None and plan.op == "conv_ffn":
        return block.mlp.forward_fused(x, plan, residual=x)
    return x + block.scale_ffn(block.mlp(x))


def check_whole_block(C: int, dtype: torch.dtype, monkeypatch) -> None:
    calls = []
    for op in cuda.BACKEND.OPS:
        kernel = getattr(cuda.BACKEND, op)
        monkeypatch.setattr(cuda.BACKEND, op, lambda *args, op=op, kernel=kernel: [calls.append(op), kernel(*args)][1])
    block, x = whole_block(C, dtype, backend="cuda", layer_scale_init=0.5)
    model64 = Block(C, block.attn.num_heads, block.attn.cell, backend="reference", layer_scale_init=0.5).double()
    model64.load_state_dict(block.state_dict())
    model64.to(DEVICE)
    results = []
    for module in (block, model64):
        leaf = x.to(module.pos_embed.weight.dtype).detach().requires_grad_()
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x).to(leaf)
        module.train()
        y = attention_half(module, leaf)
        y.backward(weight)
        layers = gradients(nn.ModuleDict({"norm1": module.norm1, "attn": module.attn}))
        with torch.no_grad():
            ffn = ffn_half(module.eval().fuse(), leaf)
        results.append({"attention": y, "conv-FFN": ffn, "x": leaf.grad, **layers})
    assert calls == ["super_token_attention", "conv_ffn"]
    assert_near(*results, tolerance(dtype, HALF_BLOCK))


@needs_cuda_backend
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_cuda_backend_gives_the_same_bits(C):
    block, x = whole_block(C, torch.bfloat16, backend="cuda")
    with torch.inference_mode():
        first = block.eval()(x)
        assert all(torch.equal(block(x), first) for _ in range(20 if GPU else 1))


@needs_cuda_backend
@torch.inference_mode()
def test_cuda_backend_in_a_graph():
    block, x = whole_block(64, torch.bfloat16, backend="cuda")
    block.eval()
    check_replay(lambda: block(x), x, 0)


@needs_cuda_backend
@pytest.mark.parametrize("train", [False, True])
def test_cuda_backend_compiles_to_one_graph(train):
    block, x = whole_block(64, torch.bfloat16, backend="cuda")
    block.train(train)
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    with torch.set_grad_enabled(train):
        assert difference(compiled(x), block(x)) < 4 * torch.finfo(x.dtype).eps


@needs_cuda_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_cuda_backend_in_a_model(small, dtype):
    x = goldens.image(0, (1, 3, 224, 224)).float().to(DEVICE)
    model = timm.create_model("svit_small", backend="cuda").to(DEVICE).eval()
    model.load_state_dict(small.state_dict())
    with autocast(dtype):
        logits = model.fuse()(x)
    assert goldens.error(logits.cpu(), goldens.load("stvit_small_224")["logits"]) < tolerance(dtype, LOGITS)


@needs_two
@needs_cuda_backend
def test_cuda_backend_on_the_second_device():
    block, x = whole_block(64, torch.bfloat16, backend="cuda")
    with torch.inference_mode():
        expected = block.eval()(x)
        y = block.to("cuda:1")(x.to("cuda:1"))
    assert y.device.index == 1
    assert torch.equal(y.to("cuda:0"), expected)


@needs_two
def test_second_device(small, golden):
    x, expected = golden
    model = copy.deepcopy(small).to("cuda:1")
    with torch.inference_mode():
        logits = model(x.to("cuda:1"))
    assert logits.device.index == 1
    assert goldens.error(logits.cpu(), expected["logits"]) < tolerance(torch.float32, LOGITS)


@pytest.mark.skipif(GPU, reason="exact kernels run on the CPU")
class TestAWrongKernelShows:
    """One whose result is five percent too large."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "op", ["sample", "spread", "aggregate", "sample_backward", "depthwise3x3", "depthwise3x3_backward"]
    )
    def test_in_a_step(self, op, dtype, exact_gradients, monkeypatch):
        exact.install(monkeypatch, **{op: 1.05})
        with pytest.raises(AssertionError, match="allowed"):
            test_gradients(False, dtype, exact_gradients)

    @pytest.mark.parametrize("op", ["sample", "spread", "depthwise3x3", "bias_gelu_affine"])
    def test_in_inference(self, op, small, golden, monkeypatch):
        exact.install(monkeypatch, **{op: 1.05})
        with pytest.raises(AssertionError):
            test_golden_logits(small, golden, torch.float32, False)

    @pytest.mark.parametrize("op", cuda.BACKEND.OPS)
    def test_in_half_a_block(self, op, monkeypatch):
        exact.install(monkeypatch, **{op: 1.05})
        with pytest.raises(AssertionError, match="allowed"):
            check_whole_block(64, torch.float16, monkeypatch)
