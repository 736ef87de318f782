"""How a tool ends that may be one of several processes, or that a signal asks to end."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from torch import distributed

# What asks a tool to save and end: the system or a queue, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the status that `main` returns, and before that its threads that talk to the others.

    A thread of gloo lets go of its tensors a moment after a collective returns; where Python is being shut down by
    then, that aborts the process (https://github.com/pytorch/pytorch/pull/179291). The threads end with the last
    reference to their group. Those that FSDP leaves in caches of DTensor cannot be reached; they have at least the
    time that collecting takes.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        # At once: without waiting for the other processes, nor for threads of libraries.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)
    # After an error the others may be waiting for this process, and NCCL ends a group together: torchrun stops them.
    if status != 1 and distributed.is_initialized():
        gc.collect()  # a model in a cycle of references still holds the group
        distributed.destroy_process_group()
    sys.exit(status)


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """A list that is empty until SIGTERM or Ctrl-C comes, which then end nothing by themselves.

    Raises:
        KeyboardInterrupt: another signal came, and one of them was Ctrl-C. torchrun passes a second Ctrl-C on as
            SIGTERM. SIGTERM alone may come any number of times, as some queues send it.
    """
    came: list[signal.Signals] = []
    owner = os.getpid()

    def handle(number: int, _) -> None:
        if os.getpid() != owner:
            return  # A process that reads, forked from this one, is needed until this one ends it.
        came.append(signal.Signals(number))
        if len(came) > 1 and signal.SIGINT in came:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
