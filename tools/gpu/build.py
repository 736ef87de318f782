"""Builds the CUDA C++ kernels for this GPU, in place."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from . import ROOT
from .items import Batch, Item, Setup, Stage
from .machine import find_tool

DESCRIPTION = "the CUDA C++ kernels, compiled in place for this GPU"
LIBRARY = ROOT / "svit" / "ops" / "_cuda.so"


def stages(setup: Setup) -> list[Stage] | str:
    if find_tool("nvcc") is None:
        return "there is no nvcc"
    if find_spec("setuptools") is None:
        return "there is no setuptools"
    return [Stage([Batch([Item("library", estimate=2 if is_up_to_date() else 60, limit=150)])])]


def is_up_to_date() -> bool:
    sources = [ROOT / "setup.py", *(ROOT / "svit" / "ops" / "csrc").iterdir()]
    return LIBRARY.exists() and LIBRARY.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def run(setup: Setup) -> Iterator[dict]:
    if is_up_to_date() and not setup.rehearsal:
        yield {"library": LIBRARY.name, "ok": True, "how": "was built before"}
        return
    path = os.pathsep.join([os.path.dirname(find_tool("nvcc")), os.environ["PATH"]])
    environment = {**os.environ, "SVIT_BUILD_CUDA": "1", "PATH": path}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if setup.rehearsal:
        command.append("--help")
    else:
        import torch

        major, minor = torch.cuda.get_device_capability()
        environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    yield {
        "library": LIBRARY.name,
        "ok": status == 0,
        "how": "not built in a rehearsal" if setup.rehearsal else "built",
    }
