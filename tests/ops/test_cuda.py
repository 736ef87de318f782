"""The CUDA backend's side in Python: when it serves, what it hands to the kernels, and the ops of whole half-blocks."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from svit.models.svit import Block
from svit.ops import _dispatch, cuda, reference
from svit.ops import conv_ffn as public_conv_ffn
from svit.ops import super_token_attention as public_attention

CELL = (8, 8)


def random(*shape: int, seed: int = 0, scale: float = 1, plus: float = 0, dtype=torch.float64) -> torch.Tensor:
    return (plus + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def attention_arguments(B=2, H=16, W=24, C=64, dtype=torch.float64, scaled=True):
    parameters = [
        random(C, seed=1, scale=0.2, plus=1), random(C, seed=2, scale=0.2), 1e-6,
        random(3 * C, C, seed=3, scale=2 * C**-0.5), random(3 * C, seed=4, scale=0.3),
        random(C, C, seed=5, scale=C**-0.5), random(C, seed=6, scale=0.3),
    ]  # fmt: skip
    parameters = [p.to(dtype) if torch.is_tensor(p) else p for p in parameters]
    scale = random(B, C, seed=7, scale=0.3, plus=1, dtype=dtype) if scaled else None
    return random(B, H, W, C, dtype=dtype), CELL, *parameters, scale


def ffn_arguments(B=2, H=5, W=7, C=64, dtype=torch.float64):
    shapes = [(B, H, W, C), (B, H, W, C), (4 * C, C), (4 * C,), (4 * C, 1, 3, 3), (4 * C,), (C, 4 * C), (C,)]
    return [random(*shape, seed=i, scale=0.3, dtype=dtype) for i, shape in enumerate(shapes)]


@pytest.fixture
def stand_in(monkeypatch):
    """The backend as if it had been compiled and served any device; the reference computes."""
    calls = []

    def run(op):
        def implementation(*args):
            calls.append(op)
            return getattr(reference, op)(*args)

        return implementation

    def usable(op, x, cell=(1, 1), num_heads=1, hidden=0, **_):
        return cuda.fits(op, tuple(x.shape), tuple(cell), num_heads, hidden)

    module = SimpleNamespace(OPS=cuda.BACKEND.OPS, usable=usable, **{op: run(op) for op in cuda.BACKEND.OPS})
    monkeypatch.setattr(_dispatch, "BACKENDS", {"cuda": module, "triton": _dispatch.BACKENDS["triton"]})
    return calls


@pytest.mark.parametrize(
    ("op", "shape", "options", "reason"),
    [
        ("super_token_attention", (1, 56, 56, 64), dict(cell=(8, 8), num_heads=1), ""),
        ("super_token_attention", (1, 28, 28, 192), dict(cell=(4, 4), num_heads=3), ""),
        ("super_token_attention", (1, 56, 56, 96), dict(cell=(8, 8), num_heads=2), ""),
        ("super_token_attention", (0, 8, 64, 64), dict(cell=(8, 8), num_heads=1), ""),
        ("super_token_attention", (1, 56, 56, 80), dict(cell=(8, 8), num_heads=1), "192 channels, not for 80"),
        ("super_token_attention", (1, 56, 56, 64), dict(cell=(4, 4), num_heads=1), "8 x 8 and 1 heads, not (4, 4)"),
        ("super_token_attention", (1, 56, 56, 64), dict(cell=(8, 8), num_heads=2), "and 1 heads, not (8, 8) and 2"),
        ("super_token_attention", (1, 55, 56, 64), dict(cell=(8, 8), num_heads=1), "of 8 x 8, not a map of 55 x 56"),
        ("super_token_attention", (1, 56, 72, 64), dict(cell=(8, 8), num_heads=1), "8 x 8 cells, not for 7 x 9"),
        ("conv_ffn", (1, 5, 7, 128), dict(hidden=512), ""),
        ("conv_ffn", (1, 5, 7, 128), dict(hidden=384), "expands 128 channels to 512, not to 384"),
        ("conv_ffn", (1, 5, 7, 320), dict(hidden=1280), "not for 320"),
    ],
)  # fmt: skip
def test_fits(op, shape, options, reason):
    options = {"cell": (1, 1), "num_heads": 1, "hidden": 0, **options}
    served, why = cuda.fits(op, shape, **options)
    assert served == (not reason)
    assert reason in why


def test_usable_says_why_not(monkeypatch):
    x = torch.empty(1, 56, 56, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(cuda, "compiled", None)
    assert cuda.usable("conv_ffn", x, hidden=256) == (False, cuda.version)
    monkeypatch.setattr(cuda, "compiled", object())
    assert cuda.usable("conv_ffn", x, hidden=256) == (False, "x is on cpu, it runs on GPUs")
    with FakeTensorMode():
        x = torch.empty(1, 56, 56, 64, device="cuda")
        assert cuda.usable("conv_ffn", x, hidden=256)[1] == "it computes in float16 and bfloat16, not in torch.float32"
        if not torch.cuda.is_available():
            assert cuda.usable("conv_ffn", x.bfloat16(), hidden=256) == (True, "")


@pytest.fixture
def device(monkeypatch):
    """A GPU with clusters, and a compiled library that answers for it; both can be changed."""
    device = SimpleNamespace(capability=(9, 0), bytes=227 * 1024, clusters=33, asked=[])

    def most(*sizes):
        device.asked.append(sizes)
        return device.clusters

    table = {(64, 7, 7, True): 97 * 1024, (64, 7, 7, False): 93 * 1024}
    library = SimpleNamespace(svit_attention_max_active_clusters=most)
    monkeypatch.setattr(cuda, "compiled", cuda.Compiled(True, table, {64: 47 * 1024}, library))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device.capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=device.bytes)
    )
    cuda.ask_max_active_clusters.cache_clear()
    yield device
    cuda.ask_max_active_clusters.cache_clear()


def test_a_device_is_asked_once_for_its_clusters(device):
    assert (
        cuda.max_active_clusters(64, 7, 6, "cuda:0")
        == cuda.max_active_clusters(64, 7, 6, torch.device("cuda", 0))
        == 33
    )
    assert device.asked == [(64, 8, 8, 7, 6, 0)]
    device.clusters = 0
    assert cuda.max_active_clusters(64, 7, 6, "cuda:0") == 33
    assert cuda.max_active_clusters(192, 7, 6, "cuda") == 0
    assert device.asked[1:] == [(192, 4, 4, 7, 6, 1)]
    device.capability = (8, 9)
    assert cuda.max_active_clusters(64, 7, 6, "cuda:0") == 0
    assert len(device.asked) == 2


def test_clusters_that_do_not_fit_are_not_launched(device, monkeypatch):
    sizes = dict(cell=(8, 8), num_heads=1)
    launched = []
    monkeypatch.setattr(cuda, "aligned", lambda t: t)
    monkeypatch.setattr(
        torch.ops, "svit_cuda", SimpleNamespace(super_token_attention=lambda *args: launched.append(args[11]))
    )

    def launch():
        with FakeTensorMode():
            x, cell, *parameters, scale = attention_arguments(B=1, H=56, W=56, dtype=torch.float32)
            x = x.bfloat16().to("cuda:0")
            answer = cuda.usable("super_token_attention", x, **sizes)
            cuda.BACKEND.super_token_attention(
                x, cell, *(p.to("cuda:0") if torch.is_tensor(p) else p for p in parameters), None, 1, False
            )
        return answer

    assert launch() == (True, "")
    device.clusters = 0
    cuda.ask_max_active_clusters.cache_clear()
    assert launch() == (True, "")
    assert launched == [True, False]  # one block an image instead
    device.bytes = 90 * 1024
    answer, why = launch()
    assert not answer
    assert why == (
        "this GPU cannot run a cluster of 7 blocks at once, and without clusters "
        "a block wants 95232 bytes of shared memory, this GPU has 92160"
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((80, 7, 7), "C: expected one of 64, 96, 128, 192, got 80"),
        ((64, 0, 7), "rows: expected 1 to 8 cells, got 0"),
        ((64, 7, 9), "columns: expected 1 to 8 cells, got 9"),
    ],
)
def test_clusters_of_other_sizes_are_named(device, sizes, message):
    with pytest.raises(ValueError, match=message):
        cuda.max_active_clusters(*sizes, "cuda")


def test_without_kernels_there_are_no_clusters_to_ask_for(monkeypatch):
    monkeypatch.setattr(cuda, "compiled", None)
    with pytest.raises(RuntimeError, match=re.escape(cuda.version)):
        cuda.max_active_clusters(64, 7, 7, "cuda")


def test_it_is_not_chosen_unless_asked_for(stand_in):
    x = torch.empty(1, 56, 56, 64)
    assert _dispatch.choose("conv_ffn", x, hidden=256) == "reference"
    assert _dispatch.usable("cuda", "conv_ffn", x, hidden=256) == (False, _dispatch.OPT_IN["cuda"])
    assert _dispatch.choose("conv_ffn", x, "cuda", hidden=256) == "cuda"
    with pytest.raises(ValueError, match="backend: 'cuda' cannot run conv_ffn here: it expands 64 channels to 256"):
        _dispatch.choose("conv_ffn", x, "cuda", hidden=128)
    assert _dispatch.choose("conv_ffn", x, "cuda", strict=False, hidden=128) == "reference"
    # It has no parts: to ask for it there leaves the choice.
    assert _dispatch.choose("sample", x, "cuda") == _dispatch.choose("sample", x)


def test_info_says_that_it_must_be_asked_for(stand_in, capsys):
    _dispatch.info()
    assert f"fused half-block -> reference, not cuda: {_dispatch.OPT_IN['cuda']}" in capsys.readouterr().out


def test_attention_is_the_composition(stand_in):
    *arguments, scale = attention_arguments()
    y = public_attention(*arguments, 1, scale, "cuda")
    assert stand_in == ["super_token_attention"]
    torch.testing.assert_close(public_attention(*arguments, 1, scale), y)
    torch.testing.assert_close(public_attention(*arguments, 1, scale, "reference"), y)
    assert stand_in == ["super_token_attention"]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_gradients_of_attention_are_autograds(stand_in, monkeypatch, scaled, heads):
    monkeypatch.setattr(_dispatch.BACKENDS["cuda"], "usable", lambda *_, **__: (True, ""))
    *arguments, scale = attention_arguments(H=13, W=17, scaled=scaled)
    leaves = [t.requires_grad_() for t in (*arguments, scale) if torch.is_tensor(t)]
    weight = random(*arguments[0].shape, seed=9)
    results = []
    for backend in ("cuda", "reference"):
        y = public_attention(*arguments, heads, scale, backend)
        results.append(torch.autograd.grad(y, leaves, weight))
    assert stand_in == ["super_token_attention"]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_wide_under_autocast(stand_in):
    *arguments, scale = attention_arguments(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (*arguments, scale) if torch.is_tensor(t)]
    y = public_attention(*arguments, 1, scale, "cuda")
    weight = random(*y.shape, seed=9, dtype=torch.float32)
    expected = torch.autograd.grad(y, leaves, weight, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(y, leaves, weight)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_there_is_no_second_derivative(stand_in):
    *arguments, scale = attention_arguments()
    x = arguments[0].requires_grad_()
    y = public_attention(*arguments, 1, scale, "cuda")
    with pytest.raises(RuntimeError, match="svit::super_token_attention has no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_forward_mode_takes_the_reference(stand_in):
    arguments = ffn_arguments(dtype=torch.float64)

    def f(backend):
        def run(x):
            with torch.no_grad():
                return public_conv_ffn(x, *arguments[1:], backend)

        return torch.func.jvp(run, tuple(arguments[:1]), tuple(arguments[1:2]))

    for actual, expected in zip(f("cuda"), f("reference"), strict=True):
        torch.testing.assert_close(actual, expected)
    assert f("cuda")[1].abs().sum() > 0
    assert not stand_in


def test_wholes_are_not_for_those_who_ask_for_another_backend(stand_in, monkeypatch):
    monkeypatch.setattr(_dispatch, "OPT_IN", {})
    x = torch.empty(1, 56, 56, 64)
    assert _dispatch.choose("conv_ffn", x, hidden=256) == "cuda"
    assert _dispatch.choose("conv_ffn", x, "triton", hidden=256) == "reference"


def test_an_empty_batch_passes(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.ops, "svit_cuda", SimpleNamespace(super_token_attention=lambda *args: seen.append(args)))
    monkeypatch.setattr(cuda, "max_active_clusters", lambda *_: 0)
    x, cell, *parameters, scale = attention_arguments(B=0, dtype=torch.float32)
    y = cuda.BACKEND.super_token_attention(x.half(), cell, *parameters, scale, 1, False)[0]
    assert y.shape == x.shape
    assert seen[0][14].shape == (0, 2, 3, 9, 64)  # q, without which that kernel refuses to run


def test_nothing_is_kept_without_gradients(stand_in):
    *arguments, scale = attention_arguments()
    y, *kept = torch.ops.svit.super_token_attention(*arguments, scale, 1, False, "cuda")
    assert [t.numel() for t in kept] == [0, 0, 0]
    leaf = arguments[0].requires_grad_()
    y = torch.ops.svit.super_token_attention(leaf, *arguments[1:], scale, 1, False, "cuda")[0]
    with pytest.raises(RuntimeError, match="saves no tensors for a backward"):
        y.sum().backward()


def test_conv_ffn_is_the_composition(stand_in):
    arguments = ffn_arguments()
    y = public_conv_ffn(*arguments, "cuda")
    assert stand_in == ["conv_ffn"]
    torch.testing.assert_close(public_conv_ffn(*arguments), y)
    arguments[0].requires_grad_()
    assert public_conv_ffn(*arguments, "cuda").requires_grad  # a gradient is wanted: the parts have one
    assert stand_in == ["conv_ffn"]
    with pytest.raises(RuntimeError, match="svit::conv_ffn is for inference"):
        torch.ops.svit.conv_ffn(*arguments, "cuda").sum().backward()


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(stand_in, keep):
    *arguments, scale = attention_arguments(B=1, H=8, W=16)
    op = torch.ops.svit.super_token_attention.default
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if keep:
        arguments[0].requires_grad_()
    opcheck(op, (*arguments, scale, 1, keep, "cuda"), test_utils=checks if keep else checks[:2])
    opcheck(torch.ops.svit.conv_ffn.default, (*ffn_arguments(B=1), "cuda"), test_utils=checks[:2])


def test_kernels_get_what_they_read(monkeypatch):
    """Weights in the dtype of x, the rest in it or in float32, results to write into; on a fake GPU of either kind."""
    seen = {}
    calls = SimpleNamespace(**{op: lambda *args, op=op: seen.__setitem__(op, args) for op in cuda.BACKEND.OPS})
    monkeypatch.setattr(torch.ops, "svit_cuda", calls)
    monkeypatch.setattr(cuda, "aligned", lambda t: t)
    for clusters in (True, False):
        monkeypatch.setattr(cuda, "max_active_clusters", lambda *_, clusters=clusters: 20 * clusters)
        for keep in (True, False):
            with FakeTensorMode():
                x, cell, *parameters, scale = attention_arguments(dtype=torch.float32)
                y, s, q, mass = cuda.BACKEND.super_token_attention(x.bfloat16(), cell, *parameters, scale, 1, keep)
            args = seen["super_token_attention"]
            assert [a.dtype for a in args if isinstance(a, torch.Tensor)][:8] == [
                torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.float32, torch.bfloat16,
                torch.float32, torch.float32,
            ]  # fmt: skip
            assert args[9:12] == (8, 8, clusters)
            assert y.shape == x.shape
            assert (args[14] is None) == (clusters and not keep)
            assert [t.numel() > 0 for t in (s, q, mass)] == [keep] * 3
            if keep:
                assert s.shape == (2, 2, 3, 64)
                assert q.shape == (2, 2, 3, 9, 64)
                assert mass.shape == (2, 2, 3)
                assert mass.dtype == torch.float32
    with FakeTensorMode():
        cuda.BACKEND.conv_ffn(*(t.half() if t.dim() == 4 and t.shape[-1] == 64 else t for t in ffn_arguments()))
    half = [a.dtype == torch.float16 for a in seen["conv_ffn"]]
    assert half == [True, True, True, False, False, False, True, False, True]


def test_flops_are_those_of_the_parts(stand_in):
    pytest.importorskip("triton")  # else the formulas are left out
    *arguments, scale = attention_arguments(dtype=torch.float32)
    ffn = ffn_arguments(dtype=torch.float32)
    counts = []
    for backend in ("cuda", "reference"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            public_attention(*arguments, 1, scale, backend)
            public_conv_ffn(*ffn, backend)
        counts.append(counter.get_total_flops())
    # PyTorch does not count scaled_dot_product_attention on a CPU: two products, of 6 x 6 super tokens in 2 images.
    assert counts[0] == counts[1] + 2 * 2 * 2 * 6 * 6 * 64
    assert stand_in == ["super_token_attention", "conv_ffn"]


def test_addresses_are_aligned():
    memory = torch.arange(65.0)
    shifted = memory[1:]
    assert cuda.aligned(memory) is memory
    assert cuda.aligned(shifted).data_ptr() % 16 == 0
    assert torch.equal(cuda.aligned(shifted), shifted)
    # Kernels read two parameters at once.
    assert cuda.parameter(shifted, memory).data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (2, (63,), "norm_weight: expected \\[64\\], got \\[63\\]"),
        (5, (64, 64), "qkv_weight: expected \\[192, 64\\], got \\[64, 64\\]"),
        (8, (1,), "proj_bias: expected \\[64\\], got \\[1\\]"),
        (9, (1, 64), "scale: expected \\[2, 64\\], got \\[1, 64\\]"),
    ],
)
def test_bad_arguments_are_named(place, shape, message):
    arguments = list(attention_arguments())
    arguments[place] = torch.zeros(shape)
    *arguments, scale = arguments
    with pytest.raises(ValueError, match=message):
        public_attention(*arguments, 1, scale)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 64 channels, got 5"):
        public_attention(*attention_arguments()[:-1], 5)
    with pytest.raises(ValueError, match="weight2: expected"):
        public_conv_ffn(*ffn_arguments()[:6], torch.zeros(1, 1), torch.zeros(64))


def test_blocks_take_both_halves(stand_in):
    """In training the attention, in inference both, and where something stands between, neither."""
    torch.manual_seed(0)
    block = Block(64, 1, 8, drop_path=0.5, backend="cuda").double()
    plain = Block(64, 1, 8, drop_path=0.5, backend="reference").double()
    plain.load_state_dict(block.state_dict())
    x = random(4, 64, 16, 24)
    results = []
    for module in (block, plain):
        torch.manual_seed(1)  # the same paths are dropped
        leaf = x.clone().requires_grad_()
        y = module.train()(leaf)
        y.backward(random(*y.shape, seed=3))
        with torch.no_grad():
            results.append([y.detach(), leaf.grad, module.eval()(x), *(p.grad for p in module.parameters())])
    assert stand_in == ["super_token_attention", "super_token_attention", "conv_ffn"]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    stand_in.clear()
    with torch.no_grad():
        block(random(1, 64, 12, 24))  # no whole cells
        assert stand_in == ["conv_ffn"]
        # What has a hook runs by itself: it would not be called otherwise.
        seen = []
        for layer in (block.mlp.act, block.ls1):
            layer.register_forward_hook(lambda *_: seen.append(1))
        block(x)
    assert stand_in == ["conv_ffn"]
    assert seen == [1, 1]
