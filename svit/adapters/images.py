"""Checks every file of the data sets before the first iteration, and every mask when it is loaded."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS
from mmengine.runner import Runner
from PIL import Image

from svit.errors import InputError

from .masks import NUMBERS, WIDE_NUMBERS, MaskValues, in_words, values_of

__all__ = ["CheckImagesHook", "CheckMask", "ImageError", "Sizes", "is_turned"]

# So many masks of each data set are decoded before training. Of the others only the header is read.
SAMPLE = 64
EXIF_ORIENTATION = 0x0112
# Formats that every OpenCV reads. For others the check asks OpenCV.
READ_BY_OPENCV = {"JPEG", "PNG", "BMP"}
DAMAGED = "not an image, or a damaged one"


class ImageError(InputError):
    """Images or masks are missing, cannot be decoded or do not fit each other. The message names them."""

    def __init__(self, message: str) -> None:
        # A DataLoader puts the worker's traceback before the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class Sizes(NamedTuple):
    """Width and height of an image as stored, and after turning it by its EXIF orientation."""

    stored: tuple[int, int]
    upright: tuple[int, int]

    @classmethod
    def of(cls, image: Image.Image) -> "Sizes":
        """Reads the sizes from the header. Pillow and OpenCV always turn a TIFF.

        EXIF data of a PNG counts only if it stands before the pixels: otherwise Pillow would read the whole file.
        """
        sideways = False
        if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
            with suppress(Exception):  # damaged EXIF data does not turn the image
                sideways = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
        return cls(image.size, image.size[::-1] if sideways else image.size)

    def flaw(self, turned: bool, expected: tuple[int, int], what: str) -> str | None:
        """A text if the loaded size of the image differs from the expected one, with the remedy. Else None."""
        loaded = self.upright if turned else self.stored
        if tuple(expected) == loaded:
            return None
        text = f"the image is loaded as {in_pixels(loaded)}, {what} {in_pixels(expected)} pixels"
        if tuple(expected) not in self:
            return text
        color_type = "color_ignore_orientation" if turned else "color"
        does = "turns it" if turned else "would turn it"
        return f"{text}; its EXIF orientation {does}: set color_type='{color_type}' in the pipelines' LoadImageFromFile"


@HOOKS.register_module()
class CheckImagesHook(Hook):
    """Opens every image and mask of the training and validation data before training starts.

    It stops the run at once, instead of after hours, if

    - a file is missing, empty or no image
    - the size of an image differs from its annotations or its mask
    - a mask is in colours
    - a decoded mask has a class number that does not exist

    It decodes `SAMPLE` masks at even distances, and all masks of more than 8 bits. Of other files it reads the header
    only, which takes some tenths of a millisecond. Processes share the work. `custom_hooks=[]` in a config turns the
    hook off, for data that Pillow cannot open.

    Args:
        decode: decode every file, which also finds files that are cut short. It takes as long as loading the images of
            two epochs.

    Raises:
        ImageError: names the first few such files and their number.
    """

    def __init__(self, decode: bool = False) -> None:
        self.decode = decode

    def before_train(self, runner: Runner) -> None:
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            check_images(loader.dataset, self.decode)

    def before_test(self, runner: Runner) -> None:
        check_images(runner.test_dataloader.dataset, self.decode)


@TRANSFORMS.register_module()
class CheckMask:
    """Raises an error for a mask with a number of no class. It stands after MMSegmentation's `LoadAnnotations`.

    Our commands put it into every pipeline of a segmentor. Without it the loss fails with an index error, on a GPU with
    an assertion of the device, and neither names the mask.

    Args:
        num_classes: of the data set.
        ignore_index: a value that is no class, beside 255.

    Raises:
        ImageError: names the mask, its values and those expected.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        labels = results["gt_seg_map"]
        if ((labels >= self.num_classes) & (labels != 255) & (labels != self.ignore_index)).any():
            values = np.unique(labels).astype(int)
            if results.get("reduce_zero_label"):  # the values in the file
                values = np.sort(np.where(values == 255, 0, values + 1))
            # `label_map` has been applied before.
            expected = MaskValues(self.num_classes, bool(results.get("reduce_zero_label")), None, self.ignore_index)
            raise ImageError(f"mask {results['seg_map_path']}: {in_words(values)}; expected {expected}")
        return results


def check_images(dataset: Any, decode: bool = False) -> None:
    """Opens every file that a data set of mmengine (`get_data_info`) names, or those of the data sets that it wraps.

    Raises:
        ImageError: see `CheckImagesHook`.
    """
    for part in parts(dataset):
        Checked(part, decode).run()


def parts(dataset: Any) -> Iterator[Any]:
    """The data sets that `dataset` wraps, each once."""
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    for part in inner:
        yield from [dataset] if part is None else parts(part)


class Checked:
    """Checks one data set and collects the problems of its files."""

    def __init__(self, dataset: Any, decode: bool) -> None:
        self.dataset, self.decode = dataset, decode
        self.bad: dict[str, str] = {}
        self.looked_at = 0  # masks whose pixels were
        self.seen: set[int] = set()  # their values
        transforms = getattr(getattr(dataset, "pipeline", None), "transforms", [])
        loader = next((t for t in transforms if hasattr(t, "color_type")), None)
        color_type, backend = getattr(loader, "color_type", "color"), getattr(loader, "imdecode_backend", "cv2")
        self.turned = is_turned(color_type, backend)
        self.loader, self.unchanged = loader, color_type == "unchanged"
        self.by_opencv = loader is not None and backend in ("cv2", None)
        self.by_pillow = loader is not None and backend == "pillow"
        classes = (getattr(dataset, "metainfo", None) or {}).get("classes")
        self.values = None
        if classes and hasattr(dataset, "reduce_zero_label"):  # of MMSegmentation
            label_map, ignore_index = getattr(dataset, "label_map", None), getattr(dataset, "ignore_index", 255)
            self.values = MaskValues(len(classes), dataset.reduce_zero_label, label_map, ignore_index)

    def run(self) -> None:
        rank, processes = get_dist_info()
        every = max(1, len(self.dataset) // SAMPLE)
        for i in range(rank, len(self.dataset), processes):
            info = self.dataset.get_data_info(i)
            image_flaw = partial(self.image_flaw, info=info)
            sizes = self.look(info.get("img_path"), image_flaw)
            in_sample = self.decode or i // processes % every == 0
            self.look(info.get("seg_map_path"), partial(self.mask_flaw, sizes=sizes, in_sample=in_sample))
        bad = {file: problem for part in all_gather_object(self.bad) for file, problem in part.items()}
        if bad:
            named = first(f"{file} ({problem})" for file, problem in bad.items())
            raise ImageError(f"{len(bad)} of the images cannot be read or used: {named}")
        if self.values is None:
            return
        counts, seen = zip(*all_gather_object((self.looked_at, self.seen)), strict=True)
        flaw = self.values.flaw_of_all(np.array(sorted(set().union(*seen)))) if sum(counts) else None
        if flaw:
            folder = self.dataset.data_prefix.get("seg_map_path")
            raise ImageError(f"masks in {folder}: {flaw} (in the {sum(counts)} looked at)")

    def look(self, file: Any, flaw_of: Callable[[Image.Image], str | None]) -> Sizes | None:
        """Opens a file and records its problem. Returns its sizes, or None if it cannot be opened."""
        if file is None or "://" in str(file):  # remote files are not checked
            return None
        problem, sizes = None, None
        try:
            with Image.open(file) as image:
                sizes = Sizes.of(image)
                problem = flaw_of(image)
                if self.decode:
                    image.load()
        except FileNotFoundError:
            problem = "no such file"
        except Exception:  # for a damaged file Pillow's decoders raise nearly any exception
            problem = DAMAGED
        if problem:
            self.bad[str(file)] = problem
        return sizes

    def image_flaw(self, image: Image.Image, info: dict[str, Any]) -> str | None:
        """The problem of an image for the config's loader, or None: by its header, and with `decode` by its pixels."""
        if self.by_opencv and image.format not in READ_BY_OPENCV:
            if image.format == "TIFF" and image.mode in ("I", "F") and not self.unchanged:
                return "a TIFF of 32 bits, which OpenCV does not read"
            if not cv2.haveImageReader(str(info["img_path"])):
                return f"{image.format}, which OpenCV does not read"
        if self.by_pillow and image.mode in WIDE_NUMBERS | {"F"} and not self.unchanged:
            return "more than 8 bits, which imdecode_backend='pillow' makes white; OpenCV, the default, takes 16"
        if self.loader is not None and self.by_opencv and self.decode:
            self.loader(dict(img_path=info["img_path"]))  # OpenCV refuses some files that Pillow reads
        width, height = info.get("width"), info.get("height")
        if width is None or height is None:
            return None
        return Sizes.of(image).flaw(self.turned, (width, height), "its annotations are of")

    def mask_flaw(self, mask: Image.Image, sizes: Sizes | None, in_sample: bool) -> str | None:
        """The problem of a mask, or None: by its header, and in the sample by its pixels."""
        flaw = sizes and sizes.flaw(self.turned, mask.size, "this mask is")
        if flaw or self.values is None:
            return flaw
        if mask.mode not in NUMBERS | WIDE_NUMBERS:
            return f"a mask in colours (mode {mask.mode}); expected one channel of class numbers, {self.values}"
        if not in_sample and mask.mode in NUMBERS:
            return None
        values = values_of(mask)
        self.seen.update(values.tolist())
        self.looked_at += 1
        flaw = self.values.flaw(values)
        return flaw and f"a mask of {flaw}"


def is_turned(color_type: str, backend: str | None) -> bool:
    """Whether mmcv turns an image by its EXIF orientation if `LoadImageFromFile` has these arguments."""
    return backend in ("cv2", "pillow", None) and color_type in ("color", "grayscale")


def in_pixels(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def problem_with(file: Any) -> str | None:
    """The problem of an image file by its header, or None."""
    try:
        with Image.open(file):
            return None
    except FileNotFoundError:
        return "no such file"
    except Exception:
        return DAMAGED


def first(names: Iterable[Any], limit: int = 5) -> str:
    names = list(map(str, names))
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
