"""Shows what is installed and what runs here: versions, devices, backends and why not others, extras that are missing.

    svit info

The self-checks' verdicts are those that are known; `svit.ops.self_check()` runs all checks. Add this to a report of a
problem.
"""

import argparse
import importlib.util
import platform
import re
from importlib import metadata

import timm
import torch
from packaging.requirements import Requirement

import svit
from svit import ops

from . import install
from .base import make_parser

# Of setup.cfg, those that are for users; one of two extras is enough where either will do.
EXTRAS = {
    "train": "svit train, validate, infer",
    "visualize": "svit visualize, svit.visualize",
    "export": "svit export --format onnx",
    "parquet": "svit infer --format parquet",
    "profile": "svit flops, benchmark, svit.profiling",
    "mm": "svit mm-train, mm-test, mm-infer, svit.adapters",
}
OR_ELSE = {"mm": "mm-onedl"}


def parser() -> argparse.ArgumentParser:
    return make_parser("info", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser().parse_args(argv)
    print(f"svit {svit.__version__} ({svit.__path__[0]}), timm {timm.__version__}")
    print(f"Python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads")
    ops.info()
    for extra, use in EXTRAS.items():
        missing = missing_packages(extra)
        if missing and extra in OR_ELSE:
            missing = missing_packages(OR_ELSE[extra]) and missing
        state = f"needs {', '.join(missing)}: {install(extra)}" if missing else "installed"
        print(f"extra {extra:9} ({use}): {state}")
    return 0


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed, or in another version than it asks for."""
    missing = []
    try:
        requirements = metadata.requires("svit") or []
    except metadata.PackageNotFoundError:  # a checkout that runs without being installed
        return ["svit"]
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            fits = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            fits = False
        if not fits:
            missing.append(re.sub(r"\s*;.*", "", text))
    if extra.startswith("mm") and importlib.util.find_spec("mmcv") is None:
        missing.append("mmcv")
    return missing
