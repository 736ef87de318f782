"""The Triton kernels against the reference in float64, forward and backward: on a GPU, or interpreted on the CPU."""

import math

import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel

import goldens
import svit  # noqa: F401
from svit.layers import SuperTokenAttention
from svit.models.original import to_original
from svit.models.svit import Block
from svit.ops import aggregate, associate, bias_gelu_affine, depthwise3x3, reference, sample, spread, triton
from svit.ops.depthwise import triton as depthwise

PUBLISHED = [(64, (8, 8)), (96, (8, 8)), (128, (4, 4)), (192, (4, 4))]
GRIDS = [(1, 1), (1, 2), (3, 1), (2, 2), (3, 3), (4, 3)]

# (B, H, W, C, cell): every published pair with whole and with padded cells, then others.
SHAPES = [
    *((1, hh * h, ww * w, C, (h, w)) for C, (h, w) in PUBLISHED for hh, ww in GRIDS[::2]),
    *((1, hh * h - 3, ww * w - 1, C, (h, w)) for C, (h, w) in PUBLISHED for hh, ww in GRIDS[1::2]),
    (2, 5, 9, 64, (8, 8)),
    (1, 1, 1, 96, (8, 8)),
    (2, 7, 13, 16, (3, 5)),
    (1, 9, 4, 24, (3, 5)),
    (1, 5, 7, 8, (1, 3)),
    (1, 7, 5, 40, (5, 1)),
    (2, 14, 20, 48, (7, 7)),
    (1, 4, 4, 320, (2, 2)),
    (1, 3, 3, 8, (1, 1)),
    (1, 20, 18, 24, (16, 16)),
    (1, 14, 10, 128, (12, 12)),
    (1, 5, 5, 512, (4, 4)),
    (0, 8, 8, 64, (4, 4)),
]

# Largest error allowed, relative to the largest value.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = [dtype for dtype in TOLERANCE if dtype in triton.DTYPES]

# The interpreter takes its time: in 16 bit it gets every published pair once whole and once padded, and some others;
# what it leaves out of (iterations, norm) the drawn shapes have.
SAMPLINGS = [(1, True), (3, False)] if triton.INTERPRETED else [(1, False), (1, True), (3, False), (3, True)]
CASES = [
    pytest.param(shape, dtype, id=f"{shape}-{dtype}")
    for dtype in DTYPES
    for shape in (SHAPES[1::3] if triton.INTERPRETED and dtype.itemsize == 2 else SHAPES)
]


def random(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    error = (actual.detach().double().cpu() - expected.detach()).abs()
    assert error.numel() == 0 or error.max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=1e-3)


def leaves(*tensors: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors as leaves that require grad, and the same in float64 on the CPU."""
    ours = [t.detach().requires_grad_() for t in tensors]
    return ours, [t.detach().double().cpu().requires_grad_() for t in tensors]


def test_memory_is_poisoned(device):
    assert torch.empty(3, device=device).isnan().all()
    assert torch.empty(3, device=device).new_empty(5, dtype=torch.float16).isnan().all()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_associate_aggregate_spread(shape, dtype, device, launches):
    B, H, W, C, cell = shape
    x = random(B, H, W, C, seed=0, device=device, dtype=dtype)
    hh, ww = math.ceil(H / cell[0]), math.ceil(W / cell[1])
    s = random(B, hh, ww, C, seed=1, device=device, dtype=dtype)
    q = associate(x, s, cell, backend="triton")
    assert q.dtype == dtype
    assert_close(q, reference.associate(x.double().cpu(), s.double().cpu(), cell), dtype)

    (x, s), (x64, s64) = leaves(x, s)
    q64 = q.double().cpu()
    total, mass = aggregate(x, q, cell, backend="triton")
    total64, mass64 = reference.aggregate(x64, q64, cell)
    assert total.dtype == mass.dtype == torch.float32
    assert_close(total, total64, dtype)
    assert_close(mass, mass64, dtype)

    y = spread(s, q, cell, (H, W), residual=x, backend="triton")
    y64 = reference.spread(s64, q64, cell, (H, W), x64)
    assert_close(y, y64, dtype)

    weights = random(*total.shape, seed=2, device=device), random(*y.shape, seed=3, device=device, dtype=dtype)
    grads = torch.autograd.grad([total, y], [x, s], weights)
    grads64 = torch.autograd.grad([total64, y64], [x64, s64], [w.double().cpu() for w in weights])
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert_close(grad, grad64, dtype)
    if B:
        assert launches == [
            "associate_aggregate", "associate_aggregate", "fold", "spread",
            "associate_aggregate", "fold", "spread",
        ]  # fmt: skip


def check_sample(shape, n_iter: int, norm: bool, dtype: torch.dtype, device: str) -> None:
    B, H, W, C, cell = shape
    tensors = [random(B, H, W, C, seed=4, device=device, dtype=dtype)]
    if norm:
        tensors += [1 + 0.2 * random(C, seed=5, device=device), 0.2 * random(C, seed=6, device=device)]
    ours, theirs = leaves(*tensors)
    s, q = sample(ours[0], cell, n_iter, *(ours[1:] or (None, None)), backend="triton")
    s64, q64, _ = reference.sample(theirs[0], cell, n_iter, *(theirs[1:] or (None, None)))
    assert not q.requires_grad
    assert_close(q, q64, dtype)
    assert_close(s, s64, dtype)
    weights = random(*s.shape, seed=7, device=device, dtype=dtype)
    grads = torch.autograd.grad(s, ours, weights)
    for grad, grad64 in zip(grads, torch.autograd.grad(s64, theirs, weights.double().cpu()), strict=True):
        assert_close(grad, grad64, dtype)


@pytest.mark.parametrize(("n_iter", "norm"), SAMPLINGS, ids=lambda v: str(v))
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_sample(shape, n_iter, norm, dtype, device, launches):
    check_sample(shape, n_iter, norm, dtype, device)
    if shape[0]:
        backward = "norm_sample_backward" if norm else "spread"
        assert launches == ["cell_mean", *["associate_aggregate", "fold"] * n_iter, backward]


@settings(deadline=None, max_examples=25)
@given(
    B=st.integers(0, 2),
    H=st.integers(1, 14),
    W=st.integers(1, 14),
    C=st.integers(1, 12).map(lambda n: 8 * n),
    h=st.integers(3, 9),
    w=st.integers(3, 9),
    n_iter=st.integers(1, 2),
    norm=st.booleans(),
)
def test_sample_of_any_shape(B, H, W, C, h, w, n_iter, norm):
    check_sample(
        (B, H, W, C, (h, w)), n_iter, norm, torch.float32, "cuda" if torch.cuda.is_available() else "cpu"
    )  # fmt: skip


def check_depthwise(shape, gelu: bool, dtype: torch.dtype, device: str) -> None:
    C = shape[-1]
    ours, theirs = leaves(
        random(*shape, seed=8, device=device, dtype=dtype),
        random(C, 1, 3, 3, seed=9, device=device),
        random(C, seed=10, device=device),
    )
    y = depthwise3x3(*ours, gelu, backend="triton")
    y64 = reference.depthwise3x3(*theirs, gelu)
    assert y.dtype == dtype
    assert_close(y, y64, dtype)
    weights = random(*shape, seed=11, device=device, dtype=dtype)
    grads = torch.autograd.grad(y, ours, weights)
    for grad, grad64 in zip(grads, torch.autograd.grad(y64, theirs, weights.double().cpu()), strict=True):
        assert_close(grad, grad64, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 8), (2, 1, 9, 16), (2, 9, 1, 24), (1, 7, 7, 64), (1, 16, 15, 96), (2, 30, 33, 40), (0, 4, 4, 8),
     (1, 3, 2, 1280), (1, 60, 17, 8)],
    ids=str,
)  # fmt: skip
def test_depthwise(shape, gelu, dtype, device, launches):
    check_depthwise(shape, gelu, dtype, device)
    if shape[0]:
        assert launches == ["depthwise", "depthwise", "depthwise_taps"]


@settings(deadline=None, max_examples=15)
@given(
    B=st.integers(0, 2),
    H=st.integers(1, 40),
    W=st.integers(1, 40),
    C=st.integers(1, 10).map(lambda n: 8 * n),
    gelu=st.booleans(),
)
def test_depthwise_of_any_shape(B, H, W, C, gelu):
    check_depthwise((B, H, W, C), gelu, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")


def test_gelu_far_from_zero(device):
    # Nothing but the centre: y = 2 u, whose gradient is twice the slope.
    x = torch.linspace(-12, 12, 4096).reshape(1, 32, 16, 8).to(device).requires_grad_()
    weight = torch.zeros(8, 1, 3, 3, device=device)
    weight[:, :, 1, 1] = 1
    y = depthwise3x3(x, weight, torch.zeros(8, device=device), gelu=True, backend="triton")
    y.sum().backward()
    x64 = x.detach().double().cpu().requires_grad_()
    y64 = 2 * torch.nn.functional.gelu(x64)
    y64.sum().backward()
    torch.testing.assert_close(y.double().cpu(), y64, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(x.grad.double().cpu(), x64.grad, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16] if triton.INTERPRETED else [torch.float16, torch.bfloat16], ids=str)
def test_gelu_of_all_16_bit_values(dtype, device):
    """The sigmoid is right to 2.6e-5, its derivative to 1.1e-4; the result is then rounded."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    x = torch.cat([x, x.new_zeros(-len(x) % (15 * 64))]).reshape(1, -1, 15, 64).to(device).requires_grad_()
    weight = torch.zeros(64, 1, 3, 3, device=device)
    weight[:, :, 1, 1] = -0.5  # u - u / 2, which does not overflow
    y = depthwise3x3(x, weight, torch.zeros(64, device=device), gelu=True, backend="triton")
    y.backward(torch.full_like(y, 2.0))
    x64 = x.detach().double().cpu().requires_grad_()
    y64 = torch.nn.functional.gelu(x64)
    y64.sum().backward()
    rounding = torch.finfo(dtype).eps / 2
    for actual, expected, error in ((2 * y.double().cpu(), y64, 2.6e-5), (x.grad.double().cpu(), x64.grad, 1.1e-4)):
        smallest = 2 * torch.finfo(dtype).smallest_normal * rounding
        assert ((actual - expected).abs() <= error + smallest + 1.01 * rounding * expected.abs()).all()


def test_gelu_of_no_number(device):
    x = torch.tensor([math.inf, -math.inf, math.nan] * 8, dtype=torch.float16, device=device).reshape(1, 3, 1, 8)
    zero, one = torch.zeros(8, device=device), torch.ones(8, device=device)
    y = bias_gelu_affine(x, zero, one, zero, backend="triton").flatten().cpu()
    expected = torch.nn.functional.gelu(x.double().cpu()).flatten()
    assert (y.isnan() | (y == expected) | expected.isnan()).all()
    assert not y[1::3].isfinite().any()
    assert not y[2::3].isfinite().any()


@pytest.mark.parametrize("dtype", [*DTYPES, *([torch.float16] if triton.INTERPRETED else [])], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32", "same"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 8), (2, 7, 9, 32), (1, 19, 14, 48), (1, 8, 8, 64), (2, 5, 7, 96), (1, 9, 5, 136), (1, 2, 2, 1280),
     (0, 4, 4, 8)],
    ids=str,
)  # fmt: skip
def test_bias_gelu_affine(shape, parameters, dtype, device, launches):
    C = shape[-1]
    x = random(*shape, seed=31, device=device, dtype=dtype)
    tensors = [random(C, seed=i, device=device, dtype=parameters or dtype) for i in (32, 33, 34)]
    y = bias_gelu_affine(x, *tensors, backend="triton")
    assert y.dtype == dtype
    assert_close(y, reference.bias_gelu_affine(x.double().cpu(), *(t.double().cpu() for t in tensors)), dtype)
    if shape[0]:
        assert launches == ["bias_gelu_affine"]


def test_settings_of_strips_may_be_others(device, monkeypatch):
    x, weight = random(2, 9, 20, 16, seed=35, device=device), random(16, 1, 3, 3, seed=36, device=device)
    results = []
    for columns, warps, rows in ((16, 2, 28), (8, 1, 3), (32, 1, 9)):
        for kernel in ("depthwise", "depthwise_taps"):
            monkeypatch.setitem(depthwise.STRIP_SETTINGS, (kernel, 16, 4), (columns, warps, rows))
            assert depthwise.strip_launch(kernel, x)[-1]["BLOCK_W"] == columns
        y = triton.BACKEND.depthwise3x3(x, weight, weight[:, 0, 0, 0].contiguous(), True)
        results.append([y, *triton.BACKEND.depthwise3x3_backward(x, x, weight, True)])
    for others in results[1:]:
        for t, other in zip(results[0], others, strict=True):
            torch.testing.assert_close(t, other, rtol=1e-5, atol=1e-4)


def test_strided_and_expanded_inputs(device):
    x = random(1, 64, 9, 10, seed=12, device=device).permute(0, 2, 3, 1)  # NCHW in memory
    s, q = sample(x, (4, 4), backend="triton")
    s64, q64, _ = reference.sample(x.double().cpu(), (4, 4))
    assert_close(s, s64, torch.float32)
    s.requires_grad_()
    spread(s, q, (4, 4), (9, 10), backend="triton").sum().backward()  # a gradient of stride 0
    expected = reference.aggregate(torch.ones(1, 9, 10, 64).double(), q64, (4, 4))[0]
    assert_close(s.grad, expected, torch.float32)


def test_runs_are_equal_bit_by_bit(device):
    def run():
        tensors = [
            random(2, 19, 21, 64, seed=13, device=device),
            *(random(64, seed=i, device=device) for i in (14, 15)),
        ]
        taps, bias = random(64, 1, 3, 3, seed=16, device=device), random(64, seed=17, device=device)
        leaf = [t.requires_grad_() for t in (*tensors, taps, bias)]
        s, q = sample(leaf[0], (8, 8), 2, leaf[1], leaf[2], backend="triton")
        y = spread(s, q, (8, 8), (19, 21), residual=leaf[0], backend="triton")
        y = depthwise3x3(y, leaf[3], leaf[4], gelu=True, backend="triton")
        return [y, *torch.autograd.grad(y, leaf, random(*y.shape, seed=18, device=device))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("number", goldens.STA_CASES)
def test_golden_attention(number, device, launches):
    case = goldens.load(f"sta_case{number}")
    dim, heads, h, w, n_iter = case["meta"].tolist()
    if dim % 8:
        with pytest.raises(ValueError, match="multiple of 8 channels"):
            SuperTokenAttention(dim, heads, (h, w), n_iter, backend="triton").to(device)(
                torch.from_numpy(case["x"]).float().to(device)
            )
        return
    layer = SuperTokenAttention(dim, heads, (h, w), n_iter, backend="triton")
    names = {name: f"stoken_refine.{name}" for name in layer.state_dict()}
    layer.load_state_dict(
        {k: torch.from_numpy(goldens.tensor(v, tuple(layer.state_dict()[k].shape))) for k, v in names.items()}
    )
    layer.to(device)
    x = torch.from_numpy(case["x"]).float().to(device).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(case["gy"]).float().to(device))
    assert goldens.error(y.cpu(), case["y"]) < 1e-5
    assert goldens.error(x.grad.cpu(), case["gx"]) < 1e-5
    for name, parameter in layer.named_parameters():
        assert goldens.error(parameter.grad.cpu(), case[f"g/stoken_refine.{name}"]) < 1e-5
    assert ("spread" in launches) == ((h, w) != (1, 1))


def test_block_takes_norm_scale_drop_path_and_residual_in(device, launches):
    def block(backend):
        torch.manual_seed(0)
        return Block(16, 2, (3, 4), 2, layer_scale_init=0.5, drop_path=0.4, backend=backend).to(device).train()

    ours, theirs = block("triton"), block("reference")
    x = random(6, 16, 7, 9, seed=19, device=device)
    outputs = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)  # the same paths are dropped
        y = module(leaf)
        y.backward(random(*y.shape, seed=20, device=device))
        outputs.append([y, leaf.grad, *(p.grad for p in module.parameters())])
        if module is ours:
            assert {"cell_mean", "associate_aggregate", "fold", "spread", "norm_sample_backward"} < set(launches)
            launches.clear()
    assert not launches
    for ours, theirs in zip(*outputs, strict=True):
        assert_close(ours, theirs.double().cpu(), torch.float32)


def test_hooks_are_not_gone_round(device, launches):
    block = Block(16, 2, 4, backend="triton").to(device).eval()
    seen = []
    block.norm1.register_forward_hook(lambda module, inputs, output: seen.append("norm1"))
    block.mlp.act.register_forward_hook(lambda module, inputs, output: seen.append("act"))
    block(random(1, 16, 8, 8, seed=21, device=device))
    assert seen == ["norm1", "act"]
    assert launches == ["depthwise", "cell_mean", "associate_aggregate", "fold", "spread", "depthwise"]


@pytest.mark.parametrize(("mode", "seed", "batch"), [("eval", 7, 2), ("train", 8, 4)])
def test_golden_gradients(mode, seed, batch, device, launches, monkeypatch):
    if triton.INTERPRETED:  # a program takes as long for many pixels as for few
        monkeypatch.setattr(depthwise, "COLUMNS", 32)
        monkeypatch.setattr(depthwise, "STRIP_WARPS", {"depthwise": 256, "depthwise_taps": 256})
        monkeypatch.setattr(depthwise, "LAUNCHED_WARPS", 1)
    golden = goldens.load(f"stvit_small_grads_{mode}_96")
    model = timm.create_model("svit_small", backend="triton")
    model.load_state_dict(goldens.state_dict("small"))
    model.train(mode == "train").to(device)
    x = goldens.image(seed, (batch, 3, 96, 96)).float().to(device).requires_grad_()
    logits = model(x)
    (logits * goldens.image(100 + seed, tuple(logits.shape)).to(device)).sum().backward()
    assert goldens.error(logits.cpu(), golden["logits"]) < 1e-4
    assert goldens.error(x.grad[:, :, :16, :16].cpu(), golden["grad_input_corner"]) < 1e-3
    norms = to_original({k: p.grad.norm() for k, p in model.named_parameters()})
    expected = {k.removeprefix("gn/"): v for k, v in golden.items() if k.startswith("gn/")}
    for name, value in expected.items():
        assert abs(norms[name].item() - value) <= 1e-4 * max(expected.values()), name
    assert set(launches) == {
        "cell_mean", "associate_aggregate", "fold", "spread", "norm_sample_backward", "depthwise", "depthwise_taps",
    }  # fmt: skip


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_opcheck(norm, device):
    x, weight, bias = (random(*s, seed=22, device=device).requires_grad_() for s in [(1, 7, 6, 16), (16,), (16,)])
    parameters = (weight, bias) if norm else (None, None)
    with torch.no_grad():
        s, q, mass = torch.ops.svit.sample(x, [4, 4], 1, *parameters, 1e-6, "triton")
    s.requires_grad_()
    taps = random(16, 1, 3, 3, seed=23, device=device).requires_grad_()
    ops = torch.ops.svit
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(ops.sample.default, (x, [4, 4], 2, *parameters, 1e-6, "triton"), test_utils=checks)
    opcheck(
        ops.sample_backward.default,
        (s.detach(), x.detach(), q, mass, [4, 4], weight.detach() if norm else None, 1e-6, "triton"),
    )
    opcheck(ops.associate.default, (x.detach(), s.detach(), [4, 4], "triton"))
    opcheck(ops.aggregate.default, (x, q, [4, 4], "triton"), test_utils=checks)
    opcheck(ops.spread.default, (s, q, [4, 4], [7, 6], x if norm else None, "triton"), test_utils=checks)
    opcheck(ops.depthwise3x3.default, (x, taps, bias, norm, "triton"), test_utils=checks)
    opcheck(ops.depthwise3x3_backward.default, (x.detach(), x.detach(), taps.detach(), norm, "triton"))
    opcheck(ops.bias_gelu_affine.default, (x.detach(), *[bias.detach()] * 3, "triton"))


def test_compiled_model_is_one_graph(device, launches):
    model = timm.create_model("test_svit", backend="triton", layer_scale_init=0.1).to(device)
    x = random(2, 3, 40, 36, seed=24, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    results = []
    for module in (model, compiled):
        model.zero_grad()
        module(x).sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
        assert "norm_sample_backward" in launches
        launches.clear()
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentry", ["checkpointed", "twice"])
def test_whole_step_again(reentry, device, launches):
    torch.manual_seed(0)
    model = timm.create_model("test_svit", backend="triton").to(device).train()
    x = random(2, 3, 33, 40, seed=25, device=device)
    results = []
    for checkpointed in (False, reentry == "checkpointed"):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        model(x).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert launches.count("cell_mean") == (6 if reentry == "checkpointed" else 4)
    for first, second in zip(*results, strict=True):
        if device == "cpu":
            assert torch.equal(first, second)
        else:  # PyTorch's own convolutions and attention need not be reproducible on a GPU
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def change_norm(block):
    block.norm1 = timm.layers.LayerNorm2d(16, affine=False)


def change_forward(block):
    forward = block.norm1.forward
    block.norm1.forward = lambda x: 2 * forward(x)


def change_scale(block):
    block.ls1 = torch.nn.Tanh()


def change_attention(block):
    block.attn = torch.nn.Identity()


def change_dropout(block):
    block.mlp.drop1 = torch.nn.Identity()


def change_backward(block):
    block.norm1.register_full_backward_hook(lambda module, grad_in, grad_out: None)


@pytest.mark.parametrize(
    "change", [change_norm, change_forward, change_scale, change_attention, change_dropout, change_backward]
)
def test_changed_blocks_compute_what_they_were_changed_to(change, device):
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        block = Block(16, 2, 4, backend=backend)
        change(block)
        results.append(block.to(device).train()(random(2, 16, 8, 8, seed=26, device=device)))
    assert_close(results[0], results[1].double().cpu(), torch.float32)


def test_dropout_that_is_left_on_drops(device):
    block = Block(16, 2, 4, proj_drop=0.5, backend="triton").to(device).eval()
    x = random(1, 16, 8, 8, seed=27, device=device)
    with torch.no_grad():
        assert torch.equal(block(x), block(x))
        block.mlp.drop1.train()
        assert not torch.equal(block(x), block(x))


def test_norm_of_nothing_has_no_part_in_the_gradient(device):
    x = random(1, 5, 5, 16, seed=28, device=device).requires_grad_()
    weight, bias = torch.ones(16, device=device).requires_grad_(), torch.zeros(16, device=device).requires_grad_()
    s, _ = sample(x, (4, 4), 1, weight, bias, eps=0.0, backend="triton")
    s.square().sum().backward()
    assert weight.grad.isfinite().all()


def test_residual_stream_keeps_its_dtype_under_autocast(device):
    for backend in ("triton", "reference"):
        block = Block(16, 2, 4, layer_scale_init=1e-6, backend=backend).to(device)
        x = random(1, 16, 8, 8, seed=29, device=device)
        if device == "cuda":
            with torch.autocast("cuda", torch.bfloat16):
                assert block(x).dtype == block.pos_embed(x).dtype == torch.float32
        else:  # in float16, which the interpreter computes
            with torch.autocast("cpu", torch.float16):
                assert block(x).dtype == block.pos_embed(x).dtype == torch.float32


def test_distributed_step(device, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = timm.create_model("test_svit", backend="triton").to(device)
        x = random(2, 3, 33, 40, seed=30, device=device)
        model(x).sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        DistributedDataParallel(model)(x).sum().backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()
