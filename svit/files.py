"""Writes files whole or not at all."""

import csv
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_write", "is_special", "write_csv"]


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Gives a path to write to. At the end of the block that file becomes `target`; after an error `target` stays.

    A link stays, and what it leads to is replaced. A device or a pipe gets the file's bytes.

    Raises:
        OSError: `target` or its folder cannot be written to.
    """
    special = is_special(target)
    whole = Path(os.path.realpath(target))
    # In the same folder, since a move is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=None if special else whole.parent) as folder:
        part = Path(folder, target.name)
        yield part
        if special:
            with part.open("rb") as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
        else:
            os.replace(part, whole)


def is_special(path: Path) -> bool:
    """Whether a path is of a device, a pipe or a socket, such as /dev/stdout."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same keys, at least one, as UTF-8 with LF.

    Raises:
        OSError: see `atomic_write`.
    """
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
