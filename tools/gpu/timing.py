"""Times of calls. On the CPU, in a rehearsal, they are there to show that the code runs."""

import functools
import statistics
import time
from collections.abc import Callable

import torch


def microseconds(call: Callable[[], object], device: str, ms: int = 100) -> float:
    """Median time of a call on the GPU, of as many as take `ms`: CUDA events, the L2 cache emptied before each."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e3 * do_bench(call, warmup=ms // 4, rep=ms, return_mode="median")
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def launch_microseconds(call: Callable[[], object], device: str) -> float:
    """Median time that the CPU takes to launch a call, which the GPU may still be at when it returns."""
    seconds = []
    for _ in range(10 if device == "cuda" else 1):
        if device == "cuda":
            torch.cuda.synchronize()
        for _ in range(20 if device == "cuda" else 1):  # fewer than the GPU's queue holds
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


@functools.cache
def copy_rate(device: str) -> float:
    """GB/s, read and written, of a large copy: what a kernel that is bound by memory can reach."""
    x = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    rate = 2 * x.nbytes / microseconds(lambda: y.copy_(x), device) / 1e3
    if device == "cuda":
        del x, y
        torch.cuda.empty_cache()
    return rate


def compiler(device: str) -> str:
    """The backend of torch.compile; a rehearsal traces, and needs no C++ compiler."""
    return "inductor" if device == "cuda" else "eager"
