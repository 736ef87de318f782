"""Shared by the tests."""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock  # with torch

# Starts two processes: a script and its arguments follow, or -m and a module.
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def missing(what: str) -> None:
    """Ends a test that needs `what`: skipped on a developer's machine, failed in CI, where nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"missing: {what}")


def needs_mm() -> None:
    """For the top of a test module that needs MMDetection and MMSegmentation with mmcv's compiled operators."""
    try:
        # In a new environment yapf, which mmengine imports, writes its grammar to a cache of the user's, where another
        # test process would read the half of it.
        with FileLock(Path(tempfile.gettempdir(), "svit-tests-import-mm.lock")):
            for name in ("mmcv.ops", "mmdet", "mmseg"):
                importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"missing: mmdet, mmsegmentation or mmcv with its operators ({error})", allow_module_level=True)
