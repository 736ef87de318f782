import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` at the end of the block: whole, or, on an error, not at all.

    Raises:
        OSError: `target`'s folder cannot be written to.
    """
    # In the same folder, since a file can be moved at once within one file system only.
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as folder:
        part = Path(folder, target.name)
        yield part
        os.replace(part, target)
