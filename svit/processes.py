"""How a tool ends: alone or as one of several processes, when a signal asks it to, and when nobody reads on."""

import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# What asks a tool to save and end: the system or a queue, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stream(io.TextIOWrapper):
    """stdout or stderr; where it cannot be written to, the process ends.

    In silence and with status 141 where the reader is gone, as in `| head`: that is what a shell calls the end by
    SIGPIPE, a signal that would come from sockets and other pipes too. Else, as on a full disk, with a line and 1.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        # What the encoding lacks, say of a file's name, is no error.
        super().__init__(
            stream.buffer,
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.end(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.end(error)

    def end(self, error: OSError) -> NoReturn:
        # What is left in the buffer is written when Python ends, and must find somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(f"error: the output cannot be written ({error.strerror})")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a tool and ends the process with the status that `main` returns, or 130 after Ctrl-C.

    Before that it ends the threads that talk to other processes. A thread of gloo lets go of its tensors a moment after
    a collective returns; where Python is being shut down by then, that aborts the process
    (https://github.com/pytorch/pytorch/pull/179291). The threads end with the last reference to their group. Those that
    FSDP leaves in caches of DTensor cannot be reached; they have at least the time that collecting takes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Where it was closed from the start, what is written goes nowhere; libraries want something to write to.
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w") if stream is None else Stream(stream))
    try:
        status = main()
    except KeyboardInterrupt:
        end_at_once()
    finally:
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to do: a traceback would tell of that alone
    distributed = sys.modules.get("torch.distributed")
    # After an error the others may be waiting for this process, and NCCL ends a group together: torchrun stops them.
    if status != 1 and distributed and distributed.is_initialized():
        gc.collect()  # a model in a cycle of references still holds the group
        distributed.destroy_process_group()
    sys.exit(status)


def end_at_once() -> NoReturn:
    """Ends an interrupted process without waiting for other processes, nor for threads of libraries."""
    sys.stdout.flush()
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that is empty until SIGTERM or Ctrl-C comes, which then end nothing by themselves.

    Raises:
        KeyboardInterrupt: another signal came, and one of them was Ctrl-C. torchrun passes a second Ctrl-C on as
            SIGTERM. SIGTERM alone may come any number of times, as some queues send it.
    """
    received: list[signal.Signals] = []
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # A process that reads, forked from this one, is needed until this one ends it.
        received.append(signal.Signals(number))
        if len(received) > 1 and signal.SIGINT in received:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
