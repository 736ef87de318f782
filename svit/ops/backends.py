"""The choice of a backend. Each is a module with `usable(op, x) -> (bool, reason)` and the ops of library.py.

To add one: write the module, name it in `MODULES` where it stands in the order of preference (docs/ops.md).
"""

import warnings
from types import ModuleType

import torch
from torch.autograd import forward_ad

from . import reference, triton

# The first usable one is taken. `reference` serves everything.
MODULES: dict[str, ModuleType] = {"triton": triton}
NAMES = (*MODULES, "reference")

# (backend, op, channels, dtype) -> why it broke in this process: the backend is not chosen again for these.
failures: dict[tuple, str] = {}


def problem(name: str, op: str, x: torch.Tensor) -> tuple:
    return name, op, x.shape[-1], x.dtype


def usable(name: str, op: str, x: torch.Tensor) -> tuple[bool, str]:
    """Whether a backend serves `op` on the map x (B, H, W, C), and if not, why."""
    if (key := problem(name, op, x)) in failures:
        return False, failures[key]
    return MODULES[name].usable(op, x)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work, which look into PyTorch's operations only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def choose(op: str, x: torch.Tensor, backend: str | None = None) -> str:
    """Name of the backend that runs `op` on the map x (B, H, W, C): the one asked for, else the first usable one.

    In a trace (torch.jit.trace, torch.fx) it is the reference, whatever was asked for.

    Raises:
        ValueError: no such backend, or it does not serve x.
    """
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)} or None, got {backend!r}")
    # A trace is for other programs to read (ONNX, TorchScript, FLOP counters), which know PyTorch's operations only.
    if backend == "reference" or not isinstance(x, torch.Tensor) or torch.jit.is_tracing():
        return "reference"
    if backend is not None:
        serves, reason = MODULES[backend].usable(op, x)
        if not serves:
            raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}")
        return backend
    if transformed():
        return "reference"
    for name in MODULES:
        if usable(name, op, x)[0]:
            return name
    return "reference"


def run(op: str, backend: str | None, x: torch.Tensor, *args):
    """Runs `op` of a backend. One that was chosen, not asked for, may fail: then the next one runs, now and hereafter.

    The failures meant here are those of compiling and launching kernels. Lack of memory is not one of them; a caller's
    error has been found before.
    """
    while True:
        name = choose(op, x, backend)
        if name == "reference":
            results = getattr(reference, op)(*args)
            return results.contiguous() if torch.is_tensor(results) else tuple(t.contiguous() for t in results)
        try:
            return getattr(MODULES[name], op)(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if backend is not None or "out of memory" in str(error).lower():
                raise
            reason = f"it failed before: {type(error).__name__}: {error}"
            failures[problem(name, op, x)] = reason
            what = f"{op} of {x.shape[-1]} channels in {x.dtype}"
            warnings.warn(f"svit.ops: the {name} backend is left out for {what} from now on, {reason}", stacklevel=2)


def info() -> None:
    """Prints which backend serves each device and dtype of this machine, and why not the ones before it."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    print(f"svit.ops, torch {torch.__version__}, {triton.version}")
    for device in devices:
        if device != "cpu":
            print(f"{device}: {torch.cuda.get_device_name(device)}")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.empty(0, 1, 1, 64, device=device, dtype=dtype)
            why = [f"not {name}: {reason}" for name in MODULES for ok, reason in [usable(name, "sample", x)] if not ok]
            print(f"{device:8} {str(dtype).removeprefix('torch.'):8} -> {', '.join([choose('sample', x), *why])}")
