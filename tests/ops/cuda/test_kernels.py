"""The CUDA kernels' own sources, run lane by lane on the CPU (emulator/warp.h), against the reference in float64."""

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from svit.ops import cuda, reference

HALF = {torch.bfloat16: 0, torch.float16: 1}
# Largest error allowed, relative to the largest value. A result is rounded twice, which makes a unit in the last place,
# 2^-7 in bfloat16 and 2^-10 in float16; the rest is for what is rounded on the way.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def emulator(library: ctypes.CDLL) -> ctypes.CDLL:
    library.emulate_attention.restype = library.emulate_conv_ffn.restype = library.barriers.restype = ctypes.c_char_p
    library.emulate_gelu.restype = ctypes.c_float
    library.emulate_gelu.argtypes = (ctypes.c_float,)
    return library


@pytest.fixture(scope="module")
def kernels(compile_for_cpu):
    return emulator(compile_for_cpu("emulated.cpp"))


class Random:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1, plus: float = 0) -> torch.Tensor:
        return plus + scale * torch.randn(shape, generator=self.generator)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def pointers(*tensors: torch.Tensor | None):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def attention(kernels, C, grid, dtype, clusters, images=1, wide=True, scaled=True, keep=True, order=0):
    """Runs the kernel; its results and the reference's: y, what was added to x, s, q, mass."""
    random = Random()
    (h, w), head = cuda.CELLS[C]
    hh, ww = grid
    H, W = hh * h, ww * w
    own = torch.float32 if wide else dtype
    x = random(images, H, W, C).to(dtype)
    norm = random(C, scale=0.2, plus=1).to(own), random(C, scale=0.2).to(own)
    qkv = random(3 * C, C, scale=2 * C**-0.5).to(dtype), random(3 * C, scale=0.3).to(own)
    proj = random(C, C, scale=C**-0.5).to(dtype), random(C, scale=0.3).to(own)
    scale = random(images, C, scale=0.3, plus=1) if scaled else None
    y, s = poisoned(*x.shape, dtype=dtype), poisoned(images, hh, ww, C, dtype=dtype)
    q = poisoned(images, hh, ww, 9, h * w, dtype=dtype)
    mass = poisoned(images, hh, ww, dtype=torch.float32)
    outputs = (y, s, q, mass) if keep else (y, None, None if clusters else q, None)
    error = kernels.emulate_attention(
        HALF[dtype], C, clusters, wide, images, hh, ww, ctypes.c_float(1e-6),
        pointers(x, *norm, qkv[1], proj[1], qkv[0], proj[0], scale, *outputs), order,
    )  # fmt: skip
    if error is not None:
        raise RuntimeError(error.decode())
    expected = reference.super_token_attention(
        x.double(), (h, w), *(t.double() for t in norm), 1e-6, *(t.double() for t in (*qkv, *proj)),
        None if scale is None else scale.double(), C // head, True,
    )  # fmt: skip
    return (y, y.double() - x.double(), s, q, mass), (expected[0], expected[0] - x.double(), *expected[1:])


def check_attention(*args, **options):
    actual, expected = attention(*args, **options)
    dtype = args[3]
    for a, e, widening in zip(actual, expected, (1, 3, 1, 1, 1), strict=True):
        assert (a.double() - e).abs().max() <= widening * TOLERANCE[dtype] * e.abs().max()


@pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "alone"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 1), (2, 2), (3, 4), (7, 7)], ids=str)
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_attention(kernels, C, grid, clusters):
    check_attention(kernels, C, grid, torch.float16, clusters)


@pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "alone"])
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_attention_on_the_largest_grid_in_bfloat16(kernels, C, clusters):
    check_attention(kernels, C, (8, 8), torch.bfloat16, clusters, wide=False, scaled=False)


@pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "alone"])
def test_attention_of_several_images(kernels, clusters):
    check_attention(kernels, 128, (2, 3), torch.float16, clusters, images=3)


@pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "alone"])
def test_attention_that_keeps_nothing(kernels, clusters):
    (y, _, s, _, mass), (expected, *_) = attention(kernels, 64, (2, 2), torch.float16, clusters, keep=False)
    assert_close(y, expected, torch.float16)
    assert s.isnan().all()
    assert mass.isnan().all()


@pytest.mark.parametrize("clusters", [True, False], ids=["cluster", "alone"])
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_attention_is_the_same_in_any_order_of_lanes(kernels, C, clusters):
    """What lacks a barrier, or is added up as lanes come, would differ."""
    runs = [attention(kernels, C, (3, 2), torch.float16, clusters, order=order)[0] for order in (0, 1, 2, 3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gelu(kernels):
    """Its error is under half a unit in the last place of bfloat16 but where GELU is almost 0; large inputs hold."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-6e4, -30, 30, 6e4])]).double()
    expected = torch.nn.functional.gelu(x)
    error = (torch.tensor([kernels.emulate_gelu(value) for value in x.tolist()]).double() - expected).abs()
    assert error[x.abs() < 7.2].max() <= 3.7e-5
    assert (error <= 1e-6 * x.abs())[x.abs() > 7.2].all()
    half_a_unit = torch.exp2(expected.abs().log2().floor() - 8)
    assert (error <= half_a_unit)[expected.abs() >= 0.008].all()


def conv_ffn(kernels, C, size, dtype, images=1, wide=True, order=0):
    """Runs the kernel; its result and the reference's."""
    random = Random()
    own = torch.float32 if wide else dtype
    x, residual = random(images, *size, C).to(dtype), random(images, *size, C).to(dtype)
    weight1, bias1 = random(4 * C, C, scale=C**-0.5).to(dtype), random(4 * C, scale=0.3).to(own)
    taps, bias = random(4 * C, 1, 3, 3, scale=0.4).to(own), random(4 * C, scale=0.3).to(own)
    weight2, bias2 = random(C, 4 * C, scale=0.5 * C**-0.5).to(dtype), random(C, scale=0.3).to(own)
    y = poisoned(*x.shape, dtype=dtype)
    inputs = pointers(x, residual, weight1, weight2, bias1, bias2, taps, bias, y)
    error = kernels.emulate_conv_ffn(HALF[dtype], C, wide, images, *size, inputs, order)
    if error is not None:
        raise RuntimeError(error.decode())
    tensors = x, residual, weight1, bias1, taps, bias, weight2, bias2
    return y, reference.conv_ffn(*(t.double() for t in tensors))


@pytest.mark.parametrize("size", [(1, 1), (6, 14), (7, 13), (15, 1)], ids=str)
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_conv_ffn(kernels, C, size):
    assert_close(*conv_ffn(kernels, C, size, torch.float16), torch.float16)


@pytest.mark.parametrize("wide", [False, True], ids=["16bit-parameters", "float32-parameters"])
@pytest.mark.parametrize("C", list(cuda.CELLS))
def test_conv_ffn_of_images_of_several_tiles_in_bfloat16(kernels, C, wide):
    assert_close(*conv_ffn(kernels, C, (15, 16), torch.bfloat16, images=2, wide=wide), torch.bfloat16)


@pytest.mark.parametrize("C", [64, 192])
def test_conv_ffn_is_the_same_in_any_order_of_lanes(kernels, C):
    runs = [conv_ffn(kernels, C, (3, 4), torch.float16, order=order)[0] for order in (0, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# Races on shared memory (emulator/races.cpp): there is none, and one as soon as any barrier is taken out.

SOURCES = Path(cuda.__file__).parent / "csrc"
BARRIER = re.compile(r"\b(sync_warp|sync_block|sync|wait_for_copies<\d+>)\(\)")


def barriers() -> list[str]:
    """Where the kernels' sources have a barrier, as the emulator names it."""
    found = []
    for source in ("conv_ffn.cuh", "super_token_attention.cuh"):
        for i, line in enumerate((SOURCES / source).read_text().splitlines(), start=1):
            if BARRIER.search(line.partition("//")[0]):
                found.append(f"{source}:{i}")
    return found


@pytest.fixture(scope="module")
def watched(compile_for_cpu):
    return emulator(compile_for_cpu("emulated.cpp", watched=True))


@pytest.fixture
def without(watched, request):
    """The kernels without the barrier that the test is for."""
    watched.take_out(request.param.encode())
    yield watched, request.param.partition(":")[0]
    watched.take_out(b"")


def run_watched(library: ctypes.CDLL, source: str, sizes: Iterable[int] = tuple(cuda.CELLS)) -> None:
    """Runs the kernels of a source file; a race is a RuntimeError."""
    for C in sizes:
        if source == "conv_ffn.cuh":
            conv_ffn(library, C, (7, 13), torch.float16)
        else:
            for clusters in (True, False):
                attention(library, C, (3, 2), torch.float16, clusters)


@pytest.mark.parametrize("C", list(cuda.CELLS))
@pytest.mark.parametrize("source", ["conv_ffn.cuh", "super_token_attention.cuh"])
def test_no_race(watched, source, C):
    run_watched(watched, source, [C])


@pytest.mark.parametrize("without", barriers(), indirect=True)
def test_a_race_without_a_barrier(without):
    library, source = without
    with pytest.raises(RuntimeError, match="race at byte|may not have begun|may have ended"):
        run_watched(library, source)


def test_every_barrier_is_found(watched):
    """Those in the sources are those that the kernels come to."""
    for source in ("conv_ffn.cuh", "super_token_attention.cuh"):
        run_watched(watched, source)
    assert set(watched.barriers().decode().split()) == set(barriers())
