"""Items run in a process of their own: both ends of the pipe between it and gpu_check.py.

The process gets one item at a time as a line of JSON and answers with records of JSON text sequences (RFC 7464: a
record separator, JSON, a newline) on its standard output, between whatever else is printed there. If gpu_check.py
dies, however it dies, the pipe closes and the process ends itself with all that it started.
"""

import contextlib
import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict

from . import ROOT
from .items import Batch, Item, Setup

SEPARATOR = "\x1e"
LAST_LINES = 25
LONGEST_LINE = 1000  # characters of it that are kept
LONGEST_RECORD = 2**20


class Worker:
    """The process of a batch, seen from gpu_check.py; `module` is that of the step."""

    def __init__(self, module: str, setup: Setup, batch: Batch, environment: dict[str, str]) -> None:
        command = [*batch.prefix, sys.executable, "-m", "gpu.worker", module, json.dumps(asdict(setup))]
        paths = [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
        # The check does its own checking: no kernel is to be replaced by another without being seen.
        fixed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SVIT_SELF_CHECK": "0", "PYTHONUNBUFFERED": "1"}
        if setup.rehearsal:
            fixed |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self.rest = b""
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **fixed, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts can be ended with it
        )

    def send(self, message: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # it is dead, which `records` will show
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def records(self, deadline: float) -> Iterator[dict]:
        """What the process reports, until it ends.

        Raises:
            TimeoutError: it is not done at `deadline` (of time.monotonic).
        """
        out = self.process.stdout.fileno()
        while True:
            while b"\n" in self.rest or len(self.rest) > LONGEST_RECORD:
                line, _, self.rest = self.rest.partition(b"\n")
                text, record = parse(line.decode(errors="replace"))
                if text.strip():
                    self.lines.append(text.rstrip()[:LONGEST_LINE])
                if record:
                    yield record
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([out], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(out, 2**16)
            if not chunk:
                return
            self.rest += chunk

    def output(self) -> str:
        return "\n".join(self.lines)

    def status(self) -> int | None:
        """Its exit status, once its output has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=10)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it; the rest need not wait
            self.process.wait(timeout=10)

    def finish(self, limit: float) -> int | None:
        """Its exit status once it has no more to do; None if it does not end."""
        self.send({"end": True})
        try:
            for _ in self.records(time.monotonic() + limit):
                pass
            return self.process.wait(timeout=limit)
        except (TimeoutError, subprocess.TimeoutExpired):
            return None
        finally:
            self.kill()


def parse(line: str) -> tuple[str, dict | None]:
    """What is printed in a line, and the record at its end. What only looks like one is printed too."""
    text, separator, record = line.partition(SEPARATOR)
    if separator:
        with contextlib.suppress(ValueError):
            found = json.loads(record)
            if isinstance(found, dict) and found.keys() & {"finding", "error", "done"}:
                return text, found
    return line, None


def ended_by(status: int | None) -> str:
    if status is None:
        return "without an exit status"
    if status < 0:
        return f"by {signal.Signals(-status).name}"
    return f"with exit status {status}"


# The other end.


def report(record: dict) -> None:
    """One write, so that no other output comes between; on a line of its own, whatever was printed before."""
    sys.stdout.flush()
    os.write(1, f"\n{SEPARATOR}{json.dumps(record, ensure_ascii=False)}\n".encode(errors="replace"))


def first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:LONGEST_LINE]}"


def receive(messages: queue.Queue) -> None:
    # Unbuffered: a thread that waits inside of sys.stdin would disturb the end of the process.
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        for line in pipe:
            messages.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)  # gpu_check.py is gone


def work(run: Callable[..., Iterator[dict]], setup: Setup) -> None:
    messages: queue.Queue = queue.Queue()
    threading.Thread(target=receive, args=(messages,), daemon=True).start()
    while "end" not in (message := messages.get()):
        try:
            for finding in run(setup, **Item(**message).arguments):
                report({"finding": finding})
            report({"done": True})
        except Exception as error:
            traceback.print_exc()
            report({"error": first_line(error)})


if __name__ == "__main__":
    module, setup = sys.argv[1:]
    work(importlib.import_module(module).run, Setup(**json.loads(setup)))
