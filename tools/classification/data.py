"""Images and classes from timm's readers, in an order and with an augmentation that a seed decides.

Where a training stands (epoch and batch) is all there is to remember: the order follows from seed and epoch, and each
image is augmented with random numbers of its own, drawn from seed, epoch and the image's place in the epoch. So a
training goes on exactly from anywhere, whatever the number of processes that read.
"""

import os
import random
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import ColorJitter

from svit.images import EXTENSIONS, UnreadableImageError, mode_of, read_image

Batch = tuple[torch.Tensor, torch.Tensor]

set_img_extensions(sorted(EXTENSIONS))  # of what timm's readers of folders and tar files take for an image

SPLITS = ("train", "training", "val", "valid", "validation", "eval", "evaluation", "test", "testing")


class DataError(ValueError):
    """The data cannot be used; the message names the folder, the class or the file."""


def seed_all(*numbers: int) -> None:
    """Seeds Python, NumPy and PyTorch from some numbers, none of them negative."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`, which, without a GPU or in a process that reads, keeps a record of each call.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def leave_group(worker: int) -> None:
    """A signal to the whole group of processes must reach the one that trains alone, which ends these itself."""
    os.setpgrp()


def is_reader_gone(error: RuntimeError) -> bool:
    """Whether a process that reads was ended by another one, as by the system when memory runs short.

    PyTorch raises this wherever the main process is just then.
    """
    return str(error).startswith("DataLoader worker (pid")


def open_dataset(name: str, root: str, split: str, **options: Any) -> Dataset:
    """A dataset of timm's readers, without a transform.

    Raises:
        DataError: no such dataset, no such split, or no images in it.
    """
    kind = name.partition("/")[0].lower()
    if kind != "hfds" and kind != "hfids" and not options.get("download") and not Path(root).exists():
        raise DataError(f"data_dir: no such folder or file: {root}")
    if kind in ("wds", "hfids"):
        options["input_img_mode"] = ""  # as they are; `Stream` converts them
    if kind == "wds":
        # timm's keys first: a sample may have a mask of another format.
        options["input_key"] = ";".join(dict.fromkeys(["jpg", "png", "webp", *(end[1:] for end in sorted(EXTENSIONS))]))
    try:
        dataset = create_dataset("" if name == "folder" else name, root=root, split=split, **options)
        if len(dataset) == 0:
            raise RuntimeError("it holds no images")
    except (RuntimeError, AssertionError, ImportError, OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{name} {root}, split {split!r}: cannot be used: {error}") from error
    if hasattr(dataset, "loader"):  # torchvision's, of files
        dataset.loader = os.fspath  # hands on the path, for `read_image`
    if Path(root).is_dir() and location(dataset) == Path(root).resolve():
        # timm takes the whole folder where it does not find the split: right for a folder of classes alone.
        others = [path.name for path in sorted(Path(root).iterdir()) if path.name in SPLITS and has_folders(path)]
        if others:
            raise DataError(f"data_dir: {root} has no folder of the split {split!r}, only {', '.join(others)}")
    return dataset


def location(dataset: Dataset) -> Path | None:
    """The folder or tar file that a dataset's images are in; None of other kinds of data."""
    reader = getattr(dataset, "reader", None)
    return Path(reader.root).resolve() if isinstance(reader, ReaderImageFolder | ReaderImageInTar) else None


def has_folders(path: Path) -> bool:
    return path.is_dir() and any(inside.is_dir() for inside in path.iterdir())


def classes_of(dataset: Dataset) -> list[str] | None:
    """Names of the classes in the order of their numbers, if the dataset tells."""
    reader = getattr(dataset, "reader", dataset)
    numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # of a tar file
    if numbers:
        names = {}
        for name, number in numbers.items():
            names.setdefault(number, name)  # the first: torchvision's ImageNet has several names for a class
        return [names[number] for number in sorted(names)]
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}  # Hugging Face
    names = getattr(features.get("label"), "names", None)
    return list(names) if names else None


def check_splits(train: Dataset, val: Dataset) -> None:
    """Both splits must have the same classes; folders are numbered by their own names, so others would be mixed up.

    Raises:
        DataError: they are the same images, or a class is missing in one of them.
    """
    a, b = location(train), location(val)
    if a and b and (a == b or a in b.parents or b in a.parents):
        raise DataError(f"val: its images, those in {b}, are images of the training, which has those in {a}")
    ours, theirs = classes_of(train), classes_of(val)
    if ours is None or theirs is None or ours == theirs:
        return
    for names, others, where in ((ours, theirs, "val"), (theirs, ours, "train")):
        missing = [name for name in names if name not in others]
        if missing:
            raise DataError(f"{where}: no images of {len(missing)} of {len(names)} classes: {', '.join(missing[:10])}")
    raise DataError(f"val: its classes are in another order than train's: {theirs[:10]}, expected {ours[:10]}")


class Images(Dataset):
    """A dataset with an index, augmented; an item's key is (epoch, place in the epoch, index).

    An image that cannot be read is reported once, by name. In training the next image takes its place; else the item is
    None, which `collate` drops. More than `limit` of them are a DataError. `mode` is that of `read_image`.
    """

    def __init__(self, dataset: Dataset, transform, seed: int, training: bool, limit: int, mode: str = "RGB") -> None:
        self.dataset, self.transform, self.seed, self.training, self.limit = dataset, transform, seed, training, limit
        self.mode = mode
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # by all processes that read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, int] | None:
        epoch, place, index = key
        while True:
            try:
                image, target = self.read(index)
                break
            except (OSError, ValueError) as error:  # UnreadableImageError is one
                self.report(index, error)
                if not self.training:
                    return None
                index = (index + 1) % len(self)
        seed_all(self.seed, epoch, place)
        return self.transform(image), target

    def read(self, index: int) -> tuple[Image.Image, int]:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:  # torchvision's
            file, target = self.dataset[index]
        else:  # not timm's own way, which passes over what cannot be read without counting
            file, target, *_ = reader[index]
        return read_image(file, self.mode), target

    def report(self, index: int, error: Exception) -> None:
        if not self.unreadable[index]:
            self.unreadable[index] = True
            print(f"unreadable, skipped: {self.name(index)} ({error})", file=sys.stderr, flush=True)
        if int(self.unreadable.sum()) > self.limit:
            names = ", ".join(self.name(i) for i in self.unreadable.nonzero().flatten().tolist()[:10])
            raise DataError(f"more than {self.limit} images cannot be read (max_unreadable): {names}")

    def name(self, index: int) -> str:
        return self.dataset.filename(index) if hasattr(self.dataset, "filename") else f"number {index}"


class Order:
    """Batches of keys for `Images`, of one process: an iterable over an epoch, from `start` on.

    The processes take turns in the images of a batch, so that as many images in as many processes are the same images.
    With repeated augmentation (Hoffer et al., 2020) the copies of an image stand next to each other, and an epoch sees
    as many images less.
    """

    def __init__(
        self, size: int, batch_size: int, rank: int, world: int, seed: int | None, repeats: int = 1, drop_last=True
    ) -> None:
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world
        self.seed, self.repeats, self.drop_last = seed, repeats, drop_last
        self.epoch = self.start = 0

    def __len__(self) -> int:
        total = self.batch_size * self.world
        return self.size // total if self.drop_last else -(-self.size // total)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        if self.seed is None:
            indices = range(self.size)
        else:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
            indices = np.repeat(order, self.repeats)[: self.size].tolist()
        total = self.batch_size * self.world
        for batch in range(self.start, len(self)):
            places = range(batch * total + self.rank, min((batch + 1) * total, self.size), self.world)
            yield [(self.epoch, place, indices[place]) for place in places]


class Stream(IterableDataset):
    """A dataset without an index (shards), augmented with random numbers of seed, epoch, process and place.

    An image that cannot be read is reported and left out. `mode` is that of `read_image`.
    """

    def __init__(
        self, dataset: IterableDataset, transform, seed: int, epoch: int, rank: int, repeats: int, mode: str = "RGB"
    ) -> None:
        self.dataset, self.transform, self.seed, self.epoch, self.rank = dataset, transform, seed, epoch, rank
        self.repeats, self.mode = repeats, mode

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        worker = get_worker_info()
        copies = (item for item in self.readable() for _ in range(self.repeats))
        for place, (image, target) in enumerate(copies):
            seed_all(self.seed, self.epoch, self.rank, worker.id if worker else 0, place)
            yield self.transform(image), target

    def readable(self) -> Iterator[tuple[Image.Image, int]]:
        for image, target in self.dataset:
            try:
                yield read_image(image, self.mode), target
            except UnreadableImageError as error:
                print(f"unreadable, skipped: an image of class {target} ({error})", file=sys.stderr, flush=True)


def collate(items: list) -> Batch | None:
    """One batch of what could be read; None if nothing could."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None


class Loader:
    """Batches of a split for one of `world` processes.

    Args:
        dataset: of `open_dataset`.
        transform: timm's.
        training: in random order, incomplete batches dropped; else in the dataset's order, all images.
        reopen: makes the dataset anew for each epoch, which a stream needs, since its shuffling has a memory.
        mode: of the images, as `image_mode` finds it.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform,
        batch_size: int,
        training: bool,
        reopen: Callable[[], Dataset] | None = None,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        repeats: int = 1,
        workers: int = 0,
        limit: int = 10,
        mode: str = "RGB",
    ) -> None:
        self.dataset, self.transform, self.batch_size, self.training = dataset, transform, batch_size, training
        self.reopen = reopen or (lambda: dataset)
        self.rank, self.seed, self.repeats, self.workers, self.mode = rank, seed, repeats, workers, mode
        self.streams = isinstance(self.dataset, IterableDataset)
        self.pin = torch.cuda.is_available()
        if not self.streams:
            self.order = Order(
                len(self.dataset), batch_size, rank, world, seed if training else None, repeats, drop_last=training
            )
            images = Images(self.dataset, transform, seed, training, limit, mode)
            self.loader = DataLoader(
                images,
                batch_sampler=self.order,
                num_workers=workers,
                collate_fn=collate,
                pin_memory=self.pin,
                persistent_workers=workers > 0,
                worker_init_fn=leave_group,
            )

    def __len__(self) -> int:
        """Batches an epoch has."""
        if not self.streams:
            return len(self.order)
        images = len(self.dataset)  # of this process, as timm counts
        return images // self.batch_size if self.training else -(-images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on: images (B, C, H, W) and classes (B,)."""
        if not self.streams:
            self.order.epoch, self.order.start = epoch, start
            return self.readable()
        dataset = self.reopen()
        dataset.set_epoch(epoch)
        dataset.set_loader_cfg(num_workers=self.workers)
        loader = DataLoader(
            Stream(dataset, self.transform, self.seed, epoch, self.rank, self.repeats, self.mode),
            batch_size=self.batch_size,
            num_workers=self.workers,
            drop_last=self.training,
            pin_memory=self.pin,
            worker_init_fn=leave_group,
            generator=torch.Generator().manual_seed(self.seed + epoch),
        )
        return islice(loader, start, len(self) if self.training else None)

    def readable(self) -> Iterator[Batch]:
        try:
            yield from (batch for batch in self.loader if batch is not None)
        except DataError as error:  # of a process that reads; its traceback is no news
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error


def eval_transform(preprocessing: dict[str, Any]):
    """timm's transform for evaluation from what `timm.data.resolve_data_config` gives."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: preprocessing[key] for key in keys}, is_training=False)


# How the names of those operations of timm begin that move pixels.
MOVES = ("Rotate", "Shear", "Translate")


def train_transform(preprocessing: dict[str, Any], **augmentation: Any):
    """timm's transform for training from what `timm.data.resolve_data_config` gives, for images of 1 to 4 channels.

    Args:
        preprocessing: as that of `eval_transform`.
        augmentation: further arguments of `timm.data.create_transform`. What changes colours, and is made for images
            without an alpha channel, leaves that as it is; what moves pixels moves it, too.
    """
    keys = ("input_size", "interpolation", "mean", "std")
    transform = create_transform(**{key: preprocessing[key] for key in keys}, is_training=True, **augmentation)
    if preprocessing["input_size"][0] in (2, 4):
        for index, step in enumerate(transform.transforms):
            if isinstance(step, ColorJitter):
                transform.transforms[index] = partial(on_colours, step)
            policy = getattr(step, "policy", [getattr(step, "ops", [])])  # of AutoAugment; of RandAugment and AugMix
            for op in (op for ops in policy for op in ops if not op.name.startswith(MOVES)):
                op.aug_fn = partial(on_colours, op.aug_fn)
    return transform


def on_colours(operation: Callable, image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    """Applies an operation to the colours of an image with an alpha channel, and puts that back on the result."""
    changed = operation(image.convert(image.mode[:-1]), *args, **kwargs)
    changed.putalpha(image.getchannel("A"))
    return changed


def image_mode(preprocessing: dict[str, Any]) -> str:
    """The mode of images for a model, as `read_image` takes it.

    Raises:
        DataError: the model takes so many channels as no image has.
    """
    try:
        return mode_of(preprocessing["input_size"][0])
    except ValueError as error:
        raise DataError(str(error)) from error


def report_unreadable(errors: list[UnreadableImageError], images: int) -> None:
    """Names the images that cannot be read, and among several says how many they are."""
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors and images > 1:
        print(f"error: {len(errors)} of {images} images cannot be read", file=sys.stderr)
