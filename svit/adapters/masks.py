"""The values that masks of class numbers may hold, as MMSegmentation reads them."""

from collections.abc import Iterable

import numpy as np
from PIL import Image

__all__ = ["NUMBERS", "WIDE_NUMBERS", "MaskValues", "in_words", "values_of"]

# Pillow's modes with one channel of numbers. The colours of a palette are ignored.
NUMBERS = {"1", "L", "P"}
# Modes with one channel of more bits. MMSegmentation keeps the last 8 bits of each number.
WIDE_NUMBERS = {"I", "I;16", "I;16L", "I;16B", "I;16N"}


class MaskValues:
    """The values that the masks of a data set may hold in their files.

    Args:
        num_classes: of the data set.
        reduce_zero_label: 0 is no class, and class i has the value i + 1.
        label_map: from the classes of the data set's type to those of the config, if they differ.
        ignore_index: a value that is no class, beside 255.
    """

    def __init__(
        self,
        num_classes: int,
        reduce_zero_label: bool = False,
        label_map: dict[int, int] | None = None,
        ignore_index: int = 255,
    ) -> None:
        labels = np.arange(256)
        if reduce_zero_label:
            labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
        if label_map:
            labels = np.array([label_map.get(label, label) for label in labels.tolist()])
        self.num_classes = num_classes
        self.ignored = np.flatnonzero((labels == 255) | (labels == ignore_index))
        self.classes = np.setdiff1d(np.flatnonzero(labels < num_classes), self.ignored)

    def __str__(self) -> str:
        return f"{ranges(self.classes)} or {ranges(self.ignored)} = ignore"

    def flaw(self, values: np.ndarray) -> str | None:
        """The problem of the values of one mask, or None."""
        unknown = np.setdiff1d(values, [*self.classes, *self.ignored])
        return f"{in_words(values)}; expected {self}" if unknown.size else None

    def flaw_of_all(self, values: np.ndarray) -> str | None:
        """The problem of the values of many masks together, or None. Each mask may be valid by itself."""
        classes = np.intersect1d(values, self.classes)
        # Binary masks: 0 is the first class, and 255 is ignored. With `reduce_zero_label`, 0 is ignored too.
        binary = classes.tolist() == self.classes[:1].tolist() and classes.size < min(self.num_classes, values.size)
        if classes.size == 0 or binary:
            return f"nothing but {in_words(values)}; expected {self}"
        return None


def ranges(numbers: Iterable[int]) -> str:
    """Rising numbers in words, such as "0..10, 255"."""
    parts: list[tuple[int, int]] = []
    for number in map(int, numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(f"{low}..{high}" if low < high else str(low) for low, high in parts)


def in_words(values: Iterable[int], limit: int = 8) -> str:
    """Such as "values 0 and 255"."""
    names = [str(int(value)) for value in values]
    if len(names) == 1:
        return f"value {names[0]}"
    last = names[-1] if len(names) <= limit else f"{len(names) - limit + 1} more"
    return f"values {', '.join(names[:-1][: limit - 1])} and {last}"


def values_of(mask: Image.Image) -> np.ndarray:
    """The distinct values in a mask of one channel, in rising order."""
    pixels = np.asarray(mask)
    return np.flatnonzero(np.bincount(pixels.ravel())) if pixels.dtype == np.uint8 else np.unique(pixels).astype(int)
