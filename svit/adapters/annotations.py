"""Checks annotations in COCO's format before training starts. It corrects or refuses what a config cannot use."""

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_mask

from svit.convert import listing
from svit.files import atomic_write

from .configs import ConfigError
from .images import first

__all__ = ["AnnotationFiles", "Findings", "check_annotations", "check_classes", "check_filter", "read_annotations"]

# The largest share of objects that MMDetection may leave out without an error. In COCO 2017 it leaves out 2 of 860,001.
TOLERATED = 1 / 1000
# The largest coordinate in pixels. pycocotools allocates memory for every pixel along an edge, and crashes without any.
FAR = 1e6
BOX = "[x, y, width, height] in pixels"
MASK = "polygons of 3 points or more, [[x1, y1, x2, y2, x3, y3, ...], ...], or an RLE of the image's size"


class Findings:
    """Problems by kind. As text: a line for each kind, with the count and the first names."""

    def __init__(self) -> None:
        self.kinds: dict[str, list[Any]] = {}

    def add(self, kind: str, name: Any) -> None:
        self.kinds.setdefault(kind, []).append(name)

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    def __str__(self) -> str:
        return "".join(f"\n  {len(names)} {kind}: {first(names)}" for kind, names in self.kinds.items())


class AnnotationFiles:
    """The annotations of one split in COCO's format. Each file is read and checked once, and written if corrected.

    Args:
        split: its name, for the names of corrected files.
        folder: folder of corrected files, None for a temporary one.
    """

    def __init__(self, split: str, folder: str | None) -> None:
        self.split, self.folder = split, folder
        self.contents: dict[Path, dict[str, Any]] = {}
        self.fixed: dict[Path, Findings] = {}
        self.users: list[tuple[Path, dict[str, Any]]] = []

    def check(
        self, user: dict[str, Any], file: Path, where: str, classes_where: str, classes: Sequence[str], *args: Any
    ) -> dict[str, Any]:
        """Reads and checks a file that a part of the config names as `ann_file`. Returns its content.

        Args:
            where, classes_where: names of the file and of the classes in the config, for messages.
            classes: see `check_classes`.
            args: the last ones of `check_annotations`.
        """
        file = file.absolute()
        self.users.append((file, user))
        if file not in self.contents:
            content = read_annotations(file, where)
            check_classes(content, file, classes_where, classes)
            self.fixed[file], left_out = check_annotations(content, file, where, classes, *args)
            self.contents[file] = content
            if left_out:
                warnings.warn(f"{file}: objects that MMDetection leaves out, by their ids:{left_out}", stacklevel=2)
        return self.contents[file]

    def write(self) -> None:
        """Writes the corrected files, and sets `ann_file` of the config's parts that use them."""
        for number, (file, fixed) in enumerate(self.fixed.items()):
            if not fixed:
                continue
            folder = Path(self.folder, "annotations") if self.folder else Path(tempfile.mkdtemp(prefix="annotations-"))
            folder.mkdir(parents=True, exist_ok=True)
            same = sum(other.name == file.name for other in self.fixed)  # several folders' annotations.json
            target = folder.resolve() / f"{self.split}-{f'{number}-' if same > 1 else ''}{file.name}"
            with atomic_write(target) as part:
                part.write_text(json.dumps(self.contents[file]))
            for user in [user for used, user in self.users if used == file]:
                user["ann_file"] = str(target)
            warnings.warn(f"{file} was corrected, in {target}; by their ids:{fixed}", stacklevel=2)


def read_annotations(file: Path, where: str) -> dict[str, Any]:
    """Reads a JSON file in COCO's format. `annotations` may be missing, as in the test-dev split.

    Raises:
        ConfigError: there is no such file, it is no JSON, or it lacks `images` or `categories`.
    """
    if not file.is_file():
        raise ConfigError(f"{where}: no such file: {file}")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # also bytes that are no text
        raise ConfigError(f"{where}: {file} is not JSON ({error})") from error
    lists = ("images", "annotations", "categories")
    found = content if isinstance(content, dict) else {}
    missing = [key for key in lists if key not in found]
    if missing and missing != ["annotations"]:
        raise ConfigError(f"{where}: {file} is not in COCO's format, it has no {', '.join(missing)}")
    for key in lists:
        if not isinstance(found.get(key, []), list) or not all(isinstance(entry, dict) for entry in found.get(key, [])):
            raise ConfigError(f"{where}: {file} is not in COCO's format; expected {key} to be a list of objects")
    return found


def check_annotations(
    content: dict[str, Any],
    file: Path,
    where: str,
    classes: Sequence[str],
    with_masks: bool,
    size_of: Callable[[str], tuple[int, int] | None],
) -> tuple[Findings, Findings]:
    """Checks every entry, and corrects `content` in place if an error has one right correction.

    It corrects: missing `width` and `height` of an image, from its file; a missing box, from the mask; boxes that
    extend beyond the image, cropped at its edge; a missing `area`, from the mask or the box; a missing `iscrowd`, to 0;
    ids of annotations that are no positive whole numbers (the evaluation would count no match); polygons of one or two
    points beside others; a single polygon that is not in a list.

    Args:
        content: the result of `read_annotations`.
        file, where: its path, and the name of the path in the config, for messages.
        classes: names of the config's classes. Empty for all categories of the file.
        with_masks: the config trains or evaluates masks.
        size_of: returns width and height of an image by its `file_name`, None if it cannot be read.

    Returns:
        The corrections, and the objects that MMDetection leaves out: those outside their image or smaller than a pixel,
        and those whose polygons have less than three points.

    Raises:
        ConfigError: there are other errors, or MMDetection leaves out more than `TOLERATED` of the objects. One message
            lists all of them with the ids.
    """
    wrong, fixed, left_out = Findings(), Findings(), Findings()
    sizes = check_images(content["images"], size_of, wrong, fixed)
    used = check_categories(content["categories"], classes, wrong)
    annotations = content.get("annotations", [])
    number_annotations(annotations, wrong, fixed)
    beyond: list[Any] = []
    for entry in annotations:
        if entry.get("image_id") is None or not known(entry["image_id"], sizes):
            wrong.add("annotations whose image_id is none of the images'", entry["id"])
        elif not known(entry.get("category_id"), used):
            numbers = first(sorted(used, key=str), 10)
            wrong.add(f"annotations whose category_id is none of the categories' ({numbers})", entry["id"])
        else:
            needs_mask = with_masks and used[entry["category_id"]]
            check_object(entry, sizes[entry["image_id"]], needs_mask, wrong, fixed, left_out, beyond)
    if len(beyond) > 1 and 2 * len(beyond) > len(annotations):
        wrong.kinds[f"boxes that reach beyond their image; expected {BOX}, not two corners"] = beyond
    elif beyond:
        fixed.kinds["boxes that reached beyond their image, cut at its edge"] = beyond
    if len(left_out) > TOLERATED * len(annotations):
        for kind, ids in left_out.kinds.items():
            wrong.kinds.setdefault(kind, []).extend(ids)
    if wrong:
        raise ConfigError(f"{where}: {file} cannot be used as it is; by their ids:{wrong}")
    return fixed, left_out


def known(key: Any, table: dict[Any, Any]) -> bool:
    return isinstance(key, (int, str, float)) and key in table


def is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < 1e15  # JSON has integers that are too large for a float


def is_length(value: Any) -> TypeGuard[float]:
    return is_number(value) and value == int(value) and 0 < value < 2**31


def check_images(
    images: list[dict[str, Any]], size_of: Callable[[str], tuple[int, int] | None], wrong: Findings, fixed: Findings
) -> dict[Any, tuple[int, int]]:
    """Width and height of each image by its id."""
    sizes = {}
    for position, image in enumerate(images):
        key, name = image.get("id"), image.get("file_name")
        if not isinstance(key, (int, str)):
            wrong.add("images without an id; by their places in the list", position)
            continue
        if key in sizes:
            wrong.add("images of the same id as another", key)
        width, height = image.get("width"), image.get("height")
        if not isinstance(name, str) or not name:
            wrong.add("images without a file_name", key)
        elif not (is_length(width) and is_length(height)):
            width, height = size_of(name) or (None, None)
            if width is None:
                wrong.add("images without width and height, whose file cannot be read", f"{key} ({name})")
            else:
                image["width"], image["height"] = width, height
                fixed.add("images without width and height, taken from their files", key)
        sizes[key] = (int(width), int(height)) if is_length(width) and is_length(height) else (1, 1)
    check_kinds(sizes, "images", wrong)
    return sizes


def check_categories(categories: list[dict[str, Any]], classes: Sequence[str], wrong: Findings) -> dict[Any, bool]:
    """Whether each category, by its id, is one of the config's classes."""
    names = {}
    for position, category in enumerate(categories):
        key, name = category.get("id"), category.get("name")
        if not isinstance(key, (int, str)) or not isinstance(name, str):
            wrong.add("categories without an id or a name; by their places in the list", position)
        elif key in names:
            wrong.add("categories of the same id as another", key)
        else:
            names[key] = name
    check_kinds(names, "categories", wrong)
    wanted = set(classes) or set(names.values())
    return {key: name in wanted for key, name in names.items()}


def check_kinds(ids: dict[Any, Any], what: str, wrong: Findings) -> None:
    """Finds ids of mixed types. The evaluation sorts the ids, which fails if some are numbers and others text."""
    texts = [repr(key) for key in ids if isinstance(key, str)]
    if 0 < len(texts) < len(ids):
        wrong.kinds[f"{what} whose ids are text where others are numbers"] = texts


def number_annotations(annotations: list[dict[str, Any]], wrong: Findings, fixed: Findings) -> None:
    ids = {entry["id"] for entry in annotations if type(entry.get("id")) is int}
    following, seen = max(ids, default=0), set()
    for entry in annotations:
        key = entry.get("id")
        if type(key) is not int or key <= 0:
            following = max(following, 0) + 1
            entry["id"] = following
            fixed.add("annotations whose id was no positive number, renumbered", f"{key!r} is now {following}")
        elif key in seen:
            wrong.add("annotations of the same id as another", key)
        seen.add(key if type(key) is int else following)


def check_object(
    entry: dict[str, Any],
    size: tuple[int, int],
    needs_mask: bool,
    wrong: Findings,
    fixed: Findings,
    left_out: Findings,
    beyond: list[Any],
) -> None:
    """Checks one annotation: its mask, box and area."""
    key, (width, height) = entry["id"], size
    segmentation = entry.get("segmentation")
    mask_is_good = False
    if segmentation:
        flaw = check_mask(entry, width, height, fixed)
        mask_is_good = flaw is None
        if needs_mask and flaw == "short":
            left_out.add(f"objects whose polygons have less than 3 points; expected {MASK}", key)
        elif needs_mask and flaw:
            wrong.add(f"objects whose segmentation is {flaw}; expected {MASK}", key)
    elif needs_mask:
        what = "an empty segmentation" if "segmentation" in entry else "no segmentation"
        wrong.add(f"objects with {what}; expected {MASK}, since the config trains or evaluates masks", key)

    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        if box or not mask_is_good:
            wrong.add(f"objects whose bbox is no list of four numbers; expected {BOX}", key)
            return
        box = entry["bbox"] = box_of(entry["segmentation"], width, height)
        fixed.add("objects without a bbox, taken from their masks", key)
    x, y, w, h = box
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0) or w < 1 or h < 1:
        found = box_of(entry["segmentation"], width, height) if mask_is_good else box
        if found[2] >= 1 and found[3] >= 1 and found != box:
            x, y, w, h = entry["bbox"] = found
            fixed.add("objects whose bbox had no size or lay outside the image, taken from their masks", key)
        elif w < 1 or h < 1:
            left_out.add(f"objects whose bbox is smaller than one pixel; expected {BOX}", key)
        else:
            left_out.add(f"objects whose bbox lies outside its image; expected {BOX}", key)
    elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        x, y = max(x, 0), max(y, 0)
        w, h = min(box[0] + w, width) - x, min(box[1] + h, height) - y
        entry["bbox"] = [x, y, w, h]
        if w < 1 or h < 1:
            left_out.add(f"objects whose bbox has less than one pixel in its image; expected {BOX}", key)
        else:
            beyond.append(key)

    area = entry.get("area")
    if not (is_number(area) and area > 0) and w >= 1 and h >= 1:
        measured = area_of(entry["segmentation"], width, height) if mask_is_good else 0
        entry["area"] = measured or float(w * h)
        fixed.add("objects without area, taken from their masks or boxes", key)
    elif not is_number(area):
        entry["area"] = 0.0
        fixed.add("objects without area or size, 0", key)
    if entry.get("iscrowd") is None:  # the evaluation would raise a KeyError
        entry["iscrowd"] = 0
        fixed.add("objects without iscrowd, 0", key)
    elif entry["iscrowd"] not in (0, 1):
        wrong.add("objects whose iscrowd is neither 0 nor 1", key)


def check_mask(entry: dict[str, Any], width: int, height: int, fixed: Findings) -> str | None:
    """The problem of a segmentation that is not empty, or None. 'short' means less than three points."""
    segmentation = entry["segmentation"]
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if not isinstance(counts, (str, list)) or not isinstance(size, list):
            return "an RLE without counts or size"
        if size != [height, width]:
            return f"an RLE of {size}, of an image of {[height, width]}"
        if isinstance(counts, str):
            counts = uncompressed(counts)
        if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != height * width:
            return "an RLE whose counts do not add up to the image"
        return None
    if not isinstance(segmentation, list):
        return "neither a list nor an RLE"
    if all(map(is_number, segmentation)):
        segmentation = entry["segmentation"] = [segmentation]
        fixed.add("objects whose only polygon was not in a list", entry["id"])
    for polygon in segmentation:
        try:
            finite = isfinite(sum(polygon))  # a TypeError for anything but numbers
        except TypeError:
            return "no list of polygons"
        except OverflowError:
            finite = False
        if not isinstance(polygon, list) or not finite or len(polygon) % 2:
            return "a polygon of other than pairs of finite numbers"
        if polygon and (min(polygon) < -FAR or max(polygon) > FAR):
            return "a polygon far outside of any image"
    good = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not good:
        return "short"
    if len(good) < len(segmentation):
        entry["segmentation"] = good
        fixed.add("objects with polygons of less than 3 points beside others, which were dropped", entry["id"])
    return None


def uncompressed(counts: str) -> list[int]:
    """The lengths of the runs in a compressed RLE, or [-1] if it is damaged. (pycocotools would invent missing runs.)

    Each number is a sequence of characters with five bits each, the lowest first. A sixth bit says whether another
    character follows. From the fourth number on, the value is the difference to the number two before.
    """
    codes = np.frombuffer(counts.encode("latin-1", "replace"), np.uint8).astype(np.int64) - 48
    last = codes & 32 == 0
    if not codes.size or not last[-1] or codes.min() < 0 or codes.max() > 63:
        return [-1]
    ends = np.flatnonzero(last)
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(codes.size) - np.repeat(starts, ends - starts + 1)
    if places.max() > 6:  # beyond 2^32
        return [-1]
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * (places[ends] + 1)), 0)  # negative
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers.tolist()


def rle_of(segmentation: list[Any] | dict[str, Any], width: int, height: int) -> dict[str, Any]:
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def box_of(segmentation: list[Any] | dict[str, Any], width: int, height: int) -> list[float]:
    """The box [x, y, width, height] of a mask inside its image."""
    if isinstance(segmentation, dict):
        return coco_mask.toBbox(rle_of(segmentation, width, height)).tolist()
    xs = [min(max(x, 0), width) for polygon in segmentation for x in polygon[::2]]
    ys = [min(max(y, 0), height) for polygon in segmentation for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def area_of(segmentation: list[Any] | dict[str, Any], width: int, height: int) -> float:
    return float(coco_mask.area(rle_of(segmentation, width, height)))


def check_classes(
    content: dict[str, Any], file: Path, where: str, classes: Sequence[str], in_order: bool = True
) -> None:
    """Checks that the config's classes are categories of the file, in the same order.

    Raises:
        ConfigError: a class is no category, or the order differs.
    """
    names = [category.get("name") for category in content["categories"]]
    unknown = [name for name in classes if name not in names]
    if unknown:  # mmdet would train without them and fail at the first evaluation
        has = listing(sorted(map(str, names)))
        raise ConfigError(f"{where}: {listing(unknown)} no category of {file}, which has {has}")
    found = [name for name in names if name in classes]
    # mmdet numbers the classes in the file's order, but names them in the config's.
    if in_order and classes and found != list(classes):
        raise ConfigError(
            f"{where}: expected the categories of {file} in their order, {tuple(found)}, got {tuple(classes)}"
        )


def check_filter(
    content: dict[str, Any], file: Path, where: str, classes: Sequence[str], filter_cfg: dict[str, Any]
) -> None:
    """Counts the training images that `filter_cfg` of a CocoDataset keeps. Warns if it drops images for their size.

    Raises:
        ConfigError: no image is left. The message says why.
    """
    names = {category["id"]: category["name"] for category in content["categories"]}
    wanted = set(classes) or set(names.values())
    found = {entry["image_id"] for entry in content["annotations"] if names[entry["category_id"]] in wanted}
    images, least = content["images"], filter_cfg.get("min_size", 0)
    empty = [image["id"] for image in images if image["id"] not in found] if filter_cfg.get("filter_empty_gt") else []
    small = [image for image in images if min(image["width"], image["height"]) < least]
    sizes = first(f"{image['file_name']} of {image['width']} x {image['height']}" for image in small)
    by_size = f"{len(small)} are smaller than filter_cfg.min_size={least} ({sizes})"
    if len({*empty, *(image["id"] for image in small)}) < len(images):
        if small:
            warnings.warn(f"{where}: of the {len(images)} images in {file}, {by_size} and left out", stacklevel=2)
        return
    reasons = [by_size] if small else []
    if empty:
        reasons.append(f"{len(empty)} have no object of the classes (filter_cfg.filter_empty_gt=True)")
    raise ConfigError(
        f"{where}: no image is left to train on: of {len(images)} in {file}, {', '.join(reasons) or 'none'}"
    )
