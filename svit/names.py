"""Names: suggestions for unknown ones, and distinct names of classes."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "distinct"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: '; did you mean a, b?' with the nearest names, or ''."""
    close = ", ".join(difflib.get_close_matches(name, list(known)))
    return f"; did you mean {close}?" if close else ""


def distinct(names: Sequence[str], tags: Sequence[str] | None = None) -> list[str]:
    """The names, with a tag in brackets after each name that occurs more than once.

    Args:
        names: for example of classes.
        tags: one for each name. Without tags, or if they do not make all names distinct, numbers from 0 on do.
    """
    found = list(names)
    while len(set(found)) < len(found):
        counts = Counter(found)
        tags = tags or [str(number) for number in range(len(found))]
        found = [f"{name} ({tag})" if counts[name] > 1 else name for name, tag in zip(found, tags, strict=True)]
        tags = None
    return found
