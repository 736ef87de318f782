"""The tests that need a GPU, on several processes, streamed to a log beside the report."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

from . import ROOT
from .items import Batch, Item, Setup, Stage

DESCRIPTION = "pytest; each failing test at once, the whole output in the log beside the report"

# What there is for a GPU -> the seconds that it is expected to take, compiling included; none has ended on a GPU yet.
# Whole models first, then each kernel at sizes of every kind.
PATHS = {
    "tests/test_gpu.py": 90.0,
    "tests/layers": 60.0,
    "tests/models/test_fused.py": 60.0,
    "tests/ops --ignore=tests/ops/triton": 120.0,
    "tests/ops/triton": 400.0,
}
# What stands in for a GPU: interpreter, machine code, emulator. They take minutes.
STAND_INS = ("tests/ops/triton/test_interpreter.py", "tests/ops/triton/test_sass.py", "tests/ops/cuda")
REHEARSED = ("tests/ops/test_dispatch.py", "tests/test_gpu.py", "tests/ops/triton/test_kernels.py")
PROCESSES = 8  # at most, that share the GPU

OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"tests/[\w/]+\.py(?:::.*)?")


def stages(setup: Setup) -> list[Stage] | str:
    if find_spec("pytest") is None:
        return "there is no pytest"
    paths = {" ".join(REHEARSED): 30.0} if setup.rehearsal else PATHS
    items = [Item(each, {"paths": each}, estimate=seconds, limit=3 * seconds) for each, seconds in paths.items()]
    return [Stage([Batch(items)])]


def command(setup: Setup, paths: str) -> list[str]:
    found = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider"]
    if find_spec("hypothesis") is None:
        found += ["-p", "gpu.without_hypothesis"]
    if find_spec("xdist") is not None and not setup.rehearsal:
        found += ["-n", str(min(PROCESSES, setup.cores))]
    if setup.rehearsal:
        return [*found, "-k", "(not kernels or poisoned) and not float16", *paths.split()]
    return [*found, *(f"--ignore={path}" for path in STAND_INS), *paths.split()]


def outcome(line: str) -> tuple[str, str] | None:
    """(test, outcome) of a line of pytest -v, with xdist ("[gw0] [ 5%] PASSED test") or without ("test PASSED [ 5%]").

    The summary at the end has lines of the first kind, with a reason behind the test.
    """
    result = OUTCOME.search(line)
    test = TEST.search(line)
    if not result or not test:
        return None
    name = test.group().split(" - ")[0]
    return re.sub(rf" {result.group()}.*", "", name).strip(), result.group()


def run(setup: Setup, paths: str) -> Iterator[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "SVIT_SELF_CHECK"}
    environment["OMP_NUM_THREADS"] = "1"  # the processes share the cores already
    results: dict[str, str] = {}
    arguments = command(setup, paths)
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        open(f"{setup.report}-tests.log", "a", buffering=1, encoding="utf-8") as log,
        subprocess.Popen(arguments, cwd=ROOT, env=environment, text=True, errors="replace", **pipe) as process,
    ):
        for line in process.stdout:
            log.write(line)
            print(line, end="", flush=True)  # its last lines are kept, should it not end
            if (found := outcome(line)) and found[0] not in results:
                test, result = found
                results[test] = result
                if result in ("FAILED", "ERROR"):
                    yield {"test": test, "ok": False}
        status = process.wait()
    counts = Counter(results.values())
    yield {
        "tests": " ".join(arguments[1:]),
        **{key.lower(): counts[key] for key in ("PASSED", "FAILED", "ERROR", "SKIPPED")},
        "exit status": status,
        "ok": status == 0,
    }
