"""Whole models beside each other: SViT, its upstream form and other architectures, each in the same three ways.

A model has a process of its own, so that all compile at a time. Then they take turns, one at a time on the GPU and
several rounds, so that a slow moment meets them all; after its turn a model gives its memory back.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from benchmark import Setting, build
from svit.ops import _dispatch

from .build import LIBRARY
from .items import Batch, Item, Setup, Stage
from .timing import compiler, copy_rate
from .worker import first_line

DESCRIPTION = (
    "img/s by the median run, models in turn, channels-last; forward: weights in bfloat16; training: forward and "
    "backward under bfloat16 autocast; peak memory: of weights and one run; `x first`: img/s over the first model's "
    "in the same way; `floor`: what fused ops must move, at this GPU's copy rate"
)

# What an item does -> the ways in which it runs the models; and the seconds that it is expected to take, forward and
# training. "As they are" took 52 and 78 on an H100 with 16 cores; no GPU has run "compiled" yet.
WAYS = {"as they are": ("eager", "graph"), "compiled": ("compiled",)}
ESTIMATES = {"as they are": (60.0, 90.0), "compiled": (90.0, 150.0)}
PEERS = ("resnet50", "convnext_tiny", "swin_tiny_patch4_window7_224", "caformer_s18", "mambaout_tiny")
ROUNDS, RUNS = 4, 5
PREPARATION, LIMIT = 240, 60  # seconds in which a model has to be ready, and to answer

# Least ms of a forward pass at a copy rate of 4.3 TB/s, super-token attention, depthwise convolutions and attention
# fused, each step moving its bytes once: (model, height, batch) -> ms.
FLOORS = {
    ("svit_small", 224, 128): 3.35,
    ("svit_base", 224, 128): 6.5,
    ("svit_large", 224, 128): 9.1,
    ("svit_small", 800, 2): 1.5,
}
FLOOR_RATE = 4300.0  # GB/s


def forms(name: str, train: bool, rehearsal: bool) -> list[str]:
    """Specs of tools/benchmark.py: the upstream form, which the ratios refer to, and ours."""
    if rehearsal:  # in the interpreter a backward of the kernels would take half a minute
        return [f"upstream:{name}"] if train else [name]
    found = [f"upstream:{name}", name]
    if not train:
        found.append(f"folded:{name}")
        if LIBRARY.exists():
            found.append(f"cuda:folded:{name}")
    return found


def stages(setup: Setup) -> list[Stage]:
    def item(way: str, name: str, size: tuple[int, int], batch: int, train: bool, peers: tuple = ()) -> Item:
        arguments = {
            "specs": [*forms(name, train, setup.rehearsal), *peers],
            "size": size,
            "batch": batch,
            "train": train,
            "ways": WAYS[way],
        }
        what = f"{name} {'training' if train else 'forward'} {size[0]}x{size[1]} batch {batch}, {way}"
        return Item(what, arguments, estimate=ESTIMATES[way][train], limit=3 * ESTIMATES[way][train])

    square, large = (224, 224), (800, 1280)
    # Most telling first: what does not fit into the time is left out at the end. torch.compile takes minutes.
    settings = [
        ("svit_small", square, 128, False, PEERS),
        ("svit_small", square, 128, True, PEERS),
        ("svit_small", large, 2, False),
        ("svit_small", square, 1, False, PEERS),
        ("svit_small", square, 64, False, PEERS),
        ("svit_small", large, 2, True),
        ("svit_small", square, 64, True, PEERS),
        ("svit_small", square, 1, True, PEERS),
        ("svit_base", square, 128, False),
        ("svit_large", square, 128, False),
        ("svit_base", square, 128, True),
        ("svit_large", square, 128, True),
    ]
    if setup.rehearsal:
        settings = [("test_svit", (16, 16), 2, False), ("test_svit", (16, 16), 2, True, ("test_resnet",))]
    items = [item(way, *setting) for way in WAYS for setting in settings]
    return [Stage([Batch(items)], environment={"TORCHINDUCTOR_COMPILE_THREADS": "4"})]


def run(setup: Setup, specs: list[str], size: list[int], batch: int, train: bool, ways: list[str]) -> Iterator[dict]:
    dtype = "float32" if train or setup.rehearsal else "bfloat16"
    amp = "bfloat16" if train and not setup.rehearsal else None
    setting = Setting(tuple(size), batch, train, amp, setup.device, dtype)
    models = [Model(spec, setting) for spec in specs]
    try:
        yield from compare(models, ways, setting, setup)
    finally:
        for model in models:
            model.process.kill()


def floor_of(spec: str, setting: Setting) -> float | None:
    """Least ms of a forward pass at this GPU's copy rate, where it is known."""
    least = None if setting.train else FLOORS.get((spec.split(":")[-1], setting.size[0], setting.batch_size))
    return least and least * FLOOR_RATE / copy_rate(setting.device)


def compare(models: list["Model"], ways: list[str], setting: Setting, setup: Setup) -> Iterator[dict]:
    first: dict[str, float] = {}
    rounds = 1 if setup.rehearsal else ROUNDS
    # A training step of each takes up to 25 GB; forward, all of them together take less.
    with ThreadPoolExecutor(2 if setting.train else setup.cores) as pool:
        list(pool.map(lambda model: model.ask(ways[0], prepare=True), models))
    for way in ways:
        if way == "graph" and setting.device != "cuda":
            continue
        for _ in range(rounds):
            for model in models:
                model.ask(way)
        for model in models:
            seconds = statistics.median(model.seconds[way]) if model.seconds[way] else None
            rate = seconds and setting.batch_size / seconds
            if rate and model is models[0]:
                first[way] = rate
            yield {
                "setting": f"{'training' if setting.train else 'forward'} {setting.size[0]}x{setting.size[1]}, "
                f"batch {setting.batch_size}",
                "model": model.spec,
                "way": way,
                "img/s": rate,
                "ms": seconds and 1e3 * seconds,
                "floor ms": floor_of(model.spec, setting),
                "peak MiB": model.memory.get(way),
                "x first": rate / first[way] if rate and way in first else None,
                "ok": way not in model.errors,
                "note": model.errors.get(way) or model.note,
            }


class Model:
    """The process of a model, which answers a line for a line."""

    def __init__(self, spec: str, setting: Setting) -> None:
        self.spec = spec
        self.seconds: dict[str, list[float]] = {way: [] for ways in WAYS.values() for way in ways}
        self.memory: dict[str, float] = {}
        self.errors: dict[str, str] = {}
        self.note = ""
        command = [sys.executable, "-m", "gpu.models", spec, json.dumps(vars(setting))]
        # In the group of this process: who ends that ends these too.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, way: str, prepare: bool = False) -> None:
        """Has it run in a way, or get ready to."""
        if way in self.errors:
            return
        limit = PREPARATION if prepare else LIMIT
        try:
            self.process.stdin.write(f"prepare {way}\n" if prepare else f"{way}\n")
            self.process.stdin.flush()
            answers = select.select([self.process.stdout], [], [], limit)[0]
            line = self.process.stdout.readline() if answers else ""
        except BrokenPipeError:
            answers, line = True, ""
        if not answers:
            self.process.kill()
        if line:
            answer = json.loads(line)
        else:
            answer = {"error": f"its process {'ended' if answers else f'gave no answer within {limit} s'}"}
        self.note = answer.get("note", self.note)
        if "error" in answer:
            self.errors[way] = answer["error"]
        if "seconds" in answer:
            self.seconds[way] += answer["seconds"]
            self.memory[way] = answer["memory"]


# The other end.


class Runner:
    """A model with an input, run in the three ways."""

    def __init__(self, spec: str, setting: Setting) -> None:
        self.setting = setting
        self.on_gpu = setting.device == "cuda"
        self.model = build(spec, setting).to(memory_format=torch.channels_last)
        self.compiled = torch.compile(self.model, backend=compiler(setting.device), dynamic=False)
        x = torch.randn(
            setting.batch_size, 3, *setting.size, device=setting.device, dtype=getattr(torch, setting.dtype)
        )
        self.x = x.contiguous(memory_format=torch.channels_last)

    def step(self, model: nn.Module) -> None:
        if not self.setting.train:
            with torch.inference_mode(), self.setting.autocast():
                model(self.x)
            return
        self.model.zero_grad(set_to_none=True)
        with self.setting.autocast():
            loss = model(self.x).float().mean()
        loss.backward()

    def prepare(self, way: str) -> dict:
        """Compiles all there is to compile, kernels too, by one step. A rehearsal compiles nothing."""
        if self.on_gpu:
            self.step(self.compiled if way == "compiled" else self.model)
            self.release()
        return {}

    def way(self, name: str) -> dict:
        step = (
            self.graph() if name == "graph" else lambda: self.step(self.compiled if name == "compiled" else self.model)
        )
        for _ in range(2 if self.on_gpu else 0):
            step()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = [self.seconds(step) for _ in range(RUNS if self.on_gpu else 1)]
        # A graph holds its memory before it runs.
        memory = torch.cuda.max_memory_allocated() / 2**20 if self.on_gpu and name != "graph" else None
        del step
        self.release()
        # One that fell back to the reference is not what its name says.
        return {"seconds": seconds, "memory": memory, "note": "; ".join(map(str, _dispatch.failures.values()))}

    def graph(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries start up outside of the capture
                self.step(self.model)
        torch.cuda.current_stream().wait_stream(side)
        self.model.zero_grad(set_to_none=True)  # the capture allocates its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(self.model)
        return graph.replay

    def seconds(self, step: Callable[[], None]) -> float:
        if not self.on_gpu:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def release(self) -> None:
        self.model.zero_grad(set_to_none=True)
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def answer(runner: Runner, request: str) -> dict:
    try:
        request, _, way = request.rpartition(" ")
        return runner.prepare(way) if request else runner.way(way)
    except torch.OutOfMemoryError:
        runner.release()
        return {"error": "it needs more memory than there is"}
    except Exception as error:
        return {"error": first_line(error)}


def main() -> None:
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what libraries print is no answer
    os.dup2(2, 1)
    spec, setting = sys.argv[1], json.loads(sys.argv[2])
    runner = Runner(spec, Setting(**setting | {"size": tuple(setting["size"])}))
    for line in sys.stdin:
        print(json.dumps(answer(runner, line.strip())), file=out, flush=True)


if __name__ == "__main__":
    main()
