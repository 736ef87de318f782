"""What the compiler makes of the CUDA kernels, as a user builds them. No GPU is needed for any of it."""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import helpers
from svit.ops import cuda

ROOT = Path(__file__).parents[3]
KERNELS = 24  # for 4 sizes in 2 dtypes: attention with and without clusters, conv-FFN
ARCHITECTURES = ["sm_80", "sm_89", "sm_90"]


def cuobjdump(*args: str | Path) -> str:
    program = shutil.which("cuobjdump")
    if program is None:
        knobs = pytest.importorskip("triton").knobs
        program = knobs.nvidia.cuobjdump.path
    if program is None:
        helpers.missing("cuobjdump")
    return subprocess.run([program, *args], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def machine_code(built) -> dict[tuple[str, str], Counter]:
    """(architecture, kernel) -> how often each instruction, with its modifiers, stands in it."""
    code = {}
    for line in cuobjdump("-sass", built[0]).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            counts = code.setdefault((architecture, match[1]), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", line):
            counts[match[1]] += 1
    return code


def total(counts: Counter, start: str) -> int:
    return sum(n for name, n in counts.items() if name == start or name.startswith(f"{start}."))


def needs_clusters(kernel: str) -> bool:
    return "super_token" in kernel and kernel.split("Lb")[1][0] == "1"


def test_nothing_spills(built):
    lines = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built[1])
    assert len(lines) == KERNELS * len(ARCHITECTURES)
    assert set(lines) == {("0", "0", "0")}
    # A block of 512 threads has room for 128 registers each, one of 256 for the most there are.
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", built[1])]
    assert len(registers) == len(lines)
    assert max(registers) <= 255


def test_two_blocks_of_a_cluster_share_a_multiprocessor(built):
    """Of 7 warps each; a block of 8 warps is compiled for the same number of registers."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+)", cuobjdump("-res-usage", built[0]))
    registers = [int(n) for name, n in usage if needs_clusters(name)]
    assert len(registers) == 8 * len(ARCHITECTURES)
    assert max(registers) <= 128


def test_it_is_compiled_for_each_architecture(built, machine_code):
    assert {architecture for architecture, _ in machine_code} == set(ARCHITECTURES)
    for architecture in ARCHITECTURES:
        names = [name for a, name in machine_code if a == architecture]
        assert len(names) == KERNELS
    assert "compute_90" in cuobjdump("-lptx", built[0]) or "sm_90" in cuobjdump("-lptx", built[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(machine_code, architecture):
    for (_, name), counts in ((key, c) for key, c in machine_code.items() if key[0] == architecture):
        if needs_clusters(name) and architecture != "sm_90":
            assert total(counts, "HMMA") == 0, name  # empty: it is never launched there
            continue
        assert total(counts, "HMMA") >= 16, name
        if match := re.search(r"conv_ffn.*Li(\d+)ELi", name):
            # For 32 hidden channels: the two 1x1 convolutions, and the depthwise one.
            assert total(counts, "HMMA") == int(match[1]) // 2 + 20, name
        # Maps come 16 bytes at a time and leave so, and nothing passes through local memory or an atomic.
        assert counts["LDGSTS.E.BYPASS.128"] + counts["LDG.E.128"] + counts["LDG.E.128.CONSTANT"] > 0, name
        assert counts["STG.E.128"] > 0, name
        for forbidden in ("LDL", "STL", "ATOM", "ATOMG", "RED", "ATOMS"):
            assert total(counts, forbidden) == 0, (name, forbidden)
        if needs_clusters(name):
            assert total(counts, "UCGABAR_ARV") + total(counts, "UCGABAR_WAIT") >= 12, name


def test_only_the_stable_abi_is_used(built):
    symbols = subprocess.run(["nm", "-DC", built[0]], check=True, capture_output=True, text=True).stdout
    assert "svit_attention_bytes" in symbols
    assert "svit_attention_max_active_clusters" in symbols
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert "c10::" not in symbols
    assert "at::" not in symbols.replace("std::float", "")
    assert "cudaLaunchKernelExC" not in re.findall(r" U (\S+)", symbols)  # the CUDA runtime is inside
    needed = subprocess.run(["readelf", "-d", built[0]], check=True, capture_output=True, text=True).stdout
    names = set(re.findall(r"NEEDED.*\[(lib\w+)", needed))
    assert {n for n in names if re.search("torch|c10|cuda|python", n)} == {"libtorch_cpu", "libtorch_cuda"}


def test_it_loads_without_a_gpu(built):
    program = f"""
from pathlib import Path
import torch
from svit.ops import cuda
compiled, version = cuda.load(Path({str(built[0])!r}))
for op in cuda.BACKEND.OPS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("svit_cuda::" + op, "CUDA"), op
assert compiled.library.svit_attention_max_active_clusters(64, 8, 8, 7, 7, 0) == 0
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_shared_memory_fits(built):
    """An H100 lets a block have 227 KiB, an A100 163, an RTX 4090 99."""
    library = ctypes.CDLL(built[0])
    for C, ((h, w), _) in cuda.CELLS.items():
        for rows, columns in itertools.product(range(1, 9), repeat=2):
            assert 0 < library.svit_attention_bytes(C, h, w, rows, columns, True) <= 227 * 1024
        assert library.svit_attention_bytes(C, h, w, 7, 7, False) <= 163 * 1024
        assert 0 < library.svit_conv_ffn_bytes(C) <= 99 * 1024
        assert library.svit_attention_bytes(C, h, w, 7, 7, True) <= 113 * 1024  # two share an H100's multiprocessor
    for C, cell in ((64, 8), (128, 4)):
        assert library.svit_attention_bytes(C, cell, cell, 7, 7, False) <= 99 * 1024
    assert library.svit_has_clusters() == 1
    assert library.svit_attention_bytes(64, 4, 4, 7, 7, True) == library.svit_conv_ffn_bytes(80) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CUDA_HOME": "/nowhere"}, "expected CUDA's compiler nvcc in CUDA_HOME=/nowhere, found none"),
        ({"TORCH_CUDA_ARCH_LIST": "7.0 7.5+PTX"}, "expected an architecture of 8.0 or higher, got '7.0 7.5+PTX'"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "expected entries such as 9.0 or 9.0+PTX, got 'Hopper'"),
    ],
)
def test_what_a_build_lacks_is_named(tmp_path, changes, message):
    if "CUDA_HOME" not in changes and shutil.which("nvcc") is None:
        helpers.missing("nvcc")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path]
    environment = {**os.environ, "SVIT_BUILD_CUDA": "1", **changes}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode
    assert message in done.stderr
    assert not list(tmp_path.rglob("*.so"))
