"""Checks and measures the fused ops on this machine's GPU, step by step; each finding is kept the moment it is known.

    python tools/gpu_check.py                                 # all steps; report in $OUT, else docs/benchmarks
    python tools/gpu_check.py --minutes 9                     # leaves out what would not end in time
    python tools/gpu_check.py --resume REPORT.json            # goes on: what is done is not done again
    python tools/gpu_check.py --steps smoke kernels
    python tools/gpu_check.py --steps models --only "svit_small forward*"
    python tools/gpu_check.py --rehearse                      # all of it on a CPU, tiny: no figure counts

build: the CUDA C++ kernels, where there is nvcc. smoke: every kernel, forward and backward, against the reference.
kernels: times beside eager PyTorch and torch.compile, bandwidth, launch cost. models: SViT beside its upstream form and
other architectures, eager, compiled and as a CUDA graph. tests: the GPU tests. sanitizer: compute-sanitizer over the
smoke cases. sweep: launch parameters.

The report is <date>-<gpu>.json with all figures and .md for people. It needs torch, triton, timm and numpy, and no
network; what else is missing it names. Each item runs in another process under a time limit: one that fails, crashes or
hangs is named in the report with its last lines, and ends nothing else. The exit status is 0 if all went well, 1 if
something did not, 2 if nothing could be done.
"""

import argparse
import datetime
import importlib
import itertools
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # a checkout that is not installed

from gpu import machine, worker  # noqa: E402
from gpu.items import START, Batch, Item, Setup, Stage  # noqa: E402
from gpu.report import CRASHED, CUT, FAILED, HUNG, OK, Report, ReportError  # noqa: E402
from svit import processes  # noqa: E402

# In the order in which they run -> their modules.
STEPS = {name: f"gpu.{name}" for name in ("build", "smoke", "kernels", "models", "tests", "sanitizer", "sweep")}

# Seconds that the first item of a process gets beyond its limit, for imports and the GPU's context.
START_LIMIT = 60.0


class Run:
    """One call of the check: what still fits into its time, and the processes that are at work."""

    def __init__(self, report: Report, setup: Setup, minutes: float | None, only: list[str]) -> None:
        self.report, self.setup, self.only = report, setup, only
        self.unmatched = set(only)  # the patterns that no item has matched so far
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self.stopped = threading.Event()
        self.workers: set[worker.Worker] = set()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def selects(self, item: Item) -> bool:
        """Whether `--only` names the item; all are selected where it names none."""
        matching = [pattern for pattern in self.only if fnmatchcase(item.name, pattern)]
        self.unmatched.difference_update(matching)
        return bool(matching) or not self.only

    def stop(self) -> None:
        """Ends all processes; what they were at counts as cut."""
        self.stopped.set()
        for each in list(self.workers):
            each.kill()

    @contextmanager
    def stopped_by(self, *numbers: signal.Signals) -> Iterator[None]:
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def step(self, name: str) -> None:
        try:
            module = importlib.import_module(STEPS[name])
            stages = module.stages(self.setup)
        except Exception as error:
            traceback.print_exc()
            plan = Item("plan")
            self.report.describe(name, "")
            self.report.begin(name, plan)
            self.report.end(name, plan, FAILED, 0.0, f"{type(error).__name__}: {error}")
            return
        self.report.describe(name, module.DESCRIPTION, stages if isinstance(stages, str) else None)
        for stage in [] if isinstance(stages, str) else stages:
            with ThreadPoolExecutor(stage.parallel) as pool:
                done = [pool.submit(self.batch, name, stage, batch) for batch in stage.batches]
            for each in done:
                each.result()  # raises what was raised

    def batch(self, step: str, stage: Stage, batch: Batch) -> None:
        """Does the items that are not done yet, in one process as long as it lives."""
        process, last, left_out = None, None, []
        for item in batch.items:
            if self.stopped.is_set():
                break
            if not self.selects(item) or self.report.is_done(step, item):
                continue
            needed = item.estimate + (START if process is None else 0)
            if needed > self.left():
                left_out.append(item)
                continue
            startup = 0.0
            if process is None:
                threads = {"OMP_NUM_THREADS": "1"} if stage.parallel > 1 else {}
                try:
                    process = worker.Worker(STEPS[step], self.setup, batch, threads | stage.environment)
                except OSError as error:  # a checker that cannot be run, say
                    self.report.begin(step, item)
                    self.report.end(step, item, FAILED, 0.0, f"no process: {error}")
                    continue
                startup = START_LIMIT
                self.workers.add(process)
                if self.stopped.is_set():  # in the meantime
                    break
            if self.item(step, item, process, item.limit + startup):
                last = item
            else:
                self.end(process)
                process, last = None, None
        if left_out:
            self.report.leave_out(step, left_out, f"for lack of time, with {max(self.left(), 0):.0f} s left")
        if process is not None:
            status = process.finish(min(60.0, max(self.left(), 5.0)))
            self.workers.discard(process)
            # A checker that runs the process has its say at the end.
            if status != 0 and last is not None and not self.stopped.is_set():
                how = "did not end" if status is None else f"ended {worker.ended_by(status)}"
                seconds = self.report.items(step)[last.name]["seconds"]
                self.report.end(step, last, FAILED, seconds, f"its process {how}", process.output())

    def item(self, step: str, item: Item, process: worker.Worker, limit: float) -> bool:
        """Has a process do an item. Whether the process can do another."""
        self.report.begin(step, item)
        started = time.monotonic()

        def end(status: str, reason: str = "", output: str = "") -> None:
            self.report.end(step, item, status, time.monotonic() - started, reason, output)

        process.lines.clear()
        process.send(vars(item))
        try:
            for record in process.records(min(started + limit, self.deadline)):
                if "finding" in record:
                    self.report.find(step, item, record["finding"])
                elif "error" in record:
                    end(FAILED, record["error"], process.output())
                    return False  # a GPU that has met an error may answer nothing more to this process
                else:
                    end(OK)
                    return True
        except TimeoutError:
            if self.left() <= 0:
                end(CUT, "the time was up", process.output())
            else:
                end(HUNG, f"no end within {limit:.0f} s", process.output())
            return False
        if self.stopped.is_set():
            end(CUT, "the run was stopped", process.output())
        else:
            end(CRASHED, worker.ended_by(process.status()), process.output())
        return False

    def end(self, process: worker.Worker) -> None:
        process.kill()
        self.workers.discard(process)


def path_of_report(folder: Path, about: dict[str, str], rehearsal: bool) -> Path:
    """<date>-<gpu>, without a suffix; with a number behind it where there is one already. The .json is made, empty."""
    slug = "rehearsal" if rehearsal else re.sub(r"\W+", "-", about["GPU"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.date.today()}-{slug}"
    for n in itertools.count(1):
        numbered = path if n == 1 else Path(f"{path}-{n}")
        with suppress(FileExistsError):
            Path(f"{numbered}.json").touch(exist_ok=False)  # no other run takes it
            return numbered
    raise AssertionError("unreachable")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", nargs="+", choices=tuple(STEPS), default=tuple(STEPS), help="some of them, in this order"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="of their items those with such names, as in a shell",
    )
    parser.add_argument("--out", type=Path, help="folder of the report; default: $OUT if set, else docs/benchmarks")
    parser.add_argument("--minutes", type=float, metavar="N", help="leave out what would not end in N minutes")
    parser.add_argument("--resume", type=Path, metavar="REPORT", help="the .json of a report to go on from")
    parser.add_argument("--rehearse", action="store_true", help="all of it without a GPU, in Triton's interpreter")
    args = parser.parse_args()
    if args.minutes is not None and not args.minutes > 0:  # nan neither
        parser.error(f"--minutes: expected a positive number, got {args.minutes:g}")
    return args


def main() -> int:
    args = parse_args()
    sys.stdout.reconfigure(errors="replace")  # what a process printed may be anything
    if not args.rehearse and not machine.has_gpu():
        print("error: no NVIDIA GPU that PyTorch can use; --rehearse runs the check without one", file=sys.stderr)
        return 2
    about, missing = machine.describe(args.rehearse), machine.missing()
    folder = (args.out or Path(os.environ.get("OUT") or ROOT / "docs" / "benchmarks")).absolute()
    try:
        if args.resume:
            report = Report.resume(args.resume, folder, about, args.rehearse, missing)
        else:
            report = Report(path_of_report(folder, about, args.rehearse), about, args.rehearse, missing)
        report.start_run(shlex.join(["python", "tools/gpu_check.py", *sys.argv[1:]]), args.minutes)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{report.path}.md\n" + "\n".join(f"{name} is missing: {effect}" for name, effect in missing.items()))

    setup = Setup(args.rehearse, str(report.path), len(os.sched_getaffinity(0)))
    run = Run(report, setup, args.minutes, args.only)
    with run.stopped_by(signal.SIGINT, signal.SIGTERM):
        for name in STEPS:
            if name in args.steps and not run.stopped.is_set():
                run.step(name)

    print(f"\nwritten to {report.path}.json and .md" + (": a rehearsal, no figure counts" if args.rehearse else ""))
    if bad := report.bad():
        print("error: not all went well: " + "; ".join(bad), file=sys.stderr)
    if run.stopped.is_set():
        print("error: stopped; --resume goes on", file=sys.stderr)
    elif run.unmatched:
        patterns = ", ".join(map(repr, sorted(run.unmatched)))
        print(f"error: --only: expected names of items in {' '.join(args.steps)}, got {patterns}", file=sys.stderr)
    return 1 if bad or run.stopped.is_set() or run.unmatched else 0


if __name__ == "__main__":
    processes.run(main)
