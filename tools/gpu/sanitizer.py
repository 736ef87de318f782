"""The smoke cases under each tool of NVIDIA's compute-sanitizer; what one finds does not stop the others."""

from collections.abc import Iterator

import torch

from . import smoke
from .items import Batch, Setup, Stage
from .machine import find_tool
from .smoke import cuda_kernels, few, item_of, triton_cases

DESCRIPTION = "the smoke cases under compute-sanitizer; a tool reports at the end of its process, with the last case"

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR_EXIT_CODE = "9"
SHARES = 4  # processes of a tool that the Triton cases are dealt out to


def batches(tool: str, prefix: list[str], setup: Setup) -> list[Batch]:
    if setup.rehearsal:
        kernels = [[item_of(few(triton_cases((torch.float32,)))[0])]]
    else:
        items = [item_of(case, estimate=5, limit=60) for case in triton_cases()]
        kernels = [*(items[i::SHARES] for i in range(SHARES)), *cuda_kernels(estimate=10, limit=60)]
    for items in kernels:
        for item in items:
            item.name = f"{tool}: {item.name}"
            item.arguments["tool"] = tool
    return [Batch(items, prefix) for items in kernels]


def stages(setup: Setup) -> list[Stage] | str:
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None and not setup.rehearsal:
        return "there is no compute-sanitizer"
    found = []
    # A rehearsal runs the program alone, and not four times.
    for tool in TOOLS[:2] if setup.rehearsal else TOOLS:
        prefix = [sanitizer, "--tool", tool, "--error-exitcode", ERROR_EXIT_CODE, "--print-limit", "20"]
        found += batches(tool, [] if setup.rehearsal else prefix, setup)
    # PyTorch's allocator would hide what is read beyond the end of a tensor.
    return [Stage(found, parallel=min(4, setup.cores), environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]


def run(setup: Setup, tool: str, case: list) -> Iterator[dict]:
    for finding in smoke.run(setup, case):
        yield {"tool": tool, **finding}
