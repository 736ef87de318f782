"""What the compiler makes of the kernels, read from the machine code: no GPU or driver is needed for that.

Each launch that an op would do is compiled instead, with the very parameters, at the published channels and cells.
"""

import re
import sys
from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode

import helpers
from svit.ops import triton as backend

if backend.triton is None or sys.platform != "linux":
    pytest.skip("needs Triton", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from svit.ops import _kernels
from svit.ops.super_token import triton as super_token

pytestmark = pytest.mark.skipif(backend.INTERPRETED, reason="nothing is compiled in the interpreter")

ARCHITECTURES = [80, 90, 100]
PUBLISHED = [(64, (8, 8), 56), (96, (8, 8), 56), (128, (4, 4), 28), (192, (4, 4), 28)]  # C, cell, H = W at 224
# Cells that no published model has: few and many channels, cells of a row, of a pixel, of more than a tile.
OTHERS = [
    (8, (1, 3), torch.bfloat16),
    (64, (16, 16), torch.float16),
    (64, (16, 16), torch.float32),
    (128, (12, 12), torch.bfloat16),
    (1024, (1, 1), torch.bfloat16),
    (48, (7, 7), torch.float32),
]
DOTS = {"associate_aggregate", "spread", "norm_sample_backward"}
ASYNCHRONOUS = ("HGMMA", "IGMMA", "QGMMA", "BGMMA", "WARPGROUP", "UTC")  # products of sm_90 and sm_100


class Compiler:
    """Stands in for Triton's driver."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """A function: architecture, op, arguments -> [(kernel name, machine code)] of what the op would launch."""
    before = driver._active
    results = []

    def compile_only(kernel, programs, like, *args, **constants):
        args = [MockTensor(t.dtype) if isinstance(t, torch.Tensor) else t for t in args]
        kernel.device_caches.clear()  # one driver stands in for several
        results.append((kernel.__name__, kernel.warmup(*args, grid=(programs,), **constants).asm["sass"]))
        kernel.device_caches.clear()

    def run(architecture, op, *args):
        results.clear()
        driver.set_active(Compiler(architecture))
        with FakeTensorMode():
            op(*(torch.empty(*a[0], dtype=a[1], device="cuda") if is_tensor(a) else a for a in args))
        return list(results)

    if not knobs.nvidia.cuobjdump.path:
        helpers.missing("cuobjdump")
    monkeypatch.setattr(_kernels, "launch", compile_only)
    yield run
    driver._active = before


def is_tensor(argument) -> bool:
    return isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[1], torch.dtype)


def instructions(sass: str) -> list[str]:
    """Opcodes with their suffixes. A line of the listing is: scheduling, tab, perhaps a predicate, instruction."""
    return re.findall(r"^\S+\t\s*(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)


def check(kernels, expected: list[str], dots: set[str]) -> None:
    assert [name for name, _ in kernels] == expected
    for name, sass in kernels:
        code = instructions(sass)
        assert len(code) > 50, f"{name}: the listing was not understood"
        count = Counter(c.split(".")[0] for c in code)
        assert not count["STL"] + count["LDL"], f"{name} spills"
        assert not any(c.startswith(("ATOM.", "ATOMG", "RED.")) for c in code), f"{name} uses atomics"
        assert any(c.startswith("LDG") and ".128" in c for c in code), f"{name}: no 16-byte load"
        if name not in ("cell_mean", "depthwise_taps"):  # what these write is small
            assert any(c.startswith("STG") and ".128" in c for c in code), f"{name}: no 16-byte store"
        check_products(name, code, dots)


def check_products(name: str, code: list[str], dots: set[str]) -> None:
    """Products run on the tensor cores, by the instructions that every GPU from Ampere on has."""
    assert code[-1] in ("BRA", "NOP"), f"{name}: the listing is cut short"  # Triton's ends after 4096 instructions
    assert not [c for c in code if c.startswith(ASYNCHRONOUS)], f"{name} has asynchronous products"
    assert ("HMMA" in {c.split(".")[0] for c in code}) == (name in dots), f"{name}: {code}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("C", "cell", "H"), PUBLISHED, ids=lambda v: str(v))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_super_token_kernels(architecture, C, cell, H, dtype, compiled):
    x, s, q, mass, parameter = tensors(C, cell, H, dtype)
    kernels = compiled(architecture, backend.BACKEND.sample, x, cell, 1, parameter, parameter, 1e-6)
    check(kernels, ["cell_mean", "associate_aggregate", "fold"], DOTS)
    check(compiled(architecture, backend.BACKEND.spread, s, q, cell, (H, H), x), ["spread"], DOTS)
    check(compiled(architecture, backend.BACKEND.aggregate, x, q, cell), ["associate_aggregate", "fold"], DOTS)
    kernels = compiled(architecture, backend.BACKEND.sample_backward, s, x, q, mass, cell, parameter, 1e-6)
    check(kernels, ["norm_sample_backward"], DOTS)


@pytest.mark.parametrize(("C", "cell", "dtype"), OTHERS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_products_of_other_cells(architecture, C, cell, dtype, compiled):
    x, s, q, mass, parameter = tensors(C, cell, 2 * cell[0], dtype)
    kernels = compiled(architecture, backend.BACKEND.associate, x, s, cell)
    kernels += compiled(architecture, backend.BACKEND.aggregate, x, q, cell)
    kernels += compiled(architecture, backend.BACKEND.sample_backward, s, x, q, mass, cell, None, 1e-6)
    kernels += compiled(architecture, backend.BACKEND.sample_backward, s, x, q, mass, cell, parameter, 1e-6)
    names = ["associate_aggregate", "associate_aggregate", "fold", "spread", "norm_sample_backward"]
    assert [name for name, _ in kernels] == names
    for name, sass in kernels:
        check_products(name, instructions(sass), DOTS)


def tensors(C: int, cell: tuple[int, int], H: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of x, s, q, mass and a parameter of the norm, for maps of H x H."""
    hh, ww, P = -(-H // cell[0]), -(-H // cell[1]), cell[0] * cell[1]
    shapes = [((128, H, H, C), dtype), ((128, hh, ww, C), dtype), ((128, hh, ww, 9, P), dtype)]
    return [*shapes, ((128, hh, ww), torch.float32), ((C,), torch.float32)]


@pytest.mark.parametrize(("kernel", "setting"), [("spread", (64, 4)), ("norm_sample_backward", (64, 8))])
def test_settings_with_asynchronous_products_are_refused(kernel, setting, monkeypatch):
    monkeypatch.setitem(super_token.SETTINGS, (kernel, 64, 8, 8, 2), setting)
    with pytest.raises(ValueError, match=f"SETTINGS: expected fewer than 64 pixels or 4 warps for {kernel}"):
        super_token.cell_launch(kernel, torch.empty(1, 8, 8, 64, dtype=torch.bfloat16), [8, 8])


def row_loop(sass: str) -> list[str]:
    """Opcodes of a kernel's longest loop, from its label to the branch back (listings for sm_100 have no labels)."""
    loops = []
    for label in re.findall(r"^(\.?L\w+):", sass, re.MULTILINE):
        body = sass.split(f"{label}:\n", 1)[1]
        if back := re.search(rf"^.*\bBRA\b.*{re.escape(label)}\b.*$", body, re.MULTILINE):
            loops.append(instructions(body[: back.end()]))
    return max(loops, key=len)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("C", "H", "gelu"), [(64, 56, False), (96, 56, False), (320, 14, False), (256, 56, True), (2560, 7, True)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_depthwise_kernels(architecture, C, H, gelu, dtype, compiled):
    x, weight, bias = ((128, H, H, C), dtype), ((C, 1, 3, 3), torch.float32), ((C,), torch.float32)
    kernels = compiled(architecture, backend.BACKEND.depthwise3x3, x, weight, bias, gelu)
    check(kernels, ["depthwise"], set())
    backward = compiled(architecture, backend.BACKEND.depthwise3x3_backward, x, x, weight, gelu)
    check(backward, ["depthwise", "depthwise_taps"], set())
    for _, sass in (*kernels, backward[0]):
        code = instructions(sass)
        assert any(c.startswith("SHFL") for c in code)
        # Triton 3.8 brings the first row into the layout of the others through shared memory, with a barrier or two.
        assert sum(c.startswith("BAR") for c in code) <= 2
        rows = row_loop(sass) if architecture < 100 else []
        assert not any(c.startswith(("BAR", "STS", "LDS")) for c in rows), "columns pass through shared memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("C", "H"), [(64, 56), (96, 56), (128, 28), (192, 28), (256, 56), (320, 14), (512, 7), (768, 28), (1280, 14)]
)
def test_instructions_of_a_row(C, H, dtype, compiled):
    """For 16 bytes, of which a thread has two: what issuing them takes stays near the time of memory (docs/ops.md)."""
    x, weight, bias = ((128, H, H, C), dtype), ((C, 1, 3, 3), torch.float32), ((C,), torch.float32)
    for gelu, most in ((False, 125), (True, 205)):
        [(_, sass)] = compiled(90, backend.BACKEND.depthwise3x3, x, weight, bias, gelu)
        assert 72 < len(row_loop(sass)) / 2 <= most  # 72 multiplications with taps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("C", "H"), [(32, 112), (48, 112), (64, 56), (96, 56)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bias_gelu_affine(architecture, C, H, dtype, compiled):
    x, parameter = ((128, H, H, C), dtype), ((C,), torch.float32)
    check(compiled(architecture, backend.BACKEND.bias_gelu_affine, x, *[parameter] * 3), ["bias_gelu_affine"], set())
