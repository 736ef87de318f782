"""Times models against each other in one run: img/s, ratios, peak memory.

    svit benchmark svit_small convnext_tiny --batch-size 4
    svit benchmark svit_small convnext_tiny --img-size 800 1280 --batch-size 1
    svit benchmark svit_small swin_tiny_patch4_window7_224 --sweep 224 448 672 --plot time-per-pixel.png
    svit benchmark svit_small convnext_tiny --csv speed.csv    # the columns of timm's benchmark.py
    svit benchmark folded:svit_small caformer_s18 --runtime eager compile onnxruntime openvino

A model is any timm name. Before it may stand, and add up: `maps:` for its feature maps alone, without what follows the
last one, as detectors and segmentors use it; `upstream:` for an SViT made of the authors' operations, in a clone of the
repository; `reference:` or `cuda:` for one on that backend (svit.ops), `folded:` to fold what `fuse()` folds,
`compiled:` for torch.compile, `graph:` to replay a CUDA graph of it. The models take turns, run by run, so that
a slow moment of the machine meets them all; each runs in the memory format in which it is faster. Peak memory is what
the model adds: to a process of its own, or on a GPU to what the allocator gave out before.

`--runtime` runs each model in each of these, in turn as well: `eager` PyTorch, `compile` (torch.compile, in inference
with its weights frozen), and on a CPU, in inference, `onnxruntime`, `openvino` and `executorch` (pip install openvino
or executorch) and `aotinductor` (needs a C++ compiler). These four get the program that `svit export` makes for this
batch and image size, the first two as its ONNX file; with `-int8` as the file of `svit export --int8`, but calibrated
with noise. ExecuTorch runs on all cores, whatever --threads says.
"""

import argparse
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn
from torch.export import ExportedProgram

import svit
from svit.checkpoints import create_model, size_argument
from svit.errors import InputError
from svit.files import atomic_write, write_csv
from svit.models import SViT
from svit.ops import triton
from svit.profiling import count

from . import export, install
from .base import (
    add_amp,
    add_img_size,
    at_least,
    check_file,
    choose_device,
    first_line,
    height_and_width,
    make_parser,
    out_of_memory_as_error,
)

FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass
class Setting:
    """What one run of a model is."""

    size: tuple[int, int]
    batch_size: int
    train: bool
    amp: str | None
    device: str
    dtype: str = "float32"
    runtime: str = "eager"

    def autocast(self) -> torch.autocast:
        # Without its cache of weights, which a CUDA graph would have to own.
        dtype = getattr(torch, self.amp or "bfloat16")
        return torch.autocast(self.device, dtype, enabled=self.amp is not None, cache_enabled=False)


PREFIXES = ("upstream", "reference", "cuda", "folded", "maps", "compiled", "graph")

# What makes another form of an SViT, by its prefix. A clone of the repository adds "upstream".
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {}


def build(spec: str, setting: Setting) -> nn.Module:
    """The model that `spec` names: a timm name behind any of `PREFIXES`."""
    *prefixes, name = spec.split(":")
    if "plain" in prefixes:
        print(f"warning: {spec}: plain: is deprecated, it is called upstream: now", file=sys.stderr)
        prefixes = ["upstream" if prefix == "plain" else prefix for prefix in prefixes]
    if "upstream" in prefixes and "upstream" not in FORMS:
        raise InputError(f"{spec}: upstream: comes with a clone of the repository, not with the package")
    if unknown := set(prefixes) - set(PREFIXES):
        raise InputError(f"{spec}: expected {', '.join(PREFIXES)} before a model, got {unknown.pop()}")
    arguments: dict[str, Any] = {}
    for backend in {"reference", "cuda"} & set(prefixes):
        arguments["backend"] = backend
    if setting.runtime in EXPORTED:
        arguments["exportable"] = True  # as `svit export` makes it
    model: Any
    try:
        model = create_model(name, **arguments, **size_argument(name, setting.size))
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    if {"upstream", "folded"} & set(prefixes) and not isinstance(model, SViT):
        raise InputError(f"{spec}: upstream: and folded: are for SViT")
    model.train(setting.train).to(setting.device, getattr(torch, setting.dtype))
    if "upstream" in prefixes:
        model = FORMS["upstream"](model)
    if "folded" in prefixes:
        if setting.train:
            raise InputError(f"{spec}: folded: is for inference")
        model = model.fuse()
    if "maps" in prefixes:
        model = Maps(model).train(setting.train)
    if "compiled" in prefixes:
        model = compiled(model)
    if "graph" in prefixes:
        if setting.device != "cuda" or setting.train:
            raise InputError(f"{spec}: graph: is for inference on a GPU")
        model = Replayed(model, setting)
    return in_runtime(model, spec, setting)


def in_runtime(model: nn.Module, spec: str, setting: Setting) -> nn.Module:
    """The model, run by `setting.runtime`."""
    if setting.runtime == "eager":
        return model
    if setting.runtime == "compile":
        torch._inductor.config.freezing = not setting.train
        return compiled(model)
    if setting.device != "cpu" or setting.train or setting.amp or setting.dtype != "float32":
        raise InputError(f"{spec}: --runtime {setting.runtime} is for inference in float32 on a CPU")
    try:
        return Exported(export.fused(model), (setting.batch_size, 3, *setting.size), EXPORTED[setting.runtime])
    except InputError as error:
        raise InputError(f"{spec}: {error}") from error
    except ModuleNotFoundError as error:
        raise InputError(f"--runtime {setting.runtime}: pip install {(error.name or '').partition('.')[0]}") from error


def compiled(model: nn.Module) -> nn.Module:
    # Models of one class share the limit, beyond which they would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return cast(nn.Module, torch.compile(model, dynamic=False))


class Maps(nn.Module):
    """All feature maps of a model, each summed up to one value; what follows the last one is cut off."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.indices = model.prune_intermediate_layers(list(range(len(model.feature_info))), prune_norm=True)
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.model.forward_intermediates(x, self.indices, output_fmt="NCHW", intermediates_only=True)
        return torch.stack([m.float().mean() for m in maps])


class Replayed(nn.Module):
    """A CUDA graph of a model's inference, captured at the first call; for inputs of one shape and layout."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        super().__init__()
        self.model, self.setting = model, setting
        self.graph: torch.cuda.CUDAGraph | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        graph = self.graph
        if graph is None or self.x.stride() != x.stride():
            graph = self.graph = self.capture(x)
        self.x.copy_(x)
        graph.replay()
        return self.y

    def capture(self, x: torch.Tensor) -> torch.cuda.CUDAGraph:
        self.x = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), self.setting.autocast():
            for _ in range(3):  # kernels compile and libraries start up outside of the capture
                self.model(self.x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), self.setting.autocast():
            self.y = self.model(self.x)
        return graph


class Exported(nn.Module):
    """What `load` makes of a model's program, for inputs of one shape, on as many threads as PyTorch has."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], load: Callable[[ExportedProgram], export.Run]) -> None:
        super().__init__()
        with export.in_words("the model"), torch.no_grad():
            program = export.trace(model, shape, ())
        self.run = load(program)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def in_onnxruntime(program: ExportedProgram, int8: bool = False) -> export.Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with onnx_file(program, int8) as path:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


def in_openvino(program: ExportedProgram, int8: bool = False) -> export.Run:
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    with onnx_file(program, int8) as path:
        # In float32, where a processor would make it bfloat16.
        model = openvino.compile_model(path, "CPU", {**options, "INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(model({"image": x.numpy()})[0])


def in_aotinductor(program: ExportedProgram) -> export.Run:
    export.check_compiler()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt2")
        with export.in_words("the model"):
            export.write_aoti(program, path, {})
        return export.load_aoti(path)


def in_executorch(program: ExportedProgram) -> export.Run:
    """By XNNPACK, as far as that takes the operations; the portable kernels have the others."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    with export.in_words("the model"):
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    loaded = Runtime.get().load_program(lowered.buffer)
    forward = loaded.load_method("forward")

    # `forward` refers to the two and does not own them.
    def run(x: torch.Tensor, kept: object = (lowered, loaded)) -> torch.Tensor:
        return forward.execute([x])[0]

    return run


@contextmanager
def onnx_file(program: ExportedProgram, int8: bool) -> Iterator[Path]:
    """The file that `svit export` makes, for as long as the block runs. In int8 its outputs mean nothing."""
    export.check_onnx()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        with export.in_words("the model"):
            export.write_onnx(program, path, {})
            if int8:
                export.quantize(path, [torch.randn(export.image(program).shape)])  # the scales are those of noise
        yield path


# What runs an exported program.
EXPORTED: dict[str, Callable[[ExportedProgram], export.Run]] = {
    "onnxruntime": in_onnxruntime,
    "onnxruntime-int8": partial(in_onnxruntime, int8=True),
    "openvino": in_openvino,
    "openvino-int8": partial(in_openvino, int8=True),
    "aotinductor": in_aotinductor,
    "executorch": in_executorch,
}
RUNTIMES = ("eager", "compile", *EXPORTED)


class Candidate:
    """A model in one memory format, ready to run."""

    def __init__(self, model: nn.Module, memory_format: str, setting: Setting) -> None:
        self.model = model
        self.layout, self.memory_format = memory_format, FORMATS[memory_format]
        self.setting = setting
        self.seconds: list[float] = []

    def run(self) -> float:
        """Seconds of one forward pass, or of forward and backward."""
        s = self.setting
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        x = torch.randn(s.batch_size, 3, *s.size, device=s.device, dtype=getattr(torch, s.dtype))
        x = x.contiguous(memory_format=self.memory_format)
        amp = s.autocast()
        start = synchronized_time(s.device)
        if s.train:
            with amp:
                loss = self.model(x).float().mean()
            loss.backward()
        else:
            with torch.inference_mode(), amp:
                self.model(x)
        seconds = synchronized_time(s.device) - start
        self.model.zero_grad()
        return seconds


def synchronized_time(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def better_format(spec: str, setting: Setting) -> str:
    """The memory format in which the model is faster: the median of three runs each (one, of seconds), after a first.

    Two more compilations take longer than all of the runs: what is compiled or captured for a GPU runs channels-last.
    Other runtimes than PyTorch take NCHW, and lay it out as they like.
    """
    if setting.runtime in EXPORTED:
        return "NCHW"
    if setting.device == "cuda" and ({"compiled", "graph"} & set(spec.split(":")) or setting.runtime == "compile"):
        return "channels-last"
    model = build(spec, setting)
    medians = {}
    for memory_format in FORMATS:
        candidate = Candidate(model, memory_format, setting)
        runs = 3 if candidate.run() < 1 else 1
        medians[memory_format] = statistics.median(candidate.run() for _ in range(runs))
    return min(medians, key=lambda memory_format: medians[memory_format])


def peak_memory(spec: str, memory_format: str, setting: Setting) -> float:
    """MiB that the model and two runs of it add, at their peak, to this process."""
    before = resident_memory("VmRSS")
    candidate = Candidate(build(spec, setting), memory_format, setting)
    candidate.run()
    candidate.run()
    return resident_memory("VmHWM") - before


def peak_memory_on_gpu(candidate: Candidate) -> float:
    """MiB of the model and, at its peak, a run of it; NaN for a graph, which took its memory when it was captured."""
    if isinstance(candidate.model, Replayed):
        return float("nan")
    weights = sum(t.nbytes for t in (*candidate.model.parameters(), *candidate.model.buffers()))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    candidate.run()
    return (torch.cuda.max_memory_allocated() - before + weights) / 2**20


def resident_memory(field: str) -> float:
    """MiB of this process now (VmRSS) or at its peak (VmHWM), as Linux counts it; elsewhere NaN."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(field)), float("nan"))


def peak_memory_elsewhere(spec: str, memory_format: str, setting: Setting) -> float:
    """`peak_memory` in a process of its own, where no other model has been."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(peak_memory, spec, memory_format, setting).result()


def compare(specs: list[str], setting: Setting, runs: int, runtimes: Sequence[str] = ()) -> list[dict]:
    """One row a model, and runtime if any are named; its ratios are to the first one of the same runtime."""
    candidates = {}
    for setting_of_runtime in [replace(setting, runtime=runtime) for runtime in runtimes] or [setting]:
        for spec in specs:
            memory_format = better_format(spec, setting_of_runtime)
            progress(f"{spec}: {setting_of_runtime.runtime}, {memory_format}")
            model = build(spec, setting_of_runtime)
            candidates[spec, setting_of_runtime.runtime] = Candidate(model, memory_format, setting_of_runtime)
    for candidate in candidates.values():
        candidate.run()
    for i in range(runs):
        progress(f"run {i + 1} of {runs}")
        for candidate in candidates.values():
            candidate.seconds.append(candidate.run())

    rows: list[dict[str, Any]] = []
    for (spec, runtime), candidate in candidates.items():
        on_gpu, memory_format = setting.device == "cuda", candidate.layout
        if on_gpu:
            memory = peak_memory_on_gpu(candidate)
        else:
            memory = peak_memory_elsewhere(spec, memory_format, candidate.setting)
        median = statistics.median(candidate.seconds)
        row: dict[str, Any] = {
            "model": spec,
            **({"runtime": runtime} if runtimes else {}),
            "format": memory_format,
            "img/s": setting.batch_size / median,
            "ms/img": 1e3 * median / setting.batch_size,
            "min": 1e3 * min(candidate.seconds) / setting.batch_size,
            "max": 1e3 * max(candidate.seconds) / setting.batch_size,
            "peak MiB": memory,
        }
        first = next((other for other in rows if other.get("runtime") == row.get("runtime")), row)
        row["time ratio"] = row["ms/img"] / first["ms/img"]
        row["memory ratio"] = row["peak MiB"] / first["peak MiB"]
        rows.append(row)
    return rows


def progress(text: str) -> None:
    print(f"{text:60}", end="\r", file=sys.stderr, flush=True)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def environment(device: str) -> str:
    parts = [
        datetime.date.today().isoformat(),
        device_name(device),
        f"{torch.get_num_threads()} threads",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"timm {timm.__version__}",
        f"svit {svit.__version__}",
    ]
    if device == "cuda":
        parts += [f"driver {driver_version()}", triton.version, f"CUDA {torch.version.cuda}"]
    malloc = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_")]
    return ", ".join(parts + malloc)


def title(setting: Setting, runs: int) -> str:
    mode = "forward + backward" if setting.train else "inference"
    h, w = setting.size
    precision = f"{setting.amp} autocast" if setting.amp else setting.dtype
    return f"{mode}, {precision}, {h} x {w}, batch {setting.batch_size}, median of {runs} runs"


def table(rows: list[dict]) -> str:
    from tabulate import tabulate  # here, since tools/gpu_check.py builds its models without it

    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f")


def sizes_of(spec: str, setting: Setting) -> tuple[int, int | None]:
    """Parameters of what `spec` names, and its MACs for one image; None in training and where they cannot be counted.

    They are counted on a CPU in float32, and without a compiler or a graph, into which a trace cannot look.
    """
    traceable = ":".join(part for part in spec.split(":") if part not in ("compiled", "graph"))
    model = build(traceable, replace(setting, train=False, amp=None, device="cpu", dtype="float32"))
    params = sum(p.numel() for p in model.parameters())
    if setting.train:
        return params, None
    try:
        found = count(model, setting.size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        print(f"warning: {spec}: its MACs cannot be counted: {first_line(error)}", file=sys.stderr)
        return params, None
    for op, times in found.unsupported.items():
        print(f"warning: {spec}: {op} counts as 0 (runs {times} times)", file=sys.stderr)
    return params, found.macs


def csv_row(row: dict, setting: Setting, params: int, macs: int | None) -> dict:
    """A row of `compare` in the columns and units of timm's benchmark.py, and behind them its peak memory."""
    h, w = setting.size
    values = {
        "samples_per_sec": round(row["img/s"], 2),
        "step_time": round(row["ms/img"] * setting.batch_size, 3),
        "batch_size": setting.batch_size,
        "img_size": h if h == w else f"{h}x{w}",
    }
    if not setting.train:
        values |= {"gmacs": None if macs is None else macs / 1e9, "macts": None}  # activations are not counted
    prefix = "train" if setting.train else "infer"
    memory = row["peak MiB"]
    return {
        "model": row["model"],
        **{f"{prefix}_{name}": value for name, value in values.items()},
        "param_count": params / 1e6,
        f"{prefix}_peak_mib": None if math.isnan(memory) else round(memory, 2),
        **({"runtime": row["runtime"]} if "runtime" in row else {}),
    }


def check_plot(path: Path) -> None:
    """Raises an InputError if matplotlib is missing or cannot write such a picture."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise InputError(f"--plot: needs matplotlib: {install('visualize')}") from error
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise InputError(f"--plot: expected a name that ends in {', '.join(known)}, got {path}")


def plot(sweep: dict[tuple[int, int], list[dict]], path: Path) -> None:
    """Nanoseconds a pixel against the side of the image, one line a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    sizes = list(sweep)
    for i, row in enumerate(next(iter(sweep.values()))):
        ax.plot(
            [h for h, _ in sizes],
            [sweep[s][i]["ms/img"] * 1e6 / (s[0] * s[1]) for s in sizes],
            "o-",
            label=row["model"],
        )
    ax.set(xlabel="side of the image, pixels", ylabel="time per pixel, ns", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    with atomic_write(path) as part:
        fig.savefig(part, dpi=120)


def parser() -> argparse.ArgumentParser:
    parser = make_parser("benchmark", __doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    add_img_size(parser, help="side, or height and width; default: 224", default=[224])
    parser.add_argument(
        "--sweep", type=at_least(1), nargs="+", metavar="N", help="several square sizes, one after the other"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="with --sweep: picture of the time per pixel")
    parser.add_argument("--batch-size", metavar="N", type=at_least(1), default=4, help="default: %(default)s")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    add_amp(parser)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runtime", choices=RUNTIMES, nargs="+", default=[], help="see above; default: eager")
    parser.add_argument("--threads", metavar="N", type=at_least(1), help="PyTorch's threads")
    parser.add_argument("--runs", metavar="N", type=at_least(1), default=10, help="default: %(default)s")
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="append the table, with machine and versions, to this Markdown file"
    )
    parser.add_argument(
        "--csv", metavar="FILE", type=Path, help="write the results in the columns of timm's benchmark.py"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command_line = parser()
    args = command_line.parse_args(argv)
    if args.plot and not args.sweep:
        command_line.error("--plot needs --sweep")
    for option in ("csv", "report", "plot"):
        check_file(command_line, f"--{option}", getattr(args, option))
    if args.plot:
        check_plot(args.plot)
    choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)

    print(environment(args.device))
    sizes = [(n, n) for n in args.sweep] if args.sweep else [height_and_width(args.img_size)]
    results = {}
    csv_rows = []
    for size in sizes:
        setting = Setting(size, args.batch_size, args.train, args.amp, args.device, args.dtype)
        counted = {spec: sizes_of(spec, setting) for spec in args.models} if args.csv else {}
        with out_of_memory_as_error("lower --batch-size or --img-size"):
            results[size] = compare(args.models, setting, args.runs, args.runtime)
        text = f"\n## {title(setting, args.runs)}\n\n{table(results[size])}\n"
        print(text)
        if args.report:
            with args.report.open("a") as report:
                report.write(f"{text}\n{environment(args.device)}\n")
        if args.csv:
            csv_rows += [csv_row(row, setting, *counted[row["model"]]) for row in results[size]]
    if args.csv:
        write_csv(args.csv, csv_rows)
    if args.plot:
        plot(results, args.plot)
    return 0
