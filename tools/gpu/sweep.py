"""Launch parameters: the fastest right setting of each Triton kernel at each published shape, as launch.py reads it.

A setting is right if the op computes with it what the reference computes, and if none of the asynchronous tensor-core
instructions come of it, which some assemblers translate wrongly (docs/ops.md).
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import triton

from svit.ops.triton import launch as launching
from svit.ops.verify import TOLERANCE

from .items import Batch, Item, Setup, Stage, chunks
from .ops import SHAPES, TINY, Call, Launch, Shape, call_of, largest_error, launches
from .timing import microseconds

DESCRIPTION = (
    "the fastest right launch parameters, bfloat16; `line` stands so in a table of svit/ops/triton/launch.py; `now`: "
    "with the parameters that it has"
)

# Op -> the kernels whose parameters are swept in it; `aggregate` shares those of `sample`.
KERNELS = {
    "sample": ("cell_mean", "associate_aggregate"),
    "spread": ("spread",),
    "sample_backward": ("norm_sample_backward",),
    "depthwise3x3": ("depthwise",),
    "depthwise3x3_backward": ("depthwise", "depthwise_taps"),
    "depthwise3x3 gelu": ("depthwise",),
    "depthwise3x3_backward gelu": ("depthwise", "depthwise_taps"),
}
BANNED = ("wgmma", "tcgen05")


def stages(setup: Setup) -> list[Stage]:
    def items(action: str, **options) -> list[Item]:
        return [
            Item(f"{action} {op}, {shape}", {"action": action, "op": op, "shape": shape}, **options)
            for shape in (TINY if setup.rehearsal else SHAPES)
            for op in (("spread", "depthwise3x3") if setup.rehearsal else KERNELS)
            if shape.cell is not None or op.startswith("depthwise")
        ]

    timing = Stage([Batch(items("sweep", estimate=10, limit=90))])
    if setup.rehearsal:
        return [timing]
    return [Stage(chunks(items("compile", estimate=30, limit=120), setup.cores), parallel=setup.cores), timing]


def candidates(launch: Launch, shape: Shape, rehearsal: bool) -> list[dict[str, int]]:
    """Constants to try in place of those of a launch."""
    if "ROWS" in launch.constants:  # depthwise
        rows = [n for n in (4, 7, 14, 28, 56) if n <= max(shape.height, 4)]
        choices = {"ROWS": rows, "BLOCK_W": [8, 16, 32], "num_warps": [2, 4, 8]}
    else:
        pixels = max(triton.next_power_of_2(math.prod(shape.cell)), 16)
        choices = {"BLOCK_P": [n for n in (16, 32, 64) if n <= pixels], "num_warps": [1, 2, 4, 8]}
    found = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return found[:2] if rehearsal else found


def strip_launch(x: torch.Tensor, halo: int, constants: dict[str, int]) -> tuple[int, int, dict[str, int]]:
    """As launch.py's, with these constants."""
    B, H, W, C = x.shape
    rows, columns = -(-H // constants["ROWS"]), -(-W // (constants["BLOCK_W"] - halo))
    strips = B * rows * columns
    return strips, strips * -(-C // constants["BLOCK_C"]), constants


@contextmanager
def override(kernel: str, constants: dict[str, int]) -> Iterator[None]:
    """Other constants for the launches of a kernel."""
    launch, strips = launching.launch, launching.strip_launch

    def launch_with(function, programs, like, *args, **given):
        given |= constants if function.__name__ == kernel else {}
        launch(function, programs, like, *args, **given)

    def strips_with(x, choices, halo):
        found = strips(x, choices, halo)
        if kernel == ("depthwise" if halo else "depthwise_taps"):
            return strip_launch(x, halo, found[2] | constants)
        return found

    with mock.patch.multiple(launching, launch=launch_with, strip_launch=strips_with):
        yield


def is_banned(launch: Launch) -> bool:
    compiled = launch.kernel[(launch.programs,)](*launch.args, **launch.constants)
    code = "" if compiled is None else compiled.asm["ptx"]  # None: in the interpreter
    return any(name in code for name in BANNED)


def find(found: list[Launch], kernel: str) -> Launch:
    return next(launch for launch in found if launch.name == kernel)


def line(kernel: str, shape: Shape, itemsize: int, gelu: bool, setting: dict[str, int]) -> str:
    """An entry of launch.py's table."""
    if "ROWS" in setting:
        channels = 4 * shape.channels if gelu else shape.channels
        key = kernel, channels, shape.height, shape.width, itemsize
    else:
        key = kernel, shape.channels, *shape.cell, itemsize
    return f"{key!r}: {tuple(setting.values())!r},".replace("'", '"')


@torch.no_grad()
def run(setup: Setup, action: str, op: str, shape: list) -> Iterator[dict]:
    dtype = torch.float32 if setup.rehearsal else torch.bfloat16
    size = Shape(*shape[:4], shape[4] and tuple(shape[4]), shape[5])
    call = call_of(op, size, dtype, setup.device)
    before = launches(call)
    expected = call.reference()()
    for kernel in KERNELS[op]:
        now = find(before, kernel)
        settings = candidates(now, size, setup.rehearsal)
        if action == "compile":
            for setting in settings:
                with override(kernel, setting):
                    launches(call)
            continue
        yield best(call, expected, now, settings, size, op.endswith("gelu"), setup.device)


def best(call: Call, expected, now: Launch, settings: list[dict], shape: Shape, gelu: bool, device: str) -> dict:
    tolerance = TOLERANCE[call.args[0].dtype]
    current = microseconds(now.run, device)
    times, banned, wrong, failed = [], 0, 0, 0
    for setting in settings:
        try:
            with override(now.name, setting):
                launch = find(launches(call), now.name)
                if is_banned(launch):
                    banned += 1
                elif not largest_error(call.fused("triton")(), expected) <= tolerance:
                    wrong += 1
                else:
                    times.append((microseconds(launch.run, device), settings.index(setting)))
        except triton.runtime.errors.OutOfResources:  # registers or shared memory
            failed += 1
    us, index = min(times, default=(math.nan, 0))
    return {
        "kernel": now.name,
        "in": call.op,
        "shape": str(shape),
        "line": line(now.name, shape, call.args[0].element_size(), gelu, settings[index]) if times else "",
        "us": us,
        "now us": current,
        "now": ", ".join(f"{key} {now.constants[key]}" for key in settings[0]),
        "right": len(times),
        "wrong": wrong,
        "wgmma": banned,
        "too large": failed,
        "ok": wrong == 0,
    }
