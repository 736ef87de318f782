"""Checks the fused ops on this machine's GPU, then measures them: one command, one dated results file.

    python tools/gpu_check.py                          # everything, into docs/benchmarks/<date>-<gpu>.md
    python tools/gpu_check.py --parts tests sanitizer  # some of: tests, sanitizer, ops, inference, training, compiled
    python tools/gpu_check.py --parts inference --models svit_small

tests: pytest on the GPU. sanitizer: NVIDIA's compute-sanitizer over every kernel. ops: attention half-blocks and
depthwise convolutions. inference, training: whole models against their plain form and other architectures. compiled:
both under torch.compile, which takes its time. What fails is written down, and the rest goes on. Without a GPU the
tests run in Triton's interpreter and the measurements on tiny models, to show that they work: no figure of theirs means
anything, and none is kept.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark import Timer

from benchmark import Setting, compare, device_name, environment, table, title
from plain_form import PlainDepthwise, PlainLayerNorm, PlainSuperTokenAttention
from svit.files import replacing
from svit.layers import ResidualDepthwiseConv
from svit.models.svit import Block
from svit.ops import conv_ffn, cuda, depthwise3x3, sample, spread, super_token_attention

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "sanitizer", "ops", "inference", "training", "compiled")
MODELS = ("svit_small", "svit_base", "svit_large")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# Least ms of a batch of 128 (of 2 at 800 x 1280) at 4.3 TB/s, if super-token attention, depthwise convolutions and
# attention are fused and each step moves its bytes once.
FLOORS = {
    ("svit_small", (224, 224)): 3.35,
    ("svit_base", (224, 224)): 6.5,
    ("svit_large", (224, 224)): 9.1,
    ("svit_small", (800, 1280)): 1.5,
}
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "caformer_s18", "maxvit_tiny_tf_224")


class CheckFailed(Exception):
    """A part of the check has failed; the others can still run."""


def run_tests() -> str:
    """On a GPU the kernels themselves, without one the interpreter and the compiler."""
    paths = ["tests/ops", "tests/layers", "tests/models/test_fused.py", "tests/test_gpu.py"]
    if GPU:  # what stands in for one takes minutes
        paths += [f"--ignore=tests/ops/triton/test_{name}.py" for name in ("interpreter", "sass")]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as out:
            done = subprocess.run([sys.executable, "-m", "pytest", "-q", *paths], cwd=ROOT, stdout=out)
        text = log.read_text()
    print(text)
    summary = re.sub(r" in [\d.]+s.*", "", text.strip().splitlines()[-1]).strip("= ")
    if done.returncode:
        raise CheckFailed(f"the tests failed: {summary}")
    return f"`pytest {' '.join(paths)}`: {summary}."


def run_sanitizer() -> str:
    """Every kernel, forward and backward, under each of compute-sanitizer's tools."""
    if not GPU:
        run_every_op()
        return "compute-sanitizer: not run, there is no GPU. Its program ran on the CPU."
    if not shutil.which("compute-sanitizer"):
        raise CheckFailed("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        done = subprocess.run([*command, sys.executable, __file__, "--sanitizer-job"], cwd=ROOT, env=environment)
        if done.returncode:
            raise CheckFailed(f"compute-sanitizer {tool} exited with {done.returncode}")
    return "compute-sanitizer memcheck, racecheck, initcheck, synccheck: no errors."


def run_every_op() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for C, cell in ((64, (8, 8)), (192, (4, 4)), (24, (3, 5))):
            x = torch.randn(2, 13, 18, C, device=DEVICE, dtype=dtype, requires_grad=True)
            weight, bias = (torch.randn(C, device=DEVICE, requires_grad=True) for _ in range(2))
            taps = torch.randn(C, 1, 3, 3, device=DEVICE, requires_grad=True)
            for norm in ((weight, bias), (None, None)):
                s, q = sample(x, cell, 2, *norm)
                y = spread(s, q, cell, (13, 18), residual=x)
                for gelu in (False, True):
                    depthwise3x3(y, taps, bias, gelu).float().square().sum().backward(retain_graph=True)
    if cuda.compiled is not None and GPU:
        for dtype in (torch.bfloat16, torch.float16):
            for C, ((h, w), head) in cuda.CELLS.items():
                x = torch.randn(2, 3 * h, 2 * w, C, device=DEVICE, dtype=dtype)
                vectors = [torch.randn(n, device=DEVICE) for n in (C, C, 3 * C, C, 4 * C, 4 * C, C)]
                shapes = (3 * C, C), (C, C), (4 * C, C), (4 * C, 1, 3, 3), (C, 4 * C)
                qkv, proj, weight1, taps, weight2 = (torch.randn(*shape, device=DEVICE) for shape in shapes)
                leaf = x.clone().requires_grad_()
                arguments = vectors[0], vectors[1], 1e-6, qkv, vectors[2], proj, vectors[3], C // head
                y = super_token_attention(leaf, (h, w), *arguments, backend="cuda")
                y.float().square().sum().backward()
                conv_ffn(x, x, weight1, vectors[4], taps, vectors[5], weight2, vectors[6], backend="cuda")
    if GPU:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call. On a GPU by events, with a cold L2 cache."""
    if GPU:
        from triton.testing import do_bench

        return do_bench(function, warmup=50, rep=200, return_mode="median")
    return 1e3 * Timer("f()", globals={"f": function}).blocked_autorange(min_run_time=0.05).median


def milliseconds_in_graph(function: Callable[[], object]) -> float:
    """The same without the time between launches."""
    if GPU:
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(function, rep=100, return_mode="median")
    return float("nan")


def bandwidth() -> float:
    """Bytes a millisecond, read and written, of a large copy."""
    x = torch.empty(2**29 if GPU else 2**22, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: y.copy_(x))


class Plain(nn.Module):
    """norm, attention and residual as the authors' code runs them."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm, self.attn = block.norm1, block.attn
        self.norm.__class__, self.attn.__class__ = PlainLayerNorm, PlainSuperTokenAttention
        self.attn.register_buffer("one_hot", torch.eye(9).reshape(9, 1, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.attn(self.norm(x))


class Half(nn.Module):
    """The same as a block of ours runs them."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.add_attention(x)


class FFNHalf(nn.Module):
    """The other half of a block of ours, the conv-FFN with its residual, BatchNorm folded."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        block.mlp.eval().fuse()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.add_ffn(x)


class GeluDepthwise(nn.Module):
    def __init__(self, conv: ResidualDepthwiseConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.conv, PlainDepthwise):
            return self.conv(torch.nn.functional.gelu(x))
        return self.conv(x, gelu=True)


def plain_depthwise(dim: int) -> ResidualDepthwiseConv:
    conv = ResidualDepthwiseConv(dim)
    conv.__class__ = PlainDepthwise
    return conv


def half_block_bytes(B: int, H: int, W: int, C: int, cell: tuple[int, int]) -> int:
    """What the four kernels of a half-block move in 16 bit: x three times in, once out, q, partial sums."""
    pixels, cells = B * H * W, B * (H // cell[0]) * (W // cell[1])
    return 2 * 4 * pixels * C + 2 * 2 * 9 * pixels + 2 * 4 * 9 * cells * C


def serves(op: str, x: torch.Tensor, **sizes) -> bool:
    """Whether the CUDA backend can be asked for, for a map (B, C, H, W)."""
    return cuda.usable(op, x.permute(0, 2, 3, 1), **sizes)[0]


def forward_times(name: str, model: nn.Module, x: torch.Tensor) -> dict:
    model.to(DEVICE, x.dtype)
    with torch.inference_mode():
        forward = milliseconds(lambda: model(x))
        graph = milliseconds_in_graph(lambda: model(x))
    return {"what": name, "forward us": 1e3 * forward, "in a graph": 1e3 * graph}


def inference_row(name: str, model: nn.Module, x: torch.Tensor, floor: float, first: dict | None) -> dict:
    found = {**forward_times(name, model, x), "floor us": 1e3 * floor}
    return {**found, "x forward": (first or found)["forward us"] / found["forward us"]}


def row(name: str, model: nn.Module, x: torch.Tensor, floor: float, first: dict | None) -> dict:
    found = forward_times(name, model, x)
    leaf = x.detach().requires_grad_()
    grad = torch.randn_like(x)
    leaves = [leaf, *model.parameters()]  # a block has some beside those of its half
    both = milliseconds(lambda: torch.autograd.grad(model(leaf), leaves, grad, allow_unused=True))
    found |= {"forward + backward": 1e3 * both, "floor us": 1e3 * floor}
    for key in ("forward us", "forward + backward"):
        found[f"x {key.removesuffix(' us')}"] = (first or found)[key] / found[key]
    return found


def measure_ops(batch: int, settings: list) -> Iterator[str]:
    """Half-blocks (norm, super-token attention, residual) and depthwise convolutions, in bfloat16."""
    rate = bandwidth()
    yield f"Copying moves {rate / 1e9:.2f} TB/s; floors are bytes over that; `x`: times as fast as the first row."
    dtype = torch.bfloat16
    for C, heads, cell, (H, W), B in settings:
        B = B or batch
        x = torch.randn(B, C, H, W, device=DEVICE, dtype=dtype)
        nhwc = x.contiguous(memory_format=torch.channels_last)
        floor = half_block_bytes(B, H, W, C, cell) / rate
        rows = [row("plain, float32", Plain(Block(C, heads, cell)), x.float(), 2 * floor, None)]
        rows.append(row("plain", Plain(Block(C, heads, cell)), x, floor, rows[0]))
        rows.append(row("plain, channels-last", Plain(Block(C, heads, cell)), nhwc, floor, rows[0]))
        rows.append(row("reference", Half(Block(C, heads, cell, backend="reference")), nhwc, floor, rows[0]))
        rows.append(row("svit", Half(Block(C, heads, cell)), nhwc, floor, rows[0]))
        if serves("super_token_attention", nhwc, cell=cell, num_heads=heads):
            # One pass reads x and writes y, and q where it trains.
            rows.append(row("cuda", Half(Block(C, heads, cell, backend="cuda")), nhwc, 2 * x.nbytes / rate, rows[0]))
        yield f"\n### Half-block, {B} x {H} x {W} x {C}, cell {cell[0]} x {cell[1]}\n\n{numbers(rows)}"
        if serves("conv_ffn", nhwc, hidden=4 * C):
            floor = 2 * x.nbytes / rate
            rows = [inference_row("svit", FFNHalf(Block(C, heads, cell)), nhwc, floor, None)]
            rows.append(inference_row("cuda", FFNHalf(Block(C, heads, cell, backend="cuda")), nhwc, floor, rows[0]))
            yield f"\n### Conv-FFN, {B} x {H} x {W} x {C}\n\n{numbers(rows)}"
        for factor, wrap in ((1, lambda conv: conv), (4, GeluDepthwise)):
            wide = torch.randn(B, factor * C, H, W, device=DEVICE, dtype=dtype)
            wide = wide.contiguous(memory_format=torch.channels_last)
            floor = 2 * wide.nbytes / rate
            rows = [row("plain", wrap(plain_depthwise(factor * C)), wide, floor, None)]
            rows.append(row("svit", wrap(ResidualDepthwiseConv(factor * C)), wide, floor, rows[0]))
            name = "GELU, depthwise, residual" if factor == 4 else "Depthwise, residual"
            yield f"\n### {name}, {B} x {H} x {W} x {factor * C}\n\n{numbers(rows)}"


def numbers(rows: list[dict]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f")


def ours(name: str, *forms: str) -> list[str]:
    return [f"{form}{name}" for form in forms]


def model_runs(part: str, models: Sequence[str]) -> Iterator[tuple[list[str], Setting]]:
    """What to compare, in which setting; the first model is the one that the ratios refer to."""
    if not GPU:
        forms = ours("test_svit", "", "compiled:") if part == "compiled" else ours("test_svit", "plain:", "folded:")
        yield [*forms, "resnet10t"], Setting((64, 64), 2, part == "training", None, DEVICE)
        return
    c = "compiled:"
    for name in models:
        for size, batch in (((224, 224), 128), ((800, 1280), 2)):
            peers = PEERS if name == MODELS[0] and size[0] == size[1] else ()
            if part == "compiled":
                forms = ours(name, "plain:", c, f"{c}folded:", f"{c}plain:", f"{c}reference:")
                yield [*forms, *(c + peer for peer in peers)], Setting(size, batch, False, "bfloat16", DEVICE)
                forms = ours(name, "plain:", c, f"{c}plain:", f"{c}reference:")
                yield [*forms, *(c + peer for peer in peers)], Setting(size, batch, True, "bfloat16", DEVICE)
            elif part == "inference":
                forms = ours(name, "plain:", "reference:", "", "folded:", "graph:", "graph:folded:")
                if cuda.compiled is not None:
                    forms += ours(name, "cuda:folded:", "graph:cuda:folded:")
                yield [*forms, *peers], Setting(size, batch, False, "bfloat16", DEVICE)
                yield [*forms, *peers], Setting(size, batch, False, None, DEVICE, "bfloat16")
                yield ours(name, "plain:", "reference:", ""), Setting(size, batch, False, None, DEVICE)
            else:
                forms = ours(name, "plain:", "reference:", "")
                yield [*forms, *peers], Setting(size, batch, True, "bfloat16", DEVICE)
                yield forms, Setting(size, batch, True, None, DEVICE)


def measure_models(part: str, models: Sequence[str], runs: int) -> Iterator[str]:
    rate = bandwidth()
    for specs, setting in model_runs(part, models):
        heading = f"\n### {title(setting, runs)}\n\n"
        try:
            rows = compare(specs, setting, runs)
        except torch.OutOfMemoryError:
            yield f"{heading}FAILED: {', '.join(specs)} need more memory than there is"
            continue
        for r in rows:
            name = r["model"].split(":")[-1]
            floor = FLOORS.get((name, setting.size)) if not setting.train else None
            r["floor ms/img"] = floor * 4.3e9 / rate / setting.batch_size if floor else None
        yield heading + table(rows)
        if GPU:
            torch.compiler.reset()
            torch.cuda.empty_cache()


OPS = [  # C, heads, cell, H x W, batch if not the usual one
    (64, 1, (8, 8), (56, 56), None),
    (128, 2, (4, 4), (28, 28), None),
    (96, 2, (8, 8), (56, 56), None),
    (192, 3, (4, 4), (28, 28), None),
    (64, 1, (8, 8), (200, 320), 2),
    (128, 2, (4, 4), (100, 160), 2),
]


def part(name: str, args: argparse.Namespace) -> Iterator[str]:
    """Runs a part, a piece of its results at a time; one that begins with FAILED ends it."""
    try:
        if name == "tests":
            yield run_tests()
        elif name == "sanitizer":
            yield run_sanitizer()
        elif name == "ops":
            yield from measure_ops(128, OPS) if GPU else measure_ops(1, [(16, 2, (4, 4), (16, 16), None)])
        else:
            yield from measure_models(name, args.models, args.runs)
    except Exception as error:
        traceback.print_exc()
        yield f"FAILED: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--output", type=Path, help="results file instead of docs/benchmarks/<date>-<gpu>.md")
    parser.add_argument("--runs", type=int, default=20 if GPU else 2)
    parser.add_argument("--sanitizer-job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sanitizer_job:
        return run_every_op()

    slug = re.sub(r"\W+", "-", device_name(DEVICE).lower()).strip("-")
    output = args.output or (ROOT / "docs/benchmarks" / f"{datetime.date.today()}-{slug}.md" if GPU else None)
    command = " ".join(["python tools/gpu_check.py", *sys.argv[1:]])
    lines = [f"# {device_name(DEVICE)}\n\n{environment(DEVICE)}\n\n`{command}`"]
    for name in args.parts:
        lines.append(f"\n## {name}\n")
        print(lines[-1], flush=True)
        for text in part(name, args):
            print(text, flush=True)
            lines.append(text)
            if output:  # after each step: a run that is cut off leaves what it found
                output.parent.mkdir(parents=True, exist_ok=True)
                with replacing(output) as path:
                    path.write_text("\n".join(lines) + "\n")
    print(f"\nwritten to {output}" if GPU else "\nno GPU: none of the figures above counts")
    if any("FAILED" in line for line in lines):
        raise SystemExit("error: something failed, see above")


if __name__ == "__main__":
    main()
