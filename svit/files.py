"""Writes files whole or not at all, and checks their names."""

import csv
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svit.errors import InputError

__all__ = ["atomic_write", "check_utf8", "is_special", "write_csv"]


def check_utf8(what: str, text: str) -> None:
    """Names of files may be any bytes, but not for all libraries, nor in YAML.

    Raises:
        InputError: `text` holds others than UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: expected UTF-8 (a symbolic link can have such a name), got {text}") from error


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Gives a path to write to. At the end of the block that file becomes `target`; after an error `target` stays.

    A link stays, and what it leads to is replaced. What `is_special` gets the file's bytes at the end.

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
            sys.stdout.flush()  # which may be the target
            number = descriptor(target)
            with part.open("rb") as source, open(target if number is None else os.dup(number), "wb") as file:
                shutil.copyfileobj(source, file)
        else:
            os.replace(part, whole)


def is_special(path: Path) -> bool:
    """Whether no file may replace a path: that of a device, a pipe, a socket, or an open file such as /dev/stdout."""
    return descriptor(path) is not None or (path.exists() and not (path.is_file() or path.is_dir()))


def descriptor(path: Path) -> int | None:
    """The number of the open file of this process that a path names, as /dev/stdout or /dev/fd/3 do."""
    own = {f"/proc/{process}/fd" for process in ("self", "thread-self", os.getpid())} | {"/dev/fd"}
    for _ in range(40):  # as many links as Linux follows
        if path.name.isdecimal() and os.path.realpath(path.parent) in own:
            return int(path.name)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return None


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of the same keys, at least one, as UTF-8 with LF.

    Raises:
        OSError: see `atomic_write`.
    """
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
