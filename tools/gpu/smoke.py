"""Every kernel at the published shapes and two odd ones, forward and backward, against the reference in float64.

Processes share the Triton cases, so that as many kernels compile at a time as there are cores. Each CUDA C++ kernel
has a process of its own.
"""

from collections.abc import Iterator

import torch

from svit.ops import cuda, triton
from svit.ops._self_check import Case, check, published_cases

from .build import LIBRARY
from .items import Batch, Item, Setup, Stage, chunks

DESCRIPTION = (
    "every kernel, forward and backward, against the reference in float64 (error relative to the largest value)"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD = ((24, (3, 5)), (40, (5, 1)))
BACKENDS = {"triton": triton.BACKEND, "cuda": cuda.BACKEND}


def triton_cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Case]:
    cases = published_cases("triton", triton.BACKEND.OPS, dtypes)
    forms = dict.fromkeys((case.op, case.cell is not None, case.dtype, case.form) for case in cases)
    for C, cell in ODD:
        cases += [Case("triton", op, C, cell if has_cell else None, dtype, f) for op, has_cell, dtype, f in forms]
    return list(dict.fromkeys(cases))


def cuda_cases() -> list[Case]:
    return published_cases("cuda", cuda.BACKEND.OPS, (torch.bfloat16, torch.float16)) if LIBRARY.exists() else []


def few(cases: list[Case]) -> list[Case]:
    """One case of each op and form, the one of the fewest channels: what Triton's interpreter does in seconds."""
    smallest = {}
    for case in sorted(cases, key=lambda case: case.channels):
        smallest.setdefault((case.op, case.form), case)
    return list(smallest.values())


def item_of(case: Case, **options) -> Item:
    cell = "" if case.cell is None else f"cell {case.cell[0]}x{case.cell[1]}"
    dtype = str(case.dtype).removeprefix("torch.")
    name = " ".join(filter(None, (case.backend, case.op, case.form, f"C={case.channels}", cell, dtype)))
    return Item(name, {"case": [*case[:4], dtype, *case[5:]]}, **options)


def cuda_kernels(**options) -> list[list[Item]]:
    """The cases of the CUDA C++ kernels, a list a kernel."""
    kernels: dict[tuple, list[Item]] = {}
    for case in cuda_cases():
        kernels.setdefault((case.op, case.channels), []).append(item_of(case, **options))
    return list(kernels.values())


def stages(setup: Setup) -> list[Stage]:
    # A case compiles up to ten kernels.
    if setup.rehearsal:
        cases = few(triton_cases((torch.float32,)))
        return [Stage(chunks([item_of(case) for case in cases], 2), parallel=setup.cores)]
    items = [item_of(case, estimate=8, limit=60) for case in triton_cases()]
    found = [Stage(chunks(items, setup.cores), parallel=setup.cores)]
    if LIBRARY.exists():
        found.append(Stage([Batch([Item("clusters", {"clusters": True}, limit=20)])]))
        batches = [Batch(items) for items in cuda_kernels(limit=20)]
        found.append(Stage(batches, parallel=min(4, setup.cores)))
    return found


def run(setup: Setup, case: list | None = None, clusters: bool = False) -> Iterator[dict]:
    if clusters:
        yield from occupancy()
        return
    backend, op, channels, cell, dtype, form = case
    case = Case(backend, op, channels, cell and tuple(cell), getattr(torch, dtype), form)
    row = check(case, BACKENDS[backend], setup.device)
    yield {
        "backend": backend,
        "op": f"{op} {form}".strip(),
        "C": channels,
        "cell": cell and "x".join(map(str, cell)),
        "dtype": dtype,
        "ok": row.ok,
        "error": row.error,
        "reason": row.reason,
    }
    if setup.device == "cuda":
        torch.cuda.synchronize()  # raises if a kernel has broken this context: the next case gets a new process


def occupancy() -> Iterator[dict]:
    """How many clusters of the attention kernel the GPU holds; asked, nothing is launched."""
    for C, (cell, _) in cuda.CELLS.items():
        for rows in (7, 8):
            count = cuda.max_active_clusters(C, rows, rows, "cuda")
            where = "on the chip, in clusters" if count else "one block an image, through memory"
            yield {
                "C": C,
                "cell": "x".join(map(str, cell)),
                "cells": f"{rows}x{rows}",
                "clusters": count,
                "runs": where,
            }
