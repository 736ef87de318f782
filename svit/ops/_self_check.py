"""The self-check: before its first real call, a fused backend runs one small case and is compared with the reference.

`problem` gives the verdict for one call of an op: from memory, from disk, or by running the case. `self_check` runs
every published shape. An operator's self_check.py says what a case runs and compares. A verdict holds for a backend's
build (`fingerprint`), op, channels, cell and dtype.

Verdicts are stored in the user's cache folder: `SVIT_CACHE_DIR`, else `$XDG_CACHE_HOME/svit`, else `~/.cache/svit`. If
that folder is not writable, each process checks again. `SVIT_SELF_CHECK=0` turns the check before the first call off.
"""

import functools
import hashlib
import inspect
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from svit.files import atomic_write


class Case(NamedTuple):
    """The case that a verdict is about."""

    backend: str
    op: str  # a forward op; the case includes its backward op, if there is one
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
    reason: str = ""  # if not ok


# For each output tensor: (its name, the kernel's result, the reference's result in float64)
Comparisons = Iterator[tuple[str, Tensor, Tensor]]

# A wrong kernel exceeds these by far, and rounding stays far below: the operands of a product have 21 bits in float32
# (three products of TF32) and 11 or 8 in float16 and bfloat16, and a result is rounded up to four times.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

FLOAT32_RESULTS = ("total", "mass", "dweight", "dbias")  # whatever the dtype of the map

# Of SViT-S, B and L: channels -> cell and heads of the stages with super tokens.
PUBLISHED_CELLS = {64: (8, 8), 96: (8, 8), 128: (4, 4), 192: (4, 4)}
PUBLISHED_HEADS = {64: 1, 96: 2, 128: 2, 192: 3}

# (case, device) -> "" or why the backend must not be used, of this process
verdicts: dict[tuple[Case, torch.device], str] = {}

CHECKING = threading.RLock()  # threads with simultaneous first calls wait for one verdict

UNFINISHED_CHECKS = 2  # if so many processes ended during the check of a case, it counts as crashing


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Each op has one small case of two images. Maps need padding: no side is a multiple of the cell or of a strip.


def numbers(seed: int, *shape: int, scale: float = 1.0, plus: float = 0.0) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return plus + scale * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)


class Inputs:
    """Tensors of a case: as the kernel takes them, and in float64 on the CPU."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device

    def map(self, seed: int, *shape: int, **options: float) -> tuple[Tensor, Tensor]:
        return self.both(numbers(seed, *shape, **options), self.case.dtype)

    def parameter(self, seed: int, *shape: int, **options: float) -> tuple[Tensor, Tensor]:
        """In float32: under autocast, parameters have more bits than the map."""
        return self.both(numbers(seed, *shape, **options), torch.float32)

    def both(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        t = t.to(dtype)
        return t.to(self.device), t.double()

    @property
    def cell(self) -> tuple[int, int]:
        assert self.case.cell is not None, f"{self.case.op} has no cells"
        return self.case.cell

    def grid(self) -> tuple[int, int, int, int]:
        """H, W, hh, ww: 3 x 3 cells, so that one has all neighbours, or 2 x 2 if interpreted. The last are cropped."""
        h, w = self.cell
        n = 3 if self.device.type == "cuda" else 2
        return n * h - h // 2, n * w - (w + 1) // 3, n, n

    def association(self) -> tuple[Tensor, Tensor]:
        _, _, hh, ww = self.grid()
        h, w = self.cell
        return self.both(numbers(3, 2, hh, ww, 9, h * w).softmax(3), self.case.dtype)


class Rule(NamedTuple):
    """How an op is checked."""

    map: int  # position of the map among the arguments
    cell: int | None  # position of the cell
    form: tuple[int, str] | None  # position of the argument that sets the form unless it is None or False; the form
    forward: str  # the op whose case covers this one: the op itself, or for a backward op the forward op
    compare: Callable[[Any, Inputs], Comparisons] | None  # runs a case of the forward op
    published: tuple[tuple[Any, ...], ...]  # (channels, cell, form) of the published models
    sizes: Callable[[Case], dict[str, Any]]  # what else the choice of a backend depends on


RULES: dict[str, Rule] = {}


def add(
    op: str,
    map: int = 0,
    cell: int | None = None,
    form: tuple[int, str] | None = None,
    compare: Callable[[Any, Inputs], Comparisons] | None = None,
    published: Iterable[tuple[Any, ...]] = (),
    sizes: Callable[[Case], dict[str, Any]] = lambda case: {},
    forward: str | None = None,
) -> None:
    """Adds the rule by which an op is checked. See `Rule`."""
    RULES[op] = Rule(map, cell, form, forward or op, compare, tuple(published), sizes)


def check(case: Case, kernels: Any, device: torch.device | str) -> Row:
    """Runs a case on `device`. An exception of the backend is a result; out of memory is raised."""
    largest, reasons = 0.0, []
    tolerance = TOLERANCE[case.dtype]
    with ExitStack() as stack:
        # Modes around the first call must neither see nor change the case.
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", torch.device(device).type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            compare = RULES[case.op].compare
            assert compare is not None, f"{case.op} is no forward op"
            for name, actual, expected in compare(kernels, Inputs(case, torch.device(device))):
                dtype = torch.float32 if name in FLOAT32_RESULTS else case.dtype
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
    return [
        Case(backend, op, channels, cell, dtype, form)
        for dtype in dtypes
        for op in ops
        for channels, cell, form in RULES[op].published
    ]


# Verdicts of this process are in `verdicts`, those of earlier processes in one file each.


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
    """A digest of the checks: a verdict of other checks does not count."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in sorted({rule.compare.__module__ for rule in RULES.values() if rule.compare is not None}):
        digest.update(Path(inspect.getfile(sys.modules[name])).read_bytes())
    return digest.digest()


def verdict_folder(backend: str, fingerprint: str) -> Path:
    digest = hashlib.sha256(fingerprint.encode() + build()).hexdigest()[:16]
    return cache_folder() / "self-check" / f"{backend}-{digest}"


def verdict_file(case: Case, fingerprint: str) -> Path:
    cell = "" if case.cell is None else f"-{case.cell[0]}x{case.cell[1]}"
    form = f"-{case.form}" if case.form else ""
    name = f"{case.op}{form}-{case.channels}{cell}-{name_of(case.dtype)}.json"
    return verdict_folder(case.backend, fingerprint) / name


def read(path: Path) -> dict[str, Any]:
    """The content of a file, or {} if there is none or it is damaged."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        found = json.loads(path.read_text())
        counts = found.get("pid", 0), found.get("begun", 0)
        if isinstance(found.get("ok"), bool) and all(isinstance(n, int) for n in counts):
            return found
    return {}


def write(path: Path, verdict: dict[str, Any]) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(json.dumps(verdict))


def alive(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def kept_verdict(path: Path) -> str | None:
    """The verdict in a file, as `verdict` returns it, or None if there is none."""
    found = read(path)
    if not found or "pid" in found:
        return None
    return "" if found["ok"] else str(found.get("reason"))


def unfinished(found: dict[str, Any]) -> int:
    """How many processes of this machine ended during the check."""
    if "pid" not in found or found.get("host") != socket.gethostname() or alive(int(found["pid"])):
        return 0
    return int(found.get("begun", 1))


def verdict(case: Case, kernels: Any, device: torch.device) -> str:
    """ "" or why the backend must not be used: from disk, else by running the case and storing the result."""
    fingerprint = kernels.fingerprint(device)
    path = verdict_file(case, fingerprint)
    if (kept := kept_verdict(path)) is not None:
        return kept
    begun = unfinished(read(path))
    if begun >= UNFINISHED_CHECKS:
        return f"{begun} processes ended while they checked it; delete {path} to have it checked again"
    # A kernel may crash the process. The next process finds this note.
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


def problem(case: Case, kernels: Any, device: torch.device) -> str | None:
    """ "" if the backend may run the case, a reason if it must not, None if that cannot be found out now.

    While a stream is captured into a CUDA graph, no case runs. A case without a verdict then passes if other cases have
    been checked on this device.
    """
    if (known := verdicts.get((case, device))) is not None:
        return known
    fingerprint = getattr(kernels, "fingerprint", None)
    if fingerprint is None or RULES[case.op].compare is None or not enabled():
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


def others_are_checked(backend: str, kernels: Any, device: torch.device) -> bool:
    here = any(case.backend == backend and where == device for case, where in verdicts)
    return here or bool(kept_files(backend, kernels, device))


def kept_files(backend: str, kernels: Any, device: torch.device) -> list[Path]:
    """The files of verdicts, or none if their folder cannot be read."""
    with suppress(OSError):
        return [*verdict_folder(backend, kernels.fingerprint(device)).glob("*.json")]
    return []


def check_and_keep(case: Case, kernels: Any, device: torch.device) -> Row:
    """Runs a case and replaces its earlier verdict."""
    result = check(case, kernels, device)
    fingerprint = kernels.fingerprint(device)
    store(verdict_file(case, fingerprint), result, fingerprint)
    verdicts[case, device] = result.reason
    return result


def serves(kernels: Any, case: Case, device: torch.device) -> bool:
    """Whether a backend says that it can run a published case."""
    x = torch.empty(0, 56, 56, case.channels, device=device, dtype=case.dtype)
    return kernels.usable(case.op, x, **RULES[case.op].sizes(case))[0]


def summary(backend: str, kernels: Any, device: torch.device) -> str:
    """Text: how many cases on disk are right, and which are wrong."""
    found = {path.stem: kept_verdict(path) for path in kept_files(backend, kernels, device)}
    wrong = [f"{name} ({reason})" for name, reason in sorted(found.items()) if reason]
    right = sum(reason == "" for reason in found.values())
    return ", ".join([f"{right} cases right", *(f"wrong: {w}" for w in wrong)]) if found else "none has run yet"
