"""Writes files whole or not at all."""

import csv
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_write", "write_csv"]


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


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same keys, at least one, as UTF-8 with LF.

    Raises:
        OSError: see `atomic_write`.
    """
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
