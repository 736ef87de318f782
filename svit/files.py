"""Writes files whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Gives a path to write to. At the end of the block that file becomes `target`; after an error `target` stays.

    Raises:
        OSError: `target`'s folder cannot be written to.
    """
    # In the same folder, since a move is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as folder:
        part = Path(folder, target.name)
        yield part
        os.replace(part, target)
