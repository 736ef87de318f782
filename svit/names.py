import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: '; did you mean a, b?' with those nearest, or ''."""
    close = ", ".join(difflib.get_close_matches(name, list(known)))
    return f"; did you mean {close}?" if close else ""
