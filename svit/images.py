"""The one place that opens images: upright, 8 bits deep, of the channels that a model takes. docs/data.md says how."""

from contextlib import suppress
from os import PathLike, fspath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["EXTENSIONS", "FORMATS", "MODES", "UnreadableImageError", "mode_of", "read_image"]

# Pillow finds those, but has no decoder for them or starts another program.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

Image.init()
FORMATS = [name for name in Image.ID if name not in NOT_DECODED]
# Lower case, with the dot.
EXTENSIONS = frozenset(end for end, name in Image.registered_extensions().items() if name in FORMATS)

# Tags of a TIFF.
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339

# Pillow's modes by the number of channels: grey and colour, without and with an alpha channel.
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class UnreadableImageError(ValueError):
    """A file is no image, or a damaged one; the message says why, and names the file where that has a path."""


def mode_of(in_chans: int) -> str:
    """Pillow's mode of images with so many channels.

    Raises:
        ValueError: there is none.
    """
    if in_chans not in MODES:
        modes = ", ".join(f"{channels} ({mode})" for channels, mode in MODES.items())
        raise ValueError(f"in_chans: expected a number of channels that images have: {modes}; got {in_chans}")
    return MODES[in_chans]


def read_image(file: str | PathLike | BinaryIO | Image.Image, mode: str = "RGB") -> Image.Image:
    """An image as a person sees it: turned by its EXIF orientation, in 8 bits a channel.

    Integers of more bits are divided by the largest of their type: 65535, or 2^31 - 1 if a value is above that. Floats
    from 0 to 1 are taken as they are. Other floats, and integers some of which are negative, are scaled from the
    image's own least and largest value; NaN is black. Where the EXIF data is damaged the image stays as it is stored.

    Args:
        file: a path, a binary file, or an image that Pillow has opened, which is left as it is.
        mode: of the result, one of `MODES`; Pillow converts palettes, CMYK and transparency.

    Raises:
        UnreadableImageError: no such file, no image, one cut short or of too many pixels, or of a mode that Pillow does
            not convert, such as LAB.
    """
    try:
        if isinstance(file, Image.Image):
            return _converted(file.copy(), mode)
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            return _converted(image, mode)
    except Exception as error:  # of a damaged file, Pillow's decoders raise nearly anything
        where = f"{fspath(file)}: " if isinstance(file, str | PathLike) else ""
        raise UnreadableImageError(f"{where}{_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a format that Pillow reads"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _converted(image: Image.Image, mode: str) -> Image.Image:
    # In place Pillow turns the pixels first, and then rewrites EXIF data, which may be damaged elsewhere.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _in_8_bits(image)
    return image.convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """One channel of integers or floats in mode L."""
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF
    values = np.asarray(image)
    if image.mode == "I" and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # what Pillow holds as signed
    black, white = _limits(values)
    share = (values.astype(np.float64) - black) / ((white - black) or 1)
    found = Image.fromarray((np.nan_to_num(share, nan=0).clip(0, 1) * 255).round().astype(np.uint8))
    # Pillow sees to that in images of 8 bits.
    return ImageOps.invert(found) if tags.get(PHOTOMETRIC) == 0 else found


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The values that are black and white, as `read_image` says."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low < 0:
        return low, high
    if np.issubdtype(values.dtype, np.floating):
        return (0.0, 1.0) if high <= 1 else (low, high)
    return 0.0, 65535.0 if high <= 65535 else float(np.iinfo(values.dtype).max)
