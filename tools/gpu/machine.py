"""What a report says of where its figures come from: GPU, versions, sources; and what is missing here."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec

import torch

from . import ROOT

# Packages and tools that the check can do without -> what is left out then.
OPTIONAL_PACKAGES = {
    "pytest": "the step tests",
    "hypothesis": "tests that draw their cases are skipped",
    "xdist": "the tests run in one process",
    "setuptools": "the CUDA C++ kernels are not built",
}
OPTIONAL_TOOLS = {
    "nvcc": "the CUDA C++ kernels are not built",
    "compute-sanitizer": "the step sanitizer",
}


def output(*command: str) -> str:
    """What a command prints, '' where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def has_gpu() -> bool:
    return torch.cuda.is_available() and torch.version.hip is None


def find_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, on PATH or where the toolkit is usually installed."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin{os.pathsep}{home}/compute-sanitizer")


def missing() -> dict[str, str]:
    """What is not installed here, and what is left out therefore."""
    found = {name: effect for name, effect in OPTIONAL_PACKAGES.items() if find_spec(name) is None}
    return found | {name: effect for name, effect in OPTIONAL_TOOLS.items() if find_tool(name) is None}


def sources() -> str:
    """A digest of the package's sources: two reports with the same one measured the same kernels."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "svit").rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".h"):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def describe(rehearsal: bool) -> dict[str, str]:
    """GPU, versions and sources, in the order in which the report shows them."""
    if rehearsal:
        gpu = {"GPU": "none"}
    else:
        device = torch.cuda.get_device_properties(0)
        gpu = {
            "GPU": device.name,
            "compute capability": f"{device.major}.{device.minor}",
            "memory": f"{device.total_memory / 2**30:.1f} GiB",
            "multiprocessors": str(device.multi_processor_count),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    return gpu | {
        "CPU cores": str(len(os.sched_getaffinity(0))),
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "timm", "numpy")},
        "CUDA": str(torch.version.cuda),
        "commit": output("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown",
        "sources": sources(),
    }


# What must be the same for two runs to stand in one report.
IDENTITY = ("GPU", "torch", "triton", "timm", "sources")
