__all__ = ["InputError"]


class InputError(ValueError):
    """What the user gave cannot be used: an argument, a file, data.

    The message names it, what came and what is expected. The commands print it as `error: ...`, without a traceback,
    and end with status 1.
    """
