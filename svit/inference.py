"""Runs a model over many images, in batches and in order. `svit infer` writes what it gives.

    photos = find_photos(["photos/", "more/*.jpg", "shard-0000.tar"])
    for records in infer(model, photos, timm.data.resolve_data_config({}, model=model)):
        for record in records:
            print(record["image"], record["classes"][0]["class"])

An image is read when its batch comes, so the memory does not grow with the number of images, but for their names.
"""

import codecs
import glob
import io
import os
import posixpath
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from os.path import isfile
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from svit.checkpoints import class_names
from svit.folders import FolderError, find_images, is_clutter, natural_key
from svit.images import EXTENSIONS, UnreadableImageError, read_image
from svit.training.data import Transform, eval_transform, image_mode, leave_group

__all__ = ["Photo", "find_photos", "infer"]

# image: its name; and classes, features or error
Record = dict[str, Any]


# The place of a link in a tar file that leads to no file in it. No file starts at 0, where its header is.
BROKEN = (0, 0)


class Photo(NamedTuple):
    """An image file, or the part of a tar file that is one.

    Attributes:
        name: the path; of a part, the tar file's path and the part's, with a slash between.
        file: the file that it lies in.
        start: the part's first byte.
        size: the part's number of bytes, or None for a whole file.
    """

    name: str
    file: str
    start: int = 0
    size: int | None = None

    def read(self, mode: str) -> Image.Image:
        """The image, as `svit.images.read_image` reads it.

        Raises:
            UnreadableImageError: the file is no image or is damaged. The message names the photo.
        """
        if self.size is None:
            return read_image(self.file, mode)
        if (self.start, self.size) == BROKEN:
            raise UnreadableImageError(f"{self.name}: cannot be read (a link to no file in the tar file)")
        try:
            with open(self.file, "rb") as file:
                file.seek(self.start)
                return read_image(io.BytesIO(file.read(self.size)), mode)
        except (OSError, UnreadableImageError) as error:
            raise UnreadableImageError(f"{self.name}: cannot be read ({error})") from error


def find_photos(sources: Iterable[str], warn: Callable[[str], None] | None = None) -> list[Photo]:
    """The images that `sources` name, in that order; those of a folder or a pattern are in natural order.

    Args:
        sources: files; folders, with all below; uncompressed tar files, such as shards of webdataset; patterns of files
            with `*`, `?`, `[]` or `**`; `@FILE`, a file with one of these on each line; `-`, such lines on standard
            input.
        warn: as of `svit.folders.find_images`.

    Raises:
        FolderError: a source does not exist, cannot be read or holds no image.
    """
    return [photo for source in sources for line in listed(source) for photo in photos_of(line, warn)]


def listed(source: str) -> list[str]:
    """The lines of a list, or the source itself."""
    if source == "-":
        found = lines(getattr(sys.stdin, "buffer", sys.stdin) or ())  # None: closed from the start
    elif not source.startswith("@") or Path(source).exists():
        return [source]
    else:
        try:
            with open(source[1:], "rb") as file:
                found = lines(file)
        except OSError as error:
            raise FolderError(f"{source}: the list cannot be read ({error})") from error
    if not found:
        raise FolderError(f"{source}: expected a list with a file on each line, got an empty one")
    return found


def lines(file: Iterable[str | bytes]) -> list[str]:
    """Names of files, which may be any bytes, without the mark that some editors put before the first."""
    text = b"".join(os.fsencode(line) for line in file).removeprefix(codecs.BOM_UTF8)
    return [os.fsdecode(line.rstrip(b"\r")) for line in text.split(b"\n") if line.strip()]


def photos_of(source: str, warn: Callable[[str], None] | None) -> list[Photo]:
    """The images of a file, folder, tar file or pattern."""
    if not source:
        raise FolderError("expected a file, folder or pattern, got an empty name")
    path = Path(source)
    if path.suffix == ".tar" and path.is_file():
        return tar_photos(path)
    if glob.has_magic(source) and not path.exists():
        named = [file for file in glob.glob(source, recursive=True) if isfile(file)]
        if not named:
            raise FolderError(f"{source}: no file has such a name")
        return [photo for file in sorted(named, key=natural_key) for photo in photos_of(file, warn)]
    return [Photo(str(image), str(image)) for image in find_images([path], warn)]


def tar_photos(path: Path) -> list[Photo]:
    """The images in an uncompressed tar file, in its order."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = list(tar)
    except (tarfile.TarError, OSError) as error:
        raise FolderError(f"{path}: expected an uncompressed tar file ({error})") from error
    photos = []
    for member, place in zip(members, find_places(members), strict=True):
        name, holds_data = PurePath(member.name), member.isfile() or member.islnk() or member.issym()
        if holds_data and name.suffix.lower() in EXTENSIONS and not any(map(is_clutter, name.parts)):
            photos.append(Photo(f"{path}/{member.name}", str(path), *place))
    if not photos:
        raise FolderError(f"{path}: no images in this tar file")
    return photos


def find_places(members: list[tarfile.TarInfo]) -> list[tuple[int, int]]:
    """The first byte and the number of bytes of each part, or of what a link leads to; BROKEN where that is none."""
    places: dict[str, tuple[int, int]] = {}
    found = []
    for member in members:
        place = (member.offset_data, member.size) if member.isfile() else BROKEN
        if member.islnk():  # to a part before it
            place = places.get(posixpath.normpath(member.linkname), BROKEN)
        if not member.issym():
            places[posixpath.normpath(member.name)] = place
        found.append(place)
    links = {posixpath.normpath(member.name): member.linkname for member in members if member.issym()}
    return [
        places.get(followed(posixpath.normpath(member.name), links), BROKEN) if member.issym() else place
        for member, place in zip(members, found, strict=True)
    ]


def followed(name: str, links: dict[str, str]) -> str:
    """What a part's name leads to, where it or a folder of it is a symbolic link; "" if the links go round."""
    for _ in range(40):  # as many as Linux follows
        parts = name.split("/")
        heads = ("/".join(parts[:length]) for length in range(1, len(parts) + 1))
        head = next((head for head in heads if head in links), None)
        if head is None:
            return name
        name = posixpath.normpath(posixpath.join(posixpath.dirname(head), links[head], name[len(head) + 1 :]))
    return ""


class Photos(Dataset[tuple[int, torch.Tensor | str]]):
    """Photos by number: the number, and the preprocessed image (C, H, W) or why it cannot be read."""

    def __init__(self, photos: Sequence[Photo], transform: Transform, mode: str) -> None:
        self.photos, self.transform, self.mode = photos, transform, mode

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor | str]:
        try:
            return number, self.transform(self.photos[number].read(self.mode))
        except UnreadableImageError as error:
            return number, str(error)


class Read(NamedTuple):
    """The photos of one batch, by number: why each cannot be read, or None; and the images that could be (B, C, H, W).

    One tensor, since each one that comes from a process that reads is an open file.
    """

    errors: dict[int, str | None]
    images: torch.Tensor | None


def collate(items: list[tuple[int, torch.Tensor | str]]) -> Read:
    errors = {number: image if isinstance(image, str) else None for number, image in items}
    images = [image for _, image in items if isinstance(image, torch.Tensor)]
    return Read(errors, default_collate(images) if images else None)  # in shared memory, or an error at once


def infer(
    model: nn.Module,
    photos: Sequence[Photo],
    preprocessing: dict[str, Any],
    features: bool = False,
    top: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[Record]]:
    """The records of a batch at a time: {"image": name} with one more key.

    - "classes": the best first, {"class": name, "index": int, "probability": float} each.
    - "features", where these are asked for: (D,) float32 on the CPU, pooled, what the classifier gets.
    - "error": why the image cannot be read.

    Args:
        model: (B, C, H, W) to logits (B, num_classes), a model of timm, in eval mode.
        photos: the images.
        preprocessing: what `timm.data.resolve_data_config` gives.
        top: how many classes, at most.
        workers: processes that read images, 0 for this one.
        start: the number of the first photo.
        rank: of this process, one of `world` that share the photos: `rank` takes the batches rank, rank + world, ...
            All give the same number of lists, the last of which may be empty, so that the lists of all processes for a
            step, one after the other, are in the photos' order.
    """
    first = range(start, len(photos), batch_size)
    batches = [list(range(n, min(n + batch_size, len(photos)))) for n in first[rank::world]]
    loader = DataLoader(
        Photos(photos, eval_transform(preprocessing), image_mode(preprocessing)),
        batch_sampler=batches,
        num_workers=min(workers, len(batches) - 1) if batches else 0,
        collate_fn=collate,
        worker_init_fn=leave_group,
    )
    names = class_names(model)
    for read in loader:
        yield records(model, read, photos, names, features, top)
    if len(batches) < -(-len(first) // world):
        yield []


@torch.inference_mode()
def records(
    model: Any,
    read: Read,
    photos: Sequence[Photo],
    names: list[str],
    features: bool,
    top: int,
) -> list[Record]:
    """The records of the images of one batch, in their order."""
    found: Iterator[Record] = iter(())
    if read.images is not None:
        images = read.images.to(next(model.parameters()).device, memory_format=torch.channels_last)
        if features:
            pooled = model.forward_head(model.forward_features(images), pre_logits=True).flatten(1).float().cpu()
            found = ({"features": row} for row in pooled)
        else:
            best = model(images).float().softmax(1).topk(min(top, model.num_classes))
            found = (
                {"classes": [{"class": names[c], "index": c, "probability": p} for p, c in zip(*row, strict=True)]}
                for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            )
    return [
        {"image": photos[number].name, **(next(found) if error is None else {"error": error})}
        for number, error in read.errors.items()
    ]
