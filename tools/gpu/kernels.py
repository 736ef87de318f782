"""Times of the ops and of each Triton kernel in them, at the sizes of the published models."""

from collections.abc import Iterator

import torch

from svit.ops._self_check import TOLERANCE

from .items import Batch, Item, Setup, Stage, chunks
from .ops import SHAPES, TINY, Call, Shape, call_of, largest_error, launches
from .timing import compiler, copy_rate, launch_microseconds, microseconds

DESCRIPTION = (
    "median times, L2 cache cold; `floor`: what goes in and out of the op, moved once at the copy rate; `of copy`: "
    "bytes of a kernel's tensors, over its time and the copy rate; `launch`: CPU time of a call; eager and compiled: "
    "the reference, PyTorch's operations"
)


def stages(setup: Setup) -> list[Stage]:
    def items(action: str, **options) -> list[Item]:
        return [
            Item(f"{action} {name}, {shape}", {"action": action, "op": name, "shape": shape}, **options)
            for shape, ops in (TINY if setup.rehearsal else SHAPES).items()
            for name in ops
        ]

    compiling = chunks(items("compile", estimate=15, limit=90), setup.cores)
    one_at_a_time = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the processes share the cores already
    return [
        Stage(compiling, parallel=setup.cores, environment=one_at_a_time),
        Stage([Batch([*items("time", estimate=3, limit=30), *items("compare", estimate=6, limit=60)])]),
    ]


@torch.no_grad()
def run(setup: Setup, action: str, op: str, shape: list) -> Iterator[dict]:
    dtype = torch.float32 if setup.rehearsal else torch.bfloat16
    size = Shape(*shape[:4], shape[4] and tuple(shape[4]), shape[5])
    call = call_of(op, size, dtype, setup.device)
    if action == "compile":  # for the disk caches of Triton and torch.compile
        call.fused("triton")()
        call.reference(compiler(setup.device))()
    elif action == "time":
        yield from times(call, op, size, setup.device)
    else:
        yield comparison(call, op, size, setup.device)


def times(call: Call, op: str, shape: Shape, device: str) -> Iterator[dict]:
    rate = copy_rate(device)
    expected = call.reference()()
    eager = microseconds(call.reference(), device)
    floor = call.bytes() / rate / 1e3
    for backend in call.backends():
        fused = call.fused(backend)
        result = fused()
        if call.op == "super_token_attention":  # the others are empty
            result, expected = (r[0] if isinstance(r, tuple) else r for r in (result, expected))
        error = largest_error(result, expected)
        us = microseconds(fused, device)
        yield {
            "op": op,
            "shape": str(shape),
            "backend": backend,
            "us": us,
            "floor us": floor,
            "of floor": floor / us,
            "eager us": eager,
            "x eager": eager / us,
            "launch us": launch_microseconds(fused, device),
            "copy GB/s": rate,
            "error": error,
            "ok": error <= TOLERANCE[call.args[0].dtype],
        }
    for launch in launches(call):
        us = microseconds(launch.run, device)
        gbs = launch.bytes() / us / 1e3
        yield {
            "kernel": launch.name,
            "in": op,
            "shape": str(shape),
            "us": us,
            "GB/s": gbs,
            "of copy": gbs / rate,
            "copy GB/s": rate,
        }


def comparison(call: Call, op: str, shape: Shape, device: str) -> dict:
    """The fused op beside torch.compile of the reference."""
    torch.compiler.reset()  # one function is compiled for many shapes: at some number it would run eagerly
    compiled = call.reference(compiler(device))
    compiled()
    us, other = microseconds(call.fused(call.backends()[-1]), device), microseconds(compiled, device)
    return {"op": op, "shape": str(shape), "us": us, "compiled us": other, "x compiled": other / us}
