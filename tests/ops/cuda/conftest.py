"""What stands in for a GPU here: the kernels' sources compiled for the CPU, and what nvcc makes of them."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import helpers

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "svit" / "ops" / "csrc"


def needs_nvcc() -> None:
    if shutil.which("nvcc") is None:
        helpers.missing("nvcc")


@pytest.fixture(scope="session")
def compile_for_cpu(tmp_path_factory):
    """A function: C++ file of this folder -> ctypes library; with `watched`, one that fails at the first race on shared
    memory. nvcc knows its headers, and calls the C++ compiler."""
    needs_nvcc()

    def run(name: str, watched: bool = False) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("cpu")

        def compile_(source: Path, *flags: str) -> Path:
            out = folder / f"{source.stem}.o"
            flags = ["-c", "-std=c++20", ",".join(["-Xcompiler=-fPIC,-w,-O2", *flags])]
            subprocess.run(["nvcc", *flags, f"-I{HERE / 'emulator'}", f"-I{SOURCES}", source, "-o", out], check=True)
            return out

        if watched:
            objects = [compile_(HERE / name, "-fsanitize=thread"), compile_(HERE / "emulator" / "races.cpp")]
        else:
            objects = [compile_(HERE / name)]
        library = folder / "library.so"
        subprocess.run(["nvcc", "-shared", "-cudart=none", *objects, "-o", library], check=True)
        return ctypes.CDLL(library)

    return run


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The library as a user builds it, and what the compiler said."""
    needs_nvcc()
    folder = tmp_path_factory.mktemp("cuda")
    flags = "--ptxas-options=-v -Werror=all-warnings"
    environment = {**os.environ, "SVIT_BUILD_CUDA": "1", "NVCC_APPEND_FLAGS": flags, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = (folder / "lib" / "svit" / "ops").glob("*.so")
    return library, done.stdout + done.stderr
