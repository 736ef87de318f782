"""Makes the long description of README.md, and builds the CUDA backend where SVIT_BUILD_CUDA=1 asks for it.

Everything else stands in setup.cfg.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("svit/ops/csrc")

# Of the GPUs that the library is for, unless TORCH_CUDA_ARCH_LIST names others; those of this machine do not matter.
ARCHITECTURES = "8.0;8.9;9.0+PTX"

# The oldest PyTorch whose stable ABI the library wants: it loads in that and in all later ones.
STABLE_ABI = "0x020a000000000000"  # 2.10


class BuildLibrary(build_ext):
    """Has nvcc make a library for torch.ops.load_library: no module of Python's, so one file serves each Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, extension: Extension) -> None:
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        command = [
            compiler(), "-shared", "-Xcompiler=-fPIC", "-O3", "-ftz=true", "-cudart=static", "--threads=0",
            f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA", f"-I{SOURCES}", *with_torch(),
            *code_for(architectures), *extension.sources, "-o", str(out),
        ]  # fmt: skip
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode:
            raise SystemExit(f"SVIT_BUILD_CUDA=1: nvcc could not build the kernels for {architectures}; see above")


def compiler() -> str:
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "on PATH (or set CUDA_HOME)"
        raise SystemExit(f"SVIT_BUILD_CUDA=1: expected CUDA's compiler nvcc {where}, found none")
    return nvcc


def with_torch() -> list[str]:
    """Flags for PyTorch's headers, and for those of its libraries that hold the stable ABI."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            "SVIT_BUILD_CUDA=1: expected PyTorch in the environment that builds, found none. Install it first, then "
            f"`pip install --no-build-isolation .` ({error})"
        ) from error
    headers, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    if not (headers / "torch" / "headeronly").is_dir() or not (libraries / "libtorch_cuda.so").exists():
        raise SystemExit(f"SVIT_BUILD_CUDA=1: expected PyTorch 2.10 or later for CUDA, got {torch.__version__}")
    return [f"-I{headers}", f"-L{libraries}", "-ltorch_cpu", "-ltorch_cuda"]


def code_for(architectures: str) -> list[str]:
    """nvcc's flags for a list such as '8.0;9.0+PTX': machine code, and what later GPUs compile themselves."""
    flags = []
    for entry in re.split(r"[;\s]+", architectures.strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got {entry!r}")
        if int(entry.partition(".")[0]) < 8:  # lists made for other packages have them
            print(f"TORCH_CUDA_ARCH_LIST: {entry} is left out, the kernels need 8.0 or higher", flush=True)
            continue
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected an architecture of 8.0 or higher, got {architectures!r}")
    return flags


def cuda_backend() -> dict:
    kernels = sorted(str(path) for path in SOURCES.glob("*.cu"))
    headers = sorted(str(path) for path in SOURCES.glob("*.*h"))
    return {
        "ext_modules": [Extension("svit.ops._cuda", kernels, depends=headers, py_limited_api=True)],
        "cmdclass": {"build_ext": BuildLibrary},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def long_description() -> str:
    """README.md for readers without the repository: links into it become text, paragraphs with its pictures go."""
    paragraphs = Path("README.md").read_text(encoding="utf-8").split("\n\n")
    inside = r"\[([^][]+)\]\((?!https?://)[^)\s]+\)"
    return "\n\n".join(re.sub(inside, r"\1", text) for text in paragraphs if not re.search(f"!{inside}", text))


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    **(cuda_backend() if os.environ.get("SVIT_BUILD_CUDA") == "1" else {}),
)
