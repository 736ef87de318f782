"""How a tool ends that may be one of several processes."""

import gc
import sys
from collections.abc import Callable
from typing import NoReturn

from torch import distributed


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the status that `main` returns, and before that its threads that talk to the others.

    A thread of gloo lets go of its tensors a moment after a collective returns; where Python is being shut down by
    then, that aborts the process (https://github.com/pytorch/pytorch/pull/179291). The threads end with the last
    reference to their group. Those that FSDP leaves in caches of DTensor cannot be reached; they have at least the
    time that collecting takes.
    """
    status = main()
    # After an error the others may be waiting for this process, and NCCL ends a group together: torchrun stops them.
    if status != 1 and distributed.is_initialized():
        gc.collect()  # a model in a cycle of references still holds the group
        distributed.destroy_process_group()
    sys.exit(status)
