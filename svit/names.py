import difflib
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "distinct"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: '; did you mean a, b?' with those nearest, or ''."""
    close = ", ".join(difflib.get_close_matches(name, list(known)))
    return f"; did you mean {close}?" if close else ""


def distinct(names: Sequence[str], tags: Sequence[str] | None = None) -> list[str]:
    """The names, each of those that occur more than once with a tag behind it in brackets.

    Args:
        names: of classes, say.
        tags: of each name; where they do not tell all names apart, or without any, their numbers from 0 on do.
    """
    found = list(names)
    while len(set(found)) < len(found):
        counts = Counter(found)
        tags = tags or [str(number) for number in range(len(found))]
        found = [f"{name} ({tag})" if counts[name] > 1 else name for name, tag in zip(found, tags, strict=True)]
        tags = None
    return found
