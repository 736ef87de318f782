"""The kernels run on a GPU, or on the CPU in Triton's interpreter, which must be asked for before Triton is imported:
test_interpreter.py starts a process of its own for test_kernels.py and test_self_check.py."""

import os

import pytest
import torch

from svit.ops import triton

if triton.INTERPRETED:
    try:
        from triton_bfloat16 import install
    except ImportError:  # ml_dtypes; then without bfloat16, but in CI nothing may be missing
        if os.environ.get("CI"):
            raise
    else:
        install()

if not triton.available:
    collect_ignore_glob = ["test_*.py"]
elif not (torch.cuda.is_available() or triton.INTERPRETED):
    collect_ignore = ["test_kernels.py", "test_self_check.py"]


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """Nor do PyTorch's convolutions round to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def no_self_check(monkeypatch):
    """Kernels run where a test calls them, and nowhere else."""
    monkeypatch.setenv("SVIT_SELF_CHECK", "0")


@pytest.fixture(autouse=True)
def poison():
    """Memory comes filled with NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the kernels that ran."""
    from svit.ops import _kernels

    names = []
    original = _kernels.launch

    def recorded(kernel, *args, **constants):
        names.append(kernel.__name__)
        original(kernel, *args, **constants)

    monkeypatch.setattr(_kernels, "launch", recorded)
    return names
