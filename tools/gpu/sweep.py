"""Launch parameters: the fastest right setting of each Triton kernel at each published shape, as its operator reads it.

A setting is right if the op computes with it what the reference computes, and if none of the asynchronous tensor-core
instructions come of it, which some assemblers translate wrongly (docs/ops.md).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import triton

from svit.ops._self_check import TOLERANCE
from svit.ops.depthwise import triton as depthwise
from svit.ops.super_token import triton as super_token

from .items import Batch, Item, Setup, Stage, chunks
from .ops import SHAPES, TINY, Call, Launch, Shape, call_of, largest_error, launches
from .timing import microseconds

DESCRIPTION = (
    "the fastest right launch parameters, bfloat16; `now`: time with the parameters that the kernel has; at the end "
    "entries for the tables of the operators' triton.py, each right and fastest over all sweeps that it serves, and "
    "`x now`: their mean time over that of now"
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
REHEARSED = ("spread", "depthwise3x3")
BANNED = ("wgmma", "tcgen05")

# (table, key) -> setting -> times over those of the rule, of each sweep; for the items of one process.
Key = tuple[str, tuple]
ratios: dict[Key, dict[tuple[int, ...], list[float]]] = {}


def stages(setup: Setup) -> list[Stage]:
    square = {shape: ops for shape, ops in SHAPES.items() if shape.height == shape.width}
    shapes = dict.fromkeys(TINY, REHEARSED) if setup.rehearsal else square

    def items(action: str, **options) -> list[Item]:
        return [
            Item(f"{action} {op}, {shape}", {"action": action, "op": op, "shape": shape}, **options)
            for shape, ops in shapes.items()
            for op in KERNELS
            if op in ops
        ]

    timing = Stage([Batch([*items("sweep", estimate=10, limit=90), Item("tables", {"action": "tables"})])])
    if setup.rehearsal:
        return [timing]
    return [Stage(chunks(items("compile", estimate=30, limit=120), setup.cores), parallel=setup.cores), timing]


class Table:
    """A table of an operator's triton.py: from what a launch is, to settings that replace those of its rule."""

    def __init__(self, kernel: str, call: Call, shape: Shape) -> None:
        x = call.args[1] if call.op.endswith("backward") else call.args[0]
        if kernel.startswith("depthwise"):
            self.settings_of, self.name = depthwise.STRIP_SETTINGS, "STRIP_SETTINGS"
            self.key = (kernel, x.shape[-1], x.element_size())
            # columns, warps, rows; for the taps all images are one map
            columns = [n for n in (8, 16, 32) if n <= max(triton.next_power_of_2(shape.width + 1), 8)]
            rows = [n for n in (7, 14, 28, 56) if n < 2 * shape.height]
            self.choices = columns, (1, 2, 4, 8), (16, 32, 64, 128) if kernel == "depthwise_taps" else rows
        else:
            self.settings_of, self.name = super_token.SETTINGS, "SETTINGS"
            self.key = (kernel, shape.channels, *shape.cell, x.element_size())
            # pixels at a time, warps
            pixels = max(triton.next_power_of_2(math.prod(shape.cell)), 16)
            self.choices = [n for n in (16, 32, 64) if n <= pixels], (1, 2, 4, 8)

    def settings(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*self.choices))

    @contextmanager
    def holding(self, setting: tuple[int, ...]) -> Iterator[None]:
        with mock.patch.dict(self.settings_of, {self.key: setting}):
            yield


def is_banned(launch: Launch) -> bool:
    compiled = launch.run()
    code = "" if compiled is None else compiled.asm["ptx"]  # None: in the interpreter
    return any(name in code for name in BANNED)


def find(found: list[Launch], kernel: str) -> Launch:
    return next(launch for launch in found if launch.name == kernel)


@torch.no_grad()
def run(setup: Setup, action: str, op: str = "", shape: list | None = None) -> Iterator[dict]:
    if action == "tables":
        yield from entries()
        return
    dtype = torch.float32 if setup.rehearsal else torch.bfloat16
    size = Shape(*shape[:4], shape[4] and tuple(shape[4]), shape[5])
    call = call_of(op, size, dtype, setup.device)
    for kernel in KERNELS[op]:
        table = Table(kernel, call, size)
        settings = table.settings()[:2] if setup.rehearsal else table.settings()
        if action == "compile":
            for setting in settings:
                attempt(table, setting, call, lambda launch: None)
        else:
            yield best(table, settings, call, size, setup.device)


def attempt(table: Table, setting: tuple[int, ...], call: Call, use: Callable[[Launch], None]) -> str:
    """Has `use` do something with a launch of the kernel under a setting; why it cannot be used, or ""."""
    try:
        with table.holding(setting):
            launch = find(launches(call), table.key[0])
            if is_banned(launch):
                return "banned"
            use(launch)
    except ValueError:  # the operator knows that it is banned
        return "banned"
    except triton.runtime.errors.OutOfResources:
        return "too large"
    except RuntimeError as error:  # the compiler's; a GPU that has met an error is of no more use to this process
        if "PassManager" not in str(error):
            raise
        return "not compiled"
    return ""


def best(table: Table, settings: list[tuple[int, ...]], call: Call, shape: Shape, device: str) -> dict:
    tolerance, expected = TOLERANCE[call.args[0].dtype], call.reference()()
    times: dict[tuple[int, ...], float] = {}
    wrong = []

    def measure(launch: Launch) -> None:
        if largest_error(call.fused("triton")(), expected) <= tolerance:
            times[setting] = microseconds(launch.run, device, 25)
        else:
            wrong.append(setting)

    now = microseconds(find(launches(call), table.key[0]).run, device, 25)
    refused = []
    for setting in settings:  # which `measure` sees
        refused.append(attempt(table, setting, call, measure))
    fastest = min(times, key=times.get, default=None)
    sweeps = ratios.setdefault((table.name, table.key), {setting: [] for setting in settings})
    for setting in list(sweeps):
        if setting not in times:
            del sweeps[setting]  # not right everywhere
        else:
            sweeps[setting].append(times[setting] / now)
    return {
        "kernel": table.key[0],
        "in": call.op,
        "shape": str(shape),
        "fastest": str(fastest),
        "us": times.get(fastest),
        "now us": now,
        "right": len(times),
        "wrong": " ".join(map(str, wrong)),
        "wgmma": refused.count("banned"),
        "too large": refused.count("too large"),
        "not compiled": refused.count("not compiled"),
        "ok": bool(times) and not wrong,
    }


def entries() -> Iterator[dict]:
    """Entries of the operators' tables, each with its mean time over that of the rule."""
    for (table, key), sweeps in ratios.items():
        means = {setting: math.exp(statistics.fmean(map(math.log, each))) for setting, each in sweeps.items()}
        if means:
            fastest = min(means, key=means.get)
            yield {
                "table": table,
                "entry": f"{key!r}: {fastest!r},".replace("'", '"'),
                "x now": means[fastest],
                "sweeps": len(sweeps[fastest]),
            }
