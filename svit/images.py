"""Opens images: upright, with 8 bits for each channel, and with a model's channels. docs/data.md has the rules."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from os import PathLike, fspath
from statistics import fmean
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from svit.errors import InputError

__all__ = ["EXTENSIONS", "FORMATS", "MODES", "UnreadableImageError", "channel_values", "mode_of", "read_image"]

# Formats that Pillow recognizes without having a decoder (for some it starts another program), or decodes in the wrong
# byte order (FITS).
NOT_DECODED = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}

Image.init()
FORMATS = sorted((name for name in Image.ID if name not in NOT_DECODED), key=lambda name: name not in ("JPEG", "PNG"))
"""Formats that are read, by Pillow's names, in the order in which it tries them: the frequent ones come first."""

EXTENSIONS = frozenset(end for end, name in Image.registered_extensions().items() if name in FORMATS)
"""Ends of the names of files that count as images: in lower case, with the dot."""

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by the number of channels: grey and colour, without and with an alpha channel."""

# The shorter side is resized to a model's size, and the longer one with it: 1 x 60,000 pixels would fill the memory.
LONGEST = 2000

# Tags of a TIFF.
BITS, COMPRESSION, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 259, 262, 284, 339
UNSIGNED, SIGNED = 1, 2  # values of the last
KINDS = {UNSIGNED: "u", SIGNED: "i", 3: "f"}  # of NumPy


class UnreadableImageError(InputError):
    """A file is no image or is damaged. The message says why, and names the file if it has a path."""


def read_image(file: str | PathLike[str] | BinaryIO | Image.Image, mode: str = "RGB") -> Image.Image:
    """Reads an image as viewers show it: turned by its EXIF orientation, with 8 bits for each channel.

    Integers of other types are divided by the largest value of their type, those of 32 bits by 65535 if no value is
    larger. Floats from 0 to 1 are not scaled. Other floats, and integers with negative values, are scaled from the
    image's least and largest value. NaN is black. If the EXIF data is damaged, the image stays as stored.

    Args:
        file: a path, a binary file, or an image that Pillow has opened. That image is not changed.
        mode: of the result, one of `MODES`. Pillow converts palettes, CMYK and transparency.

    Raises:
        UnreadableImageError: the file does not exist, is no image, is cut short, has too many pixels, or one side is
            more than `LONGEST` times the other.
    """
    try:
        if isinstance(file, Image.Image):
            return _converted(file, mode)
        with Image.open(file, formats=FORMATS) as image:
            return _converted(image, mode)
    except Exception as error:  # for a damaged file Pillow's decoders raise nearly any exception
        reason = _reason(error)
        if isinstance(file, str | PathLike):
            reason = f"{fspath(file)}: cannot be read ({reason})"
        raise UnreadableImageError(reason) from error


def mode_of(in_chans: int) -> str:
    """Pillow's mode for images with `in_chans` channels.

    Raises:
        InputError: there is none.
    """
    if in_chans not in MODES:
        modes = ", ".join(f"{channels} ({mode})" for channels, mode in MODES.items())
        raise InputError(f"in_chans: expected the channels of an image, one of {modes}, got {in_chans}")
    return MODES[in_chans]


def channel_values(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Converts the mean or the standard deviation of an image's channels to `in_chans` channels.

    Grey gets the mean of the colours' values, a colour gets the value of grey, an alpha channel 0.5. If there are as
    many values as channels, or `in_chans` is not in `MODES`, the values do not change.
    """
    if len(values) == in_chans or in_chans not in MODES:
        return tuple(values)
    colours = tuple(values[:3] if len(values) > 2 else values[:1])
    if in_chans < 3:
        colours = (fmean(colours),)
    elif len(colours) == 1:
        colours *= 3
    return colours if in_chans in (1, 3) else (*colours, 0.5)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a format that Pillow reads"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"expected sides of at most {LONGEST} to 1, got {image.width} x {image.height} pixels")
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANES) == 2 and len(tags[BITS]) > 1 and max(tags[BITS]) > 8:
        raise ValueError("16-bit colours in separate planes, which Pillow decodes wrongly")
    image = image.copy()  # without the tags
    # In place, since Pillow then turns the pixels before it rewrites the EXIF data, which may be damaged.
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;") or tags.get(SAMPLE_FORMAT) == (SIGNED,):
        image = _in_8_bits(image, tags)
    if image.mode == "LAB":  # Pillow converts it to RGB only
        image = image.convert("RGB")
    return image.convert(mode)


def _in_8_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """One channel of integers or floats in mode L; `tags` are those of a TIFF."""
    values = _samples(image, tags)
    black, white = _limits(values)
    share = (values.astype(np.float64) - black) / ((white - black) or 1)
    found = Image.fromarray((np.nan_to_num(share, nan=0).clip(0, 1) * 255).round().astype(np.uint8))
    # White is zero. For images of 8 bits Pillow inverts the values itself.
    return ImageOps.invert(found) if tags.get(PHOTOMETRIC) == 0 else found


def _samples(image: Image.Image, tags: Mapping[int, Any]) -> np.ndarray:
    """The values of one channel. For a TIFF they have the type of the file, which Pillow's modes do not show."""
    values = np.asarray(image)
    if BITS not in tags:
        return values
    bits, kind = tags[BITS][0], tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
    values = values.astype(f"{KINDS[kind]}{-(-bits // 8)}")
    if image.mode in ("I", "F") and getattr(tags, "prefix", None) == b"MM" and tags.get(COMPRESSION, 1) != 1:
        values = values.byteswap()  # both libtiff, which decompresses, and Pillow have swapped the bytes
    return values << 4 | values >> 8 if bits == 12 else values


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The values of black and white, by the rules of `read_image`."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low < 0:
        return low, high
    if np.issubdtype(values.dtype, np.floating):
        return (0.0, 1.0) if high <= 1 else (low, high)
    largest = np.iinfo(values.dtype).max
    return 0.0, float(65535 if high <= 65535 < largest else largest)
