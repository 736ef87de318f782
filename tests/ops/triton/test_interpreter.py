import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from svit.ops import triton

TESTS = [Path(__file__).with_name(name) for name in ("test_kernels.py", "test_self_check.py")]


@pytest.mark.skipif(triton.INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter():
    """Runs `TESTS` on the CPU. Triton decides when it is imported, so in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *map(str, TESTS), "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= (250 if find_spec("ml_dtypes") else 200), done.stdout
    assert "skipped" not in done.stdout
