"""What only a GPU can show, beside the kernels (tests/ops/triton/test_kernels.py): `make gpu-check` runs both."""

import copy

import pytest
import timm
import torch

import goldens
import svit
from svit.models.svit import Block
from svit.ops import cuda, depthwise3x3, reference, sample, spread

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: make gpu-check", allow_module_level=True)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    """SViT-S with the goldens' weights, in float32."""
    model = timm.create_model("svit_small")
    model.load_state_dict(goldens.state_dict("small"))
    return model.cuda().eval()


@pytest.fixture
def golden() -> tuple[torch.Tensor, dict]:
    return goldens.image(1, (2, 3, 200, 264)).float().cuda(), goldens.load("stvit_small_200x264")


def test_it_is_used():
    x = torch.empty(1, 8, 8, 64, device="cuda")
    assert svit.ops.choose("sample", x) == "triton"
    assert svit.ops.choose("depthwise3x3", x) == "triton"
    svit.ops.info()


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_golden_logits(small, golden, dtype, tolerance, folded):
    x, expected = golden
    model = copy.deepcopy(small).fuse() if folded else small
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        logits = model(x)
    assert goldens.error(logits.cpu(), expected["logits"]) < tolerance


@torch.inference_mode()
def test_cuda_graph(small, golden):
    x, _ = golden
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            small(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = small(x)
        x.copy_(x.flip(-1).clone())
        graph.replay()
        torch.testing.assert_close(y, small(x), rtol=0.02, atol=0.02 * y.abs().max().item())


@torch.inference_mode()
def test_side_stream(small, golden):
    x, _ = golden
    expected = small(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = small(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_compiled_step(dtype):
    torch.manual_seed(0)
    model = timm.create_model("test_svit").cuda()
    x = torch.randn(2, 3, 72, 56, device="cuda")
    gradients = []
    for module in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            module(x).float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < (1e-3 if dtype is None else 0.1) * gradients[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_under_autocast_is_near_the_reference(dtype):
    gradients = []
    for backend in (None, "reference"):
        torch.manual_seed(0)
        model = timm.create_model("svit_tiny", drop_path_rate=0.3, backend=backend).cuda().train()
        x = torch.randn(4, 3, 100, 132, device="cuda")
        with torch.autocast("cuda", dtype):
            loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4, device="cuda"))
        (loss * 16).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


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
    B, H, W, C = 3, 4096, 3072, 64  # 2.4e9
    x = torch.zeros(B, H, W, C, device="cuda", dtype=torch.bfloat16)
    corner = torch.randn(1, 64, 64, C, device="cuda", dtype=torch.bfloat16)
    x[-1:, -64:, -64:] = corner
    s, q = sample(x, (8, 8))
    y = spread(s, q, (8, 8), (H, W))
    inner = slice(-32, None)  # away from what lies beyond the corner
    s64, q64, _ = reference.sample(corner.double(), (8, 8))
    expected = reference.spread(s64, q64, (8, 8), (64, 64))[:, inner, inner]
    assert (y[-1:, inner, inner].double() - expected).abs().max() < 0.03 * expected.abs().max()
    taps, bias = torch.randn(C, 1, 3, 3, device="cuda"), torch.randn(C, device="cuda")
    leaf, corner64 = x.requires_grad_(), corner.double().requires_grad_()
    y = depthwise3x3(leaf, taps, bias)
    expected = reference.depthwise3x3(corner64, taps.double(), bias.double())
    assert (y[-1:, -63:, -63:].double() - expected[:, 1:, 1:]).abs().max() < 0.03 * expected.abs().max()
    (grad,) = torch.autograd.grad(y[-1:, inner, inner].sum(), leaf)
    (expected,) = torch.autograd.grad(expected[:, inner, inner].sum(), corner64)
    assert (grad[-1:, -64:, -64:].double() - expected).abs().max() < 0.03 * expected.abs().max()


needs_cuda_backend = pytest.mark.skipif(cuda.compiled is None, reason=cuda.version)


def whole_block(C: int, dtype: torch.dtype, seed: int = 0, **arguments) -> tuple[Block, torch.Tensor]:
    torch.manual_seed(seed)
    (h, w), head = cuda.CELLS[C]
    block = Block(C, C // head, (h, w), **arguments).cuda().to(dtype)
    x = torch.randn(3, C, 7 * h, 6 * w, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    return block, x


@needs_cuda_backend
@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_cuda_backend_is_near_the_reference(C, dtype, clusters, monkeypatch):
    if clusters and not cuda.has_clusters(torch.device("cuda")):
        pytest.skip("this GPU has no thread-block clusters")
    monkeypatch.setattr(cuda, "has_clusters", lambda device: clusters)
    calls = []
    for op in cuda.OPS:
        kernel = getattr(cuda, op)
        monkeypatch.setattr(cuda, op, lambda *args, op=op, kernel=kernel: [calls.append(op), kernel(*args)][1])
    block, x = whole_block(C, dtype, backend="cuda", layer_scale_init=0.5)
    exact = Block(C, block.attn.num_heads, block.attn.cell, backend="reference", layer_scale_init=0.5).double()
    exact.load_state_dict(block.state_dict())
    exact.cuda()
    results = []
    for module in (block, exact):
        leaf = x.to(module.pos_embed.weight.dtype).detach().requires_grad_()
        weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(leaf)
        module.train()
        y = module.add_attention(leaf)
        y.backward(weight)
        gradients = [p.grad.clone() for p in (*module.norm1.parameters(), *module.attn.parameters())]
        with torch.no_grad():
            ffn = module.eval().fuse().add_ffn(leaf)
        results.append([y - leaf, ffn - leaf, leaf.grad, *gradients])
    assert calls == ["super_token_attention", "conv_ffn"]
    for actual, expected in zip(*results, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@needs_cuda_backend
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_cuda_backend_gives_the_same_bits(C):
    block, x = whole_block(C, torch.bfloat16, backend="cuda")
    with torch.inference_mode():
        first = block.eval()(x)
        assert all(torch.equal(block(x), first) for _ in range(20))


@needs_cuda_backend
@torch.inference_mode()
def test_cuda_backend_in_a_graph():
    block, x = whole_block(64, torch.bfloat16, backend="cuda")
    block.eval()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        block(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    x.copy_(x.flip(-1).clone())
    graph.replay()
    assert torch.equal(y, block(x))


@needs_cuda_backend
@pytest.mark.parametrize("train", [False, True])
def test_cuda_backend_compiles_to_one_graph(train):
    block, x = whole_block(64, torch.bfloat16, backend="cuda")
    block.train(train)
    compiled = torch.compile(block, fullgraph=True)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), block(x), rtol=0.05, atol=0.05)


@needs_cuda_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@torch.inference_mode()
def test_cuda_backend_in_a_model(small, dtype, tolerance):
    x = goldens.image(1, (2, 3, 224, 224)).float().cuda()
    expected = small(x)
    model = timm.create_model("svit_small", backend="cuda").cuda().eval()
    model.load_state_dict(small.state_dict())
    with torch.autocast("cuda", dtype):
        error = (model.fuse()(x).float() - expected).abs().max() / expected.abs().max()
    assert error < tolerance


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@needs_cuda_backend
def test_cuda_backend_on_the_second_device():
    block, x = whole_block(64, torch.bfloat16, backend="cuda")
    with torch.inference_mode():
        expected = block.eval()(x)
        y = block.to("cuda:1")(x.to("cuda:1"))
    assert y.device.index == 1
    assert torch.equal(y.to("cuda:0"), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device(small, golden):
    x, expected = golden
    model = copy.deepcopy(small).to("cuda:1")
    with torch.inference_mode():
        logits = model(x.to("cuda:1"))
    assert logits.device.index == 1
    assert goldens.error(logits.cpu(), expected["logits"]) < 1e-3
