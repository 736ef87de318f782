"""The one place that knows backends: which there are, which one runs an op, what happens when one fails.

Operators fill the registry (their registration.py); nothing here knows an operator. A backend is an object with
`usable(op, x, **sizes) -> (bool, reason)`, `OPS`, the names of the ops that it has, a function for each of them, and,
for the self-check, `fingerprint(device)`.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import _self_check


class Backend(SimpleNamespace):
    """What computes ops, one attribute each."""

    def __init__(
        self,
        usable: Callable[..., tuple[bool, str]],
        fingerprint: Callable[[torch.device], str] | None = None,
    ) -> None:
        super().__init__(usable=usable, fingerprint=fingerprint, OPS=())

    def implement(self, **functions: Callable) -> None:
        """Adds ops, each with its function."""
        self.OPS += tuple(functions)
        vars(self).update(functions)


# In the order of preference: the first usable one is taken. The reference, which serves everything, comes after them.
BACKENDS: dict[str, Backend] = {}
REFERENCE = Backend(lambda op, x, **sizes: (True, ""))

# Ops that can be made of the others.
COMPOSITE_OPS: set[str] = set()

# Those that are never chosen, and why: a name must ask for them.
OPT_IN = {"cuda": "no training with it has been timed yet, a name must ask for it"}

# (backend, op, channels, dtype) -> why it broke in this process: the backend is not chosen again for these.
failures: dict[tuple, str] = {}


class Repetition(threading.local):
    """Of this thread: the failures that choices go by instead, while it repeats a computation."""

    failures: dict[tuple, str] | None = None


repetition = Repetition()


def add_backend(name: str, usable: Callable, fingerprint: Callable | None = None) -> Backend:
    """A new backend, preferred to those that come after it."""
    BACKENDS[name] = Backend(usable, fingerprint)
    return BACKENDS[name]


@contextmanager
def choosing_by(known: dict[tuple, str]) -> Iterator[None]:
    """Choices as they were when `failures` were `known`: steps that run again for their backward must be the same.

    An op still runs on a backend that has not failed.
    """
    before, repetition.failures = repetition.failures, known
    try:
        yield
    finally:
        repetition.failures = before


def has(name: str, op: str) -> bool:
    """Whether a backend has an op at all."""
    return op in getattr(BACKENDS[name], "OPS", (op,))


def usable(name: str, op: str, x: torch.Tensor, **sizes) -> tuple[bool, str]:
    """Whether a backend that nobody asked for serves `op` on the map x (B, H, W, C), and if not, why.

    `sizes` are what else the choice depends on, for ops that have such (see the backends' `usable`).
    """
    known = failures if torch.compiler.is_compiling() or repetition.failures is None else repetition.failures
    if (key := (name, op, x.shape[-1], x.dtype)) in known:
        return False, known[key]
    serves, reason = BACKENDS[name].usable(op, x, **sizes)
    return (False, OPT_IN[name]) if serves and name in OPT_IN else (serves, reason)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which look into PyTorch's operations only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether torch.export writes down what runs, also on the way to ONNX or AOTInductor."""
    # Not torch.compiler.is_exporting(), which is true under torch.compile too (PyTorch 2.11).
    return getattr(torch.compiler, "_is_exporting_flag", False)


def has_function_mode() -> bool:
    """Whether a mode of `__torch_function__` is on, other than that of `torch.device`, which all factories know."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


class Plan(NamedTuple):
    """What a layer has chosen for one call: nothing below it chooses again."""

    op: str  # that was chosen for
    backend: str  # that runs it
    ops: SimpleNamespace  # functions of ops, to be called: `plan.ops.sample(x, ...)`
    direct: bool  # whether they go past PyTorch's dispatcher and the checks of the ops


class Functions(SimpleNamespace):
    """Functions of ops: through PyTorch's dispatcher, with the checks of the ops, or straight to a backend."""

    def __init__(self, backend: str | None, asked: str | None) -> None:
        super().__init__()
        for op in REFERENCE.OPS:
            function = partial(getattr(torch.ops.svit, op), backend=asked)
            vars(self)[op] = function if backend is None else partial(execute, backend, op, asked)


# (backend, or None for the dispatcher, and the name that was asked for or None) -> the functions, made once.
functions: dict[tuple[str | None, str | None], Functions] = {}


def make_functions() -> None:
    """Those through the dispatcher, once all ops are there: torch.compile cannot make them on its way."""
    functions.update({(None, asked): Functions(None, asked) for asked in (None, *BACKENDS)})


def choose(op: str, x: torch.Tensor, backend: str | None = None, strict: bool = True, **sizes) -> str:
    """Name of the backend that runs `op` on the map x (B, H, W, C): the one asked for, else the first usable one.

    `strict` is whether the one asked for has to serve x; if not, and it does not, the choice goes on.

    In a trace (torch.jit.trace, torch.fx) and under torch.func's transforms or forward-mode AD it is the reference,
    whatever was asked for. A backend of composite ops only has no say over primitives: asking for it leaves the choice.

    Raises:
        ValueError: no such backend, or it does not serve x though it must.
    """
    if "must" in sizes:
        warnings.warn("choose: `must` is deprecated, use `strict`", DeprecationWarning, stacklevel=2)
        strict = sizes.pop("must")
    return choose_plan(op, x, backend, (), strict, **sizes).backend


def choose_plan(
    op: str,
    x: torch.Tensor,
    backend: str | None = None,
    parameters: Sequence[tuple[torch.Tensor, tuple[int, ...]]] = (),
    strict: bool = True,
    **sizes,
) -> Plan:
    """`choose` for a layer: the backend, and how to call it.

    `parameters` are those that kernels will read, each with the shape that it must have to go past the checks.
    """
    if backend is not None and backend != "reference" and backend not in BACKENDS:
        names = ", ".join((*BACKENDS, "reference"))
        raise ValueError(f"backend: expected one of {names} or None, got {backend!r}")
    # A trace is for other programs to read (ONNX, TorchScript, FLOP counters), which know PyTorch's operations only.
    if backend == "reference" or not isinstance(x, torch.Tensor) or torch.jit.is_tracing():
        return Plan(op, "reference", REFERENCE, False)
    compiles = torch.compiler.is_compiling()
    # `transformed`, spelled out like `usable` below: this is asked at each step of a model.
    if not compiles and (torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0):
        return Plan(op, "reference", REFERENCE, False)
    name = None
    if backend is not None:
        if has(backend, op):
            serves, reason = BACKENDS[backend].usable(op, x, **sizes)
            if serves:
                name = backend
            elif strict:
                raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}")
        elif op in COMPOSITE_OPS:
            return Plan(op, "reference", REFERENCE, False)  # made of primitives, which the one that was asked for has
    if name is None:
        known = failures if compiles or repetition.failures is None else repetition.failures
        for candidate, kernels in BACKENDS.items():
            if candidate in OPT_IN or op not in getattr(kernels, "OPS", (op,)):
                continue
            if (candidate, op, x.shape[-1], x.dtype) not in known and kernels.usable(op, x, **sizes)[0]:
                name = candidate
                break
        else:
            return Plan(op, "reference", REFERENCE, False)
    # What only a name asks for is always checked.
    direct = name not in OPT_IN and is_unobserved(x, parameters)
    key = (name if direct else None), backend
    if key not in functions:
        functions[key] = Functions(*key)
    return Plan(op, name, functions[key], direct)


def is_unobserved(x: torch.Tensor, parameters: Sequence[tuple[torch.Tensor, tuple[int, ...]]]) -> bool:
    """Whether PyTorch runs operations on x one by one and nobody looks at them: no autograd, compiler or mode.

    What traces and transforms has been asked about before: `choose` gives them the reference.
    """
    if type(x) is not torch.Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and has_function_mode()):
        return False
    for t, shape in parameters:  # what does not fit is for the op to name
        if t is None or t.shape != shape or t.device != x.device or not t.is_contiguous():
            return False
    return True


def run(op: str, backend: str | None, sizes: dict, x: torch.Tensor, *args):
    """Runs `op` of the backend that serves x, or of the next one should it fail.

    Raises:
        ValueError: the backend that was asked for does not serve x, or fails its self-check.
    """
    with choosing_by(failures):
        name = choose(op, x, backend, **sizes)
    if name == "reference":
        return run_reference(op, args)
    return execute(name, op, backend, *args, **sizes)


def run_reference(op: str, args: tuple):
    results = getattr(REFERENCE, op)(*args)
    return results.contiguous() if torch.is_tensor(results) else tuple(t.contiguous() for t in results)


def execute(name: str, op: str, asked: str | None, *args, **sizes):
    """Runs `op` of backend `name` on contiguous tensors, after its self-check at the first call.

    A backend that was chosen, not asked for, may fail: then the next one runs, now and hereafter. The failures meant
    here are those of the self-check, and of compiling and launching kernels. Lack of memory is not one of them; a
    caller's error has been found before.
    """
    backend, rule = BACKENDS[name], _self_check.RULES[op]
    x = args[rule.map]
    cell = None if rule.cell is None else tuple(args[rule.cell])
    form = rule.form[1] if rule.form and args[rule.form[0]] is not None and args[rule.form[0]] is not False else ""
    case = _self_check.Case(name, rule.forward, x.shape[-1], cell, x.dtype, form)
    if getattr(backend, "fingerprint", None) and _self_check.verdicts.get((case, x.device)) != "":
        problem = _self_check.problem(case, backend, x.device)
        if problem is None:
            return run_reference(op, args)
        if problem:
            reason = f"it failed its self-check: {problem}"
            if asked is not None:
                raise ValueError(f"backend: {asked!r} cannot run {op} here: {reason}")
            leave_out(name, case, reason)
            return run(op, asked, sizes, args[0], *args)
    try:
        return getattr(backend, op)(*args)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if asked is not None or "out of memory" in str(error).lower():
            raise
        reason = f"it failed before: {type(error).__name__}: {error}"
    leave_out(name, case._replace(op=op), reason)
    return run(op, asked, sizes, args[0], *args)


def leave_out(name: str, case: _self_check.Case, reason: str) -> None:
    """Keeps a backend from being chosen again for an op, its channels and dtype, and warns."""
    forward, backward = ((name, op, case.channels, case.dtype) for op in (case.op, f"{case.op}_backward"))
    if failures.setdefault(forward, reason) is not reason:
        return  # another thread was here first
    failures[backward] = reason
    what = f"{case.op} of {case.channels} channels in {case.dtype}"
    warnings.warn(f"svit.ops: the {name} backend is left out for {what} from now on, {reason}", stacklevel=3)


def self_check(device: str | torch.device | None = None) -> list[_self_check.Row]:
    """Runs every fused op on `device` against the reference, forward and backward, at the shapes of SViT-S, B and L.

    Two small padded maps a shape, in float32, bfloat16 and float16. The verdicts are kept, and replace those of an
    earlier check (see _self_check.py). Nothing is drawn from PyTorch's random state.

    Args:
        device: the current GPU if None, or the CPU where there is none, on which only an interpreted backend runs.

    Returns:
        rows (op, channels, cell, dtype, backend, ok, error, form, reason), `error` relative to the largest value; none
        where no fused backend serves the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.empty(0, device=device).device  # with its index
    cases = checkable(device)
    return [_self_check.check_and_keep(case, BACKENDS[name], device) for name in cases for case in cases[name]]


def checkable(device: torch.device) -> dict[str, list[_self_check.Case]]:
    """The published cases of each backend that serves `device`, asked for by name or not."""
    found = {}
    for name, backend in BACKENDS.items():
        if getattr(backend, "fingerprint", None) is None:
            continue
        cases = _self_check.published_cases(name, backend.OPS, (torch.float32, torch.bfloat16, torch.float16))
        if served := [case for case in cases if _self_check.serves(backend, case, device)]:
            found[name] = served
    return found


def info() -> None:
    """Prints which backend serves each device and dtype of this machine, and why not the ones before it."""
    from . import cuda, triton  # for what is installed

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    print(f"svit.ops, torch {torch.__version__}, {triton.version}, {cuda.version}")
    for device in devices:
        if device != "cpu":
            print(f"{device}: {torch.cuda.get_device_name(device)}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            print(f"{device:8} {str(dtype).removeprefix('torch.'):8} -> {choice('sample', device, dtype)}")
        print(f"{device:8} half a block in one kernel -> {choice('conv_ffn', device, torch.bfloat16, hidden=256)}")
        for name in checkable(torch.device(device)):
            print(f"{device:8} self-check of {name}: {_self_check.summary(name, BACKENDS[name], torch.device(device))}")


def choice(op: str, device: str, dtype: torch.dtype, **sizes) -> str:
    """What runs an op on maps of 64 channels, and why not the ones before it."""
    x = torch.empty(0, 1, 1, 64, device=device, dtype=dtype)
    answers = {name: usable(name, op, x, **sizes) for name in BACKENDS if has(name, op)}
    why = [f"not {name}: {reason}" for name, (serves, reason) in answers.items() if not serves]
    return ", ".join([choose(op, x, **sizes), *why])
