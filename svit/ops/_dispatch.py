"""The registry of backends: which exist, which one runs an op, what happens when one fails.

Operators fill the registry in their registration.py; this module knows no operator. A backend is an object with
`usable(op, x, **sizes) -> (bool, reason)`, the names of its ops (`OPS`), a function for each of these ops and, for the
self-check, `fingerprint(device)`.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import _self_check


class Backend(SimpleNamespace):
    """An implementation of ops, one attribute each."""

    def __init__(
        self,
        usable: Callable[..., tuple[bool, str]],
        fingerprint: Callable[[torch.device], str] | None = None,
    ) -> None:
        super().__init__(usable=usable, fingerprint=fingerprint, OPS=())

    def implement(self, **functions: Callable[..., Any] | None) -> None:
        """Adds ops, each with its function."""
        self.OPS += tuple(functions)
        vars(self).update(functions)


# In the order of preference: the first usable backend runs. The reference comes last and serves everything.
BACKENDS: dict[str, Backend] = {}
REFERENCE = Backend(lambda op, x, **sizes: (True, ""))

# Ops that can be made of primitives.
COMPOSITE_OPS: set[str] = set()

# Backends that run only if named, and why.
OPT_IN = {"cuda": "no training with it has been timed yet, a name must ask for it"}

# (backend, op, channels, dtype) -> why it failed in this process. The backend is not chosen again for these.
Failures = dict[tuple[str, str, int, torch.dtype], str]
failures: Failures = {}


class Repetition(threading.local):
    """Of this thread: the failures that choices depend on while it repeats a computation, in place of `failures`."""

    failures: Failures | None = None


repetition = Repetition()


def add_backend(
    name: str, usable: Callable[..., tuple[bool, str]], fingerprint: Callable[[torch.device], str] | None = None
) -> Backend:
    """Adds a backend. It is preferred to those that are added later."""
    BACKENDS[name] = Backend(usable, fingerprint)
    return BACKENDS[name]


@contextmanager
def choosing_by(known: Failures) -> Iterator[None]:
    """Chooses as if `failures` were `known`, so that a step that runs again for its backward takes the same path.

    An op still runs on a backend that has not failed.
    """
    before, repetition.failures = repetition.failures, known
    try:
        yield
    finally:
        repetition.failures = before


def has(name: str, op: str) -> bool:
    """Whether a backend implements an op."""
    return op in getattr(BACKENDS[name], "OPS", (op,))


def usable(name: str, op: str, x: torch.Tensor, **sizes: Any) -> tuple[bool, str]:
    """Whether a backend may run `op` on the map x (B, H, W, C) without being named, and if not, why.

    `sizes` are the further sizes that the choice depends on (see the backends' `usable`).
    """
    known = failures if torch.compiler.is_compiling() or repetition.failures is None else repetition.failures
    if (key := (name, op, x.shape[-1], x.dtype)) in known:
        return False, known[key]
    serves, reason = BACKENDS[name].usable(op, x, **sizes)
    return (False, OPT_IN[name]) if serves and name in OPT_IN else (serves, reason)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is active. Both know PyTorch's own operations only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def exporting() -> bool:
    """Whether torch.export records what runs, also on the way to ONNX or AOTInductor."""
    # torch.compiler.is_exporting() is true under torch.compile too (PyTorch 2.11).
    return getattr(torch.compiler, "_is_exporting_flag", False)


def has_function_mode() -> bool:
    """Whether a mode of `__torch_function__` is on, other than that of `torch.device`, which places new tensors."""
    if torch._C._len_torch_function_stack() == 0:
        return False
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


class Plan(NamedTuple):
    """A layer's choice for one call.

    Straight to a backend, nothing below the layer chooses again. Through PyTorch's dispatcher the op checks its
    arguments and chooses once more, since others may call it, too.
    """

    op: str  # the op that the choice is about
    backend: str  # the backend that runs it
    ops: SimpleNamespace  # the ops as functions: `plan.ops.sample(x, ...)`
    direct: bool  # whether these bypass PyTorch's dispatcher and the argument checks


class Functions(SimpleNamespace):
    """The ops as functions: through PyTorch's dispatcher and the argument checks, or straight to a backend."""

    def __init__(self, backend: str | None, asked: str | None) -> None:
        super().__init__()
        for op in REFERENCE.OPS:
            function = partial(getattr(torch.ops.svit, op), backend=asked)
            vars(self)[op] = function if backend is None else partial(execute, backend, op, asked)


# (backend, or None for the dispatcher; requested name or None) -> the functions, made once.
functions: dict[tuple[str | None, str | None], Functions] = {}


def make_functions() -> None:
    """Makes those through the dispatcher after the ops are registered: torch.compile cannot make them in a trace."""
    functions.update({(None, asked): Functions(None, asked) for asked in (None, *BACKENDS)})


def choose(op: str, x: torch.Tensor, backend: str | None = None, strict: bool = True, **sizes: Any) -> str:
    """Chooses the backend that runs `op` on the map x (B, H, W, C) and returns its name.

    It is the requested backend, else the first usable one. In a trace (torch.jit.trace, torch.fx), under torch.func's
    transforms and under forward-mode AD it is the reference, whatever is requested. `sizes` are the further sizes that
    the choice depends on.

    Args:
        op: name of the op.
        x: the map that the op takes.
        backend: the requested backend, or None. A backend without `op` leaves the choice open.
        strict: whether the requested backend has to serve x. If False, another one may run instead.

    Raises:
        ValueError: there is no such backend, or `strict` is set and it does not serve x.
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
    **sizes: Any,
) -> Plan:
    """Chooses for a layer: the backend, and how to call it. See `choose`.

    `parameters` are the tensors that kernels will read, each with its expected shape. Only tensors of these shapes
    bypass the argument checks.
    """
    if backend is not None and backend != "reference" and backend not in BACKENDS:
        names = ", ".join((*BACKENDS, "reference"))
        raise ValueError(f"backend: expected one of {names} or None, got {backend!r}")
    # Other programs read a trace (ONNX, TorchScript, FLOP counters). They know PyTorch's own operations only.
    if backend == "reference" or not isinstance(x, torch.Tensor) or torch.jit.is_tracing():
        return Plan(op, "reference", REFERENCE, False)
    compiles = torch.compiler.is_compiling()
    # `transformed` and, below, `usable` are inlined: every step of a model calls this.
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
            return Plan(op, "reference", REFERENCE, False)  # made of primitives, which the requested backend has
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
    # Opt-in backends always check their arguments.
    direct = name not in OPT_IN and is_unobserved(x, parameters)
    key = (name if direct else None), backend
    if key not in functions:
        functions[key] = Functions(*key)
    return Plan(op, name, functions[key], direct)


def is_unobserved(x: torch.Tensor, parameters: Sequence[tuple[torch.Tensor, tuple[int, ...]]]) -> bool:
    """Whether PyTorch runs operations on x one by one and nothing records them: no autograd, compiler or mode.

    Traces and transforms never get here: `choose` gives them the reference.
    """
    if type(x) is not torch.Tensor or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or (torch._C._len_torch_function_stack() and has_function_mode()):
        return False
    for t, shape in parameters:  # the op raises the error for one that does not fit
        if t is None or t.shape != shape or t.device != x.device or not t.is_contiguous():
            return False
    return True


def run(op: str, backend: str | None, sizes: dict[str, Any], x: torch.Tensor, *args: Any) -> Any:
    """Runs `op` on the backend that serves x. If that fails, the next one runs it.

    Raises:
        ValueError: the requested backend does not serve x, or fails its self-check.
    """
    with choosing_by(failures):
        name = choose(op, x, backend, **sizes)
    if name == "reference":
        return run_reference(op, args)
    return execute(name, op, backend, *args, **sizes)


def run_reference(op: str, args: tuple[Any, ...]) -> Any:
    results = getattr(REFERENCE, op)(*args)
    return results.contiguous() if torch.is_tensor(results) else tuple(t.contiguous() for t in results)


def execute(name: str, op: str, asked: str | None, *args: Any, **sizes: Any) -> Any:
    """Runs `op` of backend `name` on contiguous tensors. The first call runs the self-check.

    `asked` is the requested backend, or None. A backend that nobody requested may fail its self-check, or fail to
    compile or launch a kernel. Then the next one runs, now and in later calls. Out of memory is no such failure and is
    raised. The arguments have been checked before.
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
    """Excludes a backend from later choices for an op, its channels and dtype, and warns."""
    forward, backward = ((name, op, case.channels, case.dtype) for op in (case.op, f"{case.op}_backward"))
    if failures.setdefault(forward, reason) is not reason:
        return  # another thread has warned
    failures[backward] = reason
    what = f"{case.op} of {case.channels} channels in {case.dtype}"
    warnings.warn(f"svit.ops: the {name} backend is left out for {what} from now on, {reason}", stacklevel=3)


def self_check(device: str | torch.device | None = None) -> list[_self_check.Row]:
    """Compares every fused op on `device` with the reference, forward and backward, at the shapes of SViT-S, B and L.

    Each case takes two small padded maps, in float32, bfloat16 and float16. The verdicts are stored and replace those
    of an earlier check (see _self_check.py). PyTorch's random state does not change.

    Args:
        device: None for the current GPU, or for the CPU if there is none. Only an interpreted backend runs on a CPU.

    Returns:
        rows (op, channels, cell, dtype, backend, ok, error, form, reason). `error` is relative to the largest value.
        The list is empty if no fused backend serves the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.empty(0, device=device).device  # with its index
    cases = checkable(device)
    return [_self_check.check_and_keep(case, BACKENDS[name], device) for name in cases for case in cases[name]]


def checkable(device: torch.device) -> dict[str, list[_self_check.Case]]:
    """The published cases of each backend that serves `device`, opt-in backends included."""
    found = {}
    for name, backend in BACKENDS.items():
        if getattr(backend, "fingerprint", None) is None:
            continue
        cases = _self_check.published_cases(name, backend.OPS, (torch.float32, torch.bfloat16, torch.float16))
        if served := [case for case in cases if _self_check.serves(backend, case, device)]:
            found[name] = served
    return found


def info() -> None:
    """Prints the backend of each device and dtype of this machine, and why those before it do not serve."""
    from . import cuda, triton  # for what is installed

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    print(f"svit.ops, torch {torch.__version__}, {triton.version}, {cuda.version}")
    for device in devices:
        if device != "cpu":
            print(f"{device}: {torch.cuda.get_device_name(device)}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            print(f"{device:8} {str(dtype).removeprefix('torch.'):8} -> {choice('sample', device, dtype)}")
        print(f"{device:8} fused half-block -> {choice('conv_ffn', device, torch.bfloat16, hidden=256)}")
        for name in checkable(torch.device(device)):
            print(f"{device:8} self-check of {name}: {_self_check.summary(name, BACKENDS[name], torch.device(device))}")


def choice(op: str, device: str, dtype: torch.dtype, **sizes: Any) -> str:
    """The backend of an op on maps of 64 channels, and why those before it do not serve."""
    x = torch.empty(0, 1, 1, 64, device=device, dtype=dtype)
    answers = {name: usable(name, op, x, **sizes) for name in BACKENDS if has(name, op)}
    why = [f"not {name}: {reason}" for name, (serves, reason) in answers.items() if not serves]
    return ", ".join([choose(op, x, **sizes), *why])
