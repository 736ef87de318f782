"""Scans folders: which files are images, and which class they belong to. docs/data.md defines the layout."""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from svit.errors import InputError
from svit.images import EXTENSIONS

__all__ = ["ClassFolders", "FolderError", "find_classes", "find_images", "is_clutter", "natural_key", "scan", "walk"]

# Files and folders of file systems, file managers and archives, in lower case.
CLUTTER = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "__macosx",
    "__pycache__",
    "desktop.ini",
    "ehthumbs.db",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


class FolderError(InputError):
    """A folder cannot be used. The message names it and says what is expected."""


class Scan(NamedTuple):
    """Paths of images in natural order, and counts of all other entries, for `listing`."""

    images: list[str]
    left_out: Counter[str]


class ClassFolders(NamedTuple):
    """Classes in the order of their numbers, images with their numbers, and counts of other entries, for `listing`."""

    classes: list[str]
    images: list[tuple[str, int]]
    left_out: Counter[str]


def is_clutter(name: str) -> bool:
    """Whether a file or folder of that name is hidden or belongs to the system."""
    return name.startswith(".") or name.lower() in CLUTTER


def natural_key(name: str) -> tuple[Any, ...]:
    """Sort key: numbers by value, upper and lower case together, as timm does. Different names have different keys."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def walk(folder: str | Path, left_out: Counter[str] | None = None) -> Iterator[os.DirEntry[str]]:
    """All files in a folder and below it, in no order, without hidden files and files of the system.

    It follows symbolic links to folders, except a link to a folder that contains the link: that is a loop.

    Args:
        folder: their paths start with it.
        left_out: counts hidden folders, hidden images and loops.

    Raises:
        FolderError: a folder cannot be read.
    """
    left_out = Counter() if left_out is None else left_out
    # A folder's path, its real path, and the folders of the links that led there.
    stack: list[tuple[str, str, tuple[str, ...]]] = [(os.fspath(folder), os.path.realpath(folder), ())]
    while stack:
        path, real, origins = stack.pop()
        try:
            with os.scandir(path) as found:
                entries = list(found)
        except OSError as error:
            raise FolderError(f"{path}: cannot be read ({error.strerror})") from error
        for entry in entries:
            # entry.is_dir() raises an error for links that lead to each other.
            linked = entry.is_symlink() and os.path.isdir(entry.path)
            if is_clutter(entry.name):
                if linked or entry.is_dir(follow_symlinks=False):
                    left_out[f"{entry.name}/"] += 1
                elif suffix(entry.name) in EXTENSIONS:
                    left_out[f"hidden {suffix(entry.name)}"] += 1
            elif linked:
                target = os.path.realpath(entry.path)
                if any(holds(target, origin) for origin in (*origins, real)):
                    left_out["link to a folder that holds it"] += 1
                else:
                    stack.append((entry.path, target, (*origins, real)))
            elif entry.is_dir(follow_symlinks=False):
                stack.append((entry.path, os.path.join(real, entry.name), origins))
            else:
                yield entry


def holds(folder: str, path: str) -> bool:
    """Whether `path` is `folder` or lies below it. Both are real paths."""
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def scan(folder: str | Path) -> Scan:
    """The images in a folder and below it, recognised by their extensions.

    A broken link with an image's extension counts as an image, so that reading it reports the problem.

    Raises:
        FolderError: a folder cannot be read.
    """
    images: list[str] = []
    left_out: Counter[str] = Counter()
    for entry in walk(folder, left_out):
        end = suffix(entry.name)
        broken = entry.is_symlink() and not os.path.exists(entry.path)
        if end in EXTENSIONS and (broken or entry.is_file()):
            images.append(entry.path)
        elif broken:
            left_out[f"broken link {entry.name}"] += 1
        elif end in EXTENSIONS:
            left_out[f"{end} that is no file"] += 1  # reading from a pipe may never end
        else:
            left_out[end or "without a suffix"] += 1
    return Scan(sorted(images, key=natural_key), left_out)


def find_images(paths: Iterable[Path], warn: Callable[[str], None] | None = None) -> list[Path]:
    """The given files, with any extension, and the images in the given folders in natural order.

    Args:
        paths: files and folders.
        warn: takes a line that says what was left out of a folder. Default: print it on stderr as a warning.

    Raises:
        FolderError: a path does not exist, or a folder cannot be read or holds no image.
    """
    warn = warn or (lambda line: print(f"warning: {line}", file=sys.stderr))
    found: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            images, left_out = scan(path)
            rest = f"left out {listing(left_out)}" if left_out else ""
            if not images:
                raise FolderError(f"{path}: no images in this folder" + (f"; {rest}" if rest else ""))
            if rest:
                warn(f"{path}: {rest}")
            found += map(Path, images)
        elif os.path.exists(path):
            found.append(path)
        else:
            raise FolderError(f"{path}: no such file or folder")
    return found


def find_classes(folder: str | Path) -> ClassFolders:
    """The images of a folder of class folders. A class is a folder on the first level, with all images below it.

    Class folders without an image are no classes. They are left out, and so are images beside the class folders.

    Raises:
        FolderError: it cannot be read, or has no class folders or no images in them.
    """
    images, left_out = scan(folder)
    folders = subfolders(folder)
    if not folders:
        raise FolderError(
            f"{folder}: no class folders, {len(images)} images in it; expected a folder for each class, with its images"
        )
    classes, numbered, beside = classes_of_files(images, [path[len(os.path.join(folder, "")) :] for path in images])
    if beside:
        left_out["images beside the class folders"] = beside
    empty = sorted(set(folders) - set(classes), key=natural_key)
    if not classes:
        rest = f", only {listing(left_out)}" if left_out else ""
        raise FolderError(f"{folder}: 0 images in its class folders {first(empty)}{rest}")
    if empty:
        left_out[f"class folders without an image ({first(empty)})"] = len(empty)
    return ClassFolders(classes, numbered, left_out)


def classes_of_files(files: list[Any], names: list[str]) -> tuple[list[str], list[tuple[Any, int]], int]:
    """Classes from the first part of names such as "cat/2020/x.jpg".

    Args:
        files: any objects, one for each name.
        names: relative paths.

    Returns:
        The classes in natural order, each of the `files` with its class's number, and how many had no class.
    """
    labels = [name.partition(os.sep)[0] if os.sep in name else None for name in names]
    classes = sorted({label for label in labels if label is not None}, key=natural_key)
    numbers = {name: number for number, name in enumerate(classes)}
    numbered = [(file, numbers[label]) for file, label in zip(files, labels, strict=True) if label is not None]
    return classes, numbered, len(files) - len(numbered)


def subfolders(folder: str | Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones and those of the system."""
    return [name for name in os.listdir(folder) if not is_clutter(name) and os.path.isdir(os.path.join(folder, name))]


def listing(left_out: Counter[str], limit: int = 10) -> str:
    """The counts as text, the largest first, such as "12 .txt, 3 hidden .jpg, 1 @eaDir/"."""
    return first([f"{count} {what}" for what, count in left_out.most_common()], limit)


def first(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
