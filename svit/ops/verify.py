"""The self-check: a fused backend runs one small case against the reference before its first real call.

`problem` answers for one call of an op, from memory, from the verdicts on disk, or by running the case; `self_check`
runs every published shape. A verdict holds for a backend's build (`fingerprint`), op, channels, cell and dtype.

Verdicts lie in the user's cache folder: `SVIT_CACHE_DIR`, else `$XDG_CACHE_HOME/svit`, else `~/.cache/svit`. Where that
cannot be written to, each process checks anew. `SVIT_SELF_CHECK=0` turns the check before the first call off.
"""

import functools
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from svit.files import replacing

from . import reference


class Case(NamedTuple):
    """What a verdict is about."""

    backend: str
    op: str  # a forward op; its backward op, where it has one, is part of the case
    channels: int
    cell: tuple[int, int] | None  # None for ops without cells
    dtype: torch.dtype  # of the map
    form: str = ""  # which of the op's kernels: "norm", "residual", "gelu"

    def __str__(self) -> str:
        cell = "" if self.cell is None else f", cell {self.cell[0]} x {self.cell[1]}"
        form = f" ({self.form})" if self.form else ""
        return f"{self.op}{form} of {self.channels} channels{cell} in {name_of(self.dtype)}"


class Row(NamedTuple):
    """The result of a case. `error` is the largest difference from the reference, relative to the largest value."""

    op: str
    channels: int
    cell: tuple[int, int] | None
    dtype: torch.dtype
    backend: str
    ok: bool
    error: float
    form: str = ""
    reason: str = ""  # why not ok


# (output, what the kernel computed, what the reference computes in float64), one a tensor
Comparisons = Iterator[tuple[str, Tensor, Tensor]]

# A wrong kernel is off by far more, rounding by far less: the operands of a product keep 21 bits in float32 (three
# products of TF32) and 11 or 8 in float16 and bfloat16, and a result has passed through up to four roundings.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

WIDE = ("total", "mass", "dweight", "dbias")  # results that are float32 whatever the map

FORWARD = {"sample_backward": "sample", "depthwise3x3_backward": "depthwise3x3"}

# Of SViT-S, B and L: super tokens of stages 1 and 2; depthwise convolutions of all stages, and of their conv-FFN with
# the GELU; the stem.
PUBLISHED_CELLS = {64: (8, 8), 96: (8, 8), 128: (4, 4), 192: (4, 4)}
PUBLISHED_HEADS = {64: 1, 96: 2, 128: 2, 192: 3}
PUBLISHED_DIMS = (64, 96, 128, 192, 320, 384, 448, 512, 640)
PUBLISHED_STEMS = (32, 48, 64, 96)

# (case without its backend, device) -> "" or why the backend must not be used, of this process
verdicts: dict[tuple, str] = {}

CHECKING = threading.RLock()  # threads whose first calls come together wait for one verdict

UNFINISHED_CHECKS = 2  # that many processes ended within the check of a case: it crashes


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def case_of(backend: str, op: str, args: tuple) -> Case:
    """The case of a call `op(*args)` (library.py has the schemas)."""
    x, cell, form = args[0], None, ""
    if op in ("associate", "aggregate", "spread"):
        cell = tuple(args[2])
        form = "residual" if op == "spread" and args[4] is not None else ""
    elif op == "sample":
        cell, form = tuple(args[1]), "" if args[3] is None else "norm"
    elif op == "sample_backward":
        x, cell, form = args[1], tuple(args[4]), "" if args[5] is None else "norm"
    elif op in ("depthwise3x3", "depthwise3x3_backward"):
        form = "gelu" if args[3] else ""
    elif op == "super_token_attention":
        cell = tuple(args[1])
    return Case(backend, FORWARD.get(op, op), x.shape[-1], cell, x.dtype, form)


# One small case an op, of two images. Maps are padded: neither side is a whole number of cells or strips.


def numbers(seed: int, *shape: int, scale: float = 1.0, plus: float = 0.0) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return plus + scale * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)


class Inputs:
    """Tensors of a case: as the kernel takes them, and the same in float64 on the CPU."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device

    def map(self, seed: int, *shape: int, **options) -> tuple[Tensor, Tensor]:
        return self.both(numbers(seed, *shape, **options), self.case.dtype)

    def parameter(self, seed: int, *shape: int, **options) -> tuple[Tensor, Tensor]:
        """Of float32: under autocast, and where a model is trained, they are wider than the map."""
        return self.both(numbers(seed, *shape, **options), torch.float32)

    def both(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = t.to(dtype)
        return t.to(self.device), t.double()

    def grid(self) -> tuple[int, int, int, int]:
        """H, W, hh, ww: 3 x 3 cells, so that one has all its neighbours, or 2 x 2 if interpreted; the last are cut."""
        h, w = self.case.cell
        n = 3 if self.device.type == "cuda" else 2
        return n * h - h // 2, n * w - (w + 1) // 3, n, n

    def association(self) -> tuple[Tensor, Tensor]:
        _, _, hh, ww = self.grid()
        h, w = self.case.cell
        return self.both(numbers(3, 2, hh, ww, 9, h * w).softmax(3), self.case.dtype)


def check_associate(kernels: ModuleType, given: Inputs) -> Comparisons:
    C, cell = given.case.channels, list(given.case.cell)
    H, W, hh, ww = given.grid()
    x, x64 = given.map(1, 2, H, W, C)
    s, s64 = given.map(2, 2, hh, ww, C)
    yield "q", kernels.associate(x, s, cell), reference.associate(x64, s64, cell)


def check_aggregate(kernels: ModuleType, given: Inputs) -> Comparisons:
    H, W, _, _ = given.grid()
    cell = list(given.case.cell)
    x, x64 = given.map(1, 2, H, W, given.case.channels)
    q, q64 = given.association()
    yield from zip(("total", "mass"), kernels.aggregate(x, q, cell), reference.aggregate(x64, q64, cell), strict=True)


def check_spread(kernels: ModuleType, given: Inputs) -> Comparisons:
    C, cell = given.case.channels, list(given.case.cell)
    H, W, hh, ww = given.grid()
    s, s64 = given.map(2, 2, hh, ww, C)
    q, q64 = given.association()
    residual, residual64 = given.map(1, 2, H, W, C) if given.case.form == "residual" else (None, None)
    y = kernels.spread(s, q, cell, [H, W], residual)
    yield "y", y, reference.spread(s64, q64, cell, (H, W), residual64)


def check_sample(kernels: ModuleType, given: Inputs) -> Comparisons:
    C, cell, eps = given.case.channels, list(given.case.cell), 1e-6
    H, W, hh, ww = given.grid()
    x, x64 = given.map(1, 2, H, W, C)
    weight = weight64 = bias = bias64 = None
    if given.case.form == "norm":
        weight, weight64 = given.parameter(4, C, scale=0.2, plus=1)
        bias, bias64 = given.parameter(5, C, scale=0.2)
    results = kernels.sample(x, cell, 2, weight, bias, eps)
    expected = reference.sample(x64, cell, 2, weight64, bias64, eps)
    yield from zip(("s", "q", "mass"), results, expected, strict=True)
    grad, grad64 = given.map(6, 2, hh, ww, C)
    q, mass = (t.to(given.device, r.dtype) for t, r in zip(expected[1:], results[1:], strict=True))
    gradients = kernels.sample_backward(grad, x, q, mass, cell, weight, eps)
    expected = reference.sample_backward(grad64, x64, q.double().cpu(), mass.double().cpu(), cell, weight64, eps)
    yield from zip(("dx", "dweight", "dbias"), gradients, expected, strict=True)


def check_depthwise3x3(kernels: ModuleType, given: Inputs) -> Comparisons:
    C, gelu = given.case.channels, given.case.form == "gelu"
    # More than one strip of rows and of columns on a GPU; an interpreter takes seconds for that.
    shape = (2, 15, 17, C) if given.device.type == "cuda" else (1, 5, 7, C)
    x, x64 = given.map(1, *shape)
    weight, weight64 = given.parameter(7, C, 1, 3, 3)
    bias, bias64 = given.parameter(5, C)
    yield "y", kernels.depthwise3x3(x, weight, bias, gelu), reference.depthwise3x3(x64, weight64, bias64, gelu)
    grad, grad64 = given.map(6, *shape)
    gradients = kernels.depthwise3x3_backward(grad, x, weight, gelu)
    expected = reference.depthwise3x3_backward(grad64, x64, weight64, gelu)
    yield from zip(("dx", "dweight", "dbias"), gradients, expected, strict=True)


def check_bias_gelu_affine(kernels: ModuleType, given: Inputs) -> Comparisons:
    C = given.case.channels
    x, x64 = given.map(1, 2, 15, 17, C)
    vectors = [given.parameter(seed, C) for seed in (5, 4, 11)]
    ours, exact = zip(*vectors, strict=True)
    yield "y", kernels.bias_gelu_affine(x, *ours), reference.bias_gelu_affine(x64, *exact)


def check_super_token_attention(kernels: ModuleType, given: Inputs) -> Comparisons:
    C, (h, w) = given.case.channels, given.case.cell
    x, x64 = given.map(1, 2, 3 * h, 2 * w, C)
    parameters = [
        given.parameter(4, C, scale=0.2, plus=1),
        given.parameter(5, C, scale=0.2),
        given.parameter(8, 3 * C, C, scale=C**-0.5),
        given.parameter(9, 3 * C, scale=0.3),
        given.parameter(10, C, C, scale=C**-0.5),
        given.parameter(11, C, scale=0.3),
        given.map(12, 2, C, scale=0.3, plus=1),
    ]
    heads = PUBLISHED_HEADS[C]

    def run(function: Callable, x: Tensor, which: int) -> tuple[Tensor, ...]:
        weight, bias, qkv, qkv_bias, proj, proj_bias, scale = (p[which] for p in parameters)
        return function(x, [h, w], weight, bias, 1e-6, qkv, qkv_bias, proj, proj_bias, scale, heads, True)

    results, expected = run(kernels.super_token_attention, x, 0), run(reference.super_token_attention, x64, 1)
    yield from zip(("y", "s", "q", "mass"), results, expected, strict=True)


def check_conv_ffn(kernels: ModuleType, given: Inputs) -> Comparisons:
    C = given.case.channels
    tensors = [
        given.map(1, 2, 15, 17, C),
        given.map(2, 2, 15, 17, C),
        given.map(8, 4 * C, C, scale=C**-0.5),
        given.parameter(9, 4 * C, scale=0.3),
        given.parameter(7, 4 * C, 1, 3, 3, scale=0.4),
        given.parameter(5, 4 * C, scale=0.3),
        given.map(10, C, 4 * C, scale=0.5 * C**-0.5),
        given.parameter(11, C, scale=0.3),
    ]
    ours, exact = zip(*tensors, strict=True)
    yield "y", kernels.conv_ffn(*ours), reference.conv_ffn(*exact)


# Ops that can be checked; a new one wants a function here.
CHECKS: dict[str, Callable[[ModuleType, Inputs], Comparisons]] = {
    "associate": check_associate,
    "aggregate": check_aggregate,
    "spread": check_spread,
    "sample": check_sample,
    "depthwise3x3": check_depthwise3x3,
    "bias_gelu_affine": check_bias_gelu_affine,
    "super_token_attention": check_super_token_attention,
    "conv_ffn": check_conv_ffn,
}


def check(case: Case, kernels: ModuleType, device: torch.device | str) -> Row:
    """Runs a case on `device`. An exception of the backend is a result too; lack of memory is none, and is raised."""
    largest, reasons = 0.0, []
    tolerance = TOLERANCE[case.dtype]
    with ExitStack() as stack:
        # Whatever surrounds the first call must neither see nor change the case.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", torch.device(device).type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for name, actual, expected in CHECKS[case.op](kernels, Inputs(case, torch.device(device))):
                dtype = torch.float32 if name in WIDE else case.dtype
                if actual.shape != expected.shape:
                    reasons.append(f"{name} is {list(actual.shape)} instead of {list(expected.shape)}")
                elif actual.dtype != dtype:
                    reasons.append(f"{name} is {name_of(actual.dtype)} instead of {name_of(dtype)}")
                elif actual.numel():
                    difference = (actual.double().cpu() - expected).abs().max() / expected.abs().max()
                    error = difference.item() if difference.isfinite() else float("inf")
                    largest = max(largest, error)
                    if error > tolerance:
                        reasons.append(f"{name} is off by {error:.2g} of its largest value")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if "out of memory" in str(error).lower():
                raise
            return row(case, float("inf"), f"{type(error).__name__}: {error}")
    reason = f"{', '.join(reasons)}; at most {tolerance:.0e} is rounding" if reasons else ""
    return row(case, largest, reason)


def row(case: Case, error: float, reason: str) -> Row:
    return Row(*case[1:5], case.backend, not reason, error, case.form, reason)


def published_cases(backend: str, ops: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """The cases of the published models for those of `ops` that are forward ops, in each dtype."""
    cases = []
    for dtype in dtypes:
        for op in ops:
            if op == "depthwise3x3":
                cases += [Case(backend, op, C, None, dtype) for C in PUBLISHED_DIMS]
                cases += [Case(backend, op, 4 * C, None, dtype, "gelu") for C in PUBLISHED_DIMS]
            elif op == "conv_ffn":
                cases += [Case(backend, op, C, None, dtype) for C in PUBLISHED_CELLS]
            elif op == "bias_gelu_affine":
                cases += [Case(backend, op, C, None, dtype) for C in PUBLISHED_STEMS]
            elif op not in FORWARD:
                forms = {"spread": ("", "residual"), "sample": ("", "norm")}.get(op, ("",))
                cases += [Case(backend, op, C, cell, dtype, f) for C, cell in PUBLISHED_CELLS.items() for f in forms]
    return cases


# Verdicts: of this process in `verdicts`, of earlier ones in a file each.


def enabled() -> bool:
    return os.environ.get("SVIT_SELF_CHECK") != "0"


def cache_folder() -> Path:
    if chosen := os.environ.get("SVIT_CACHE_DIR"):
        return Path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "svit"
    try:
        return Path.home() / ".cache" / "svit"
    except RuntimeError:  # a user without a home, as containers have: nothing can be written below this
        return Path(os.devnull) / "svit"


@functools.cache
def build() -> bytes:
    """What the checks themselves are: a verdict of weaker ones does not count."""
    return hashlib.sha256(Path(__file__).read_bytes()).digest()


def verdict_folder(backend: str, fingerprint: str) -> Path:
    digest = hashlib.sha256(fingerprint.encode() + build()).hexdigest()[:16]
    return cache_folder() / "self-check" / f"{backend}-{digest}"


def verdict_file(case: Case, fingerprint: str) -> Path:
    cell = "" if case.cell is None else f"-{case.cell[0]}x{case.cell[1]}"
    form = f"-{case.form}" if case.form else ""
    name = f"{case.op}{form}-{case.channels}{cell}-{name_of(case.dtype)}.json"
    return verdict_folder(case.backend, fingerprint) / name


def read(path: Path) -> dict[str, Any]:
    """What a file says; nothing if there is none, or it cannot be understood."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(path.read_text())
        counts = found.get("pid", 0), found.get("begun", 0)
        if isinstance(found.get("ok"), bool) and all(isinstance(n, int) for n in counts):
            return found
    return {}


def write(path: Path, verdict: dict[str, Any]) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps(verdict))


def alive(pid: int) -> bool:
    if sys.platform == "win32":  # where os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def kept_verdict(path: Path) -> str | None:
    """ "" or why not, as `verdict` gives it; None if no process has come to one."""
    found = read(path)
    if not found or "pid" in found:
        return None
    return "" if found["ok"] else str(found.get("reason"))


def unfinished(found: dict[str, Any]) -> int:
    """How many processes of this machine ended within the check."""
    if "pid" not in found or found.get("host") != socket.gethostname() or alive(int(found["pid"])):
        return 0
    return int(found.get("begun", 1))


def verdict(case: Case, kernels: ModuleType, device: torch.device) -> str:
    """ "" or why the backend must not be used: from disk, else by running the case, which is then kept there."""
    fingerprint = kernels.fingerprint(device)
    path = verdict_file(case, fingerprint)
    if (kept := kept_verdict(path)) is not None:
        return kept
    begun = unfinished(read(path))
    if begun >= UNFINISHED_CHECKS:
        return f"{begun} processes ended while they checked it; delete {path} to have it checked again"
    # A kernel may take the whole process with it: the next one finds this.
    write(path, {"ok": False, "pid": os.getpid(), "host": socket.gethostname(), "begun": begun + 1})
    try:
        result = check(case, kernels, device)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    store(path, result, fingerprint)
    return result.reason


def store(path: Path, result: Row, fingerprint: str) -> None:
    kept = {"ok": result.ok, "error": result.error, "reason": result.reason, "of": fingerprint}
    write(path, kept)


def problem(case: Case, kernels: ModuleType, device: torch.device) -> str | None:
    """ "" where the backend may run the case, a reason where it must not, None where nobody can tell now.

    Nothing is run while a stream is captured into a CUDA graph. A case without a verdict then passes on a device where
    others have been checked.
    """
    if (known := verdicts.get((case, device))) is not None:
        return known
    fingerprint = getattr(kernels, "fingerprint", None)
    if fingerprint is None or case.op not in CHECKS or not enabled():
        return ""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        kept = kept_verdict(verdict_file(case, fingerprint(device)))
        if kept is None and others_are_checked(case.backend, kernels, device):
            return ""
        return kept
    with CHECKING:
        if (case, device) not in verdicts:
            verdicts[case, device] = verdict(case, kernels, device)
        return verdicts[case, device]


def others_are_checked(backend: str, kernels: ModuleType, device: torch.device) -> bool:
    here = any(case.backend == backend and where == device for case, where in verdicts)
    return here or bool(kept_files(backend, kernels, device))


def kept_files(backend: str, kernels: ModuleType, device: torch.device) -> list[Path]:
    """The verdicts on disk; none if their folder cannot be read."""
    with suppress(OSError):
        return [*verdict_folder(backend, kernels.fingerprint(device)).glob("*.json")]
    return []


def check_and_keep(case: Case, kernels: ModuleType, device: torch.device) -> Row:
    """Runs a case and replaces what was known of it."""
    result = check(case, kernels, device)
    fingerprint = kernels.fingerprint(device)
    store(verdict_file(case, fingerprint), result, fingerprint)
    verdicts[case, device] = result.reason
    return result


def serves(kernels: ModuleType, case: Case, device: torch.device) -> bool:
    """Whether a backend says that it can run a published case."""
    x = torch.empty(0, 56, 56, case.channels, device=device, dtype=case.dtype)
    sizes = {}
    if case.op == "super_token_attention":
        sizes = {"cell": case.cell, "num_heads": PUBLISHED_HEADS[case.channels]}
    elif case.op == "conv_ffn":
        sizes = {"hidden": 4 * case.channels}
    return kernels.usable(case.op, x, **sizes)[0]


def summary(backend: str, kernels: ModuleType, device: torch.device) -> str:
    """How many cases have a verdict on disk, and which are wrong."""
    found = {path.stem: kept_verdict(path) for path in kept_files(backend, kernels, device)}
    wrong = [f"{name} ({reason})" for name, reason in sorted(found.items()) if reason]
    right = sum(reason == "" for reason in found.values())
    return ", ".join([f"{right} cases right", *(f"wrong: {w}" for w in wrong)]) if found else "none has run yet"
