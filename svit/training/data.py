"""Images and classes from timm's readers, in an order and with an augmentation that a seed decides.

Where a training stands (epoch and batch) is all there is to remember: the order follows from seed and epoch, and each
image is augmented with random numbers of its own, drawn from seed, epoch and the image's place in the epoch. So a
training goes on exactly from anywhere, whatever the number of processes that read.
"""

import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, extract_tarinfos
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import ColorJitter

from svit.errors import InputError
from svit.folders import (
    FolderError,
    classes_of_files,
    find_classes,
    first,
    is_clutter,
    listing,
    natural_key,
    subfolders,
)
from svit.images import EXTENSIONS, UnreadableImageError, mode_of, read_image

from .digits import digits, write_images

Batch = tuple[torch.Tensor, torch.Tensor]
Transform = Callable[[Image.Image], torch.Tensor]
T = TypeVar("T")

# Names of a folder of class folders or a tar file, and how names of timm's other data start.
FOLDERS = ("folder", "torch/folder", "torch/image_folder")
DIGITS = "digits"  # scikit-learn's, written to a folder that is not there yet
PREFIXES = ("torch", "wds", "hfds", "hfids", "tfds")

# Folders that timm takes for the same split, and all names that look like a split's.
SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
SPLITS = [*(name for names in SYNONYMS for name in names), "test", "testing"]


def scheduled(schedule: Mapping[int, T], epoch: int, before: T) -> T:
    """The value of the last entry of a schedule that has begun at an epoch; `before` if none has."""
    begun = [first for first in schedule if first <= epoch]
    return schedule[max(begun)] if begun else before


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


@contextmanager
def lost_readers_as_error(workers: str) -> Iterator[None]:
    """That processes which read images cannot go on is an InputError that says to lower `workers`."""
    try:
        yield
    except RuntimeError as error:
        if is_reader_gone(error):
            raise InputError(
                f"{str(error).splitlines()[0].rstrip('. ')}. If memory ran short, lower {workers}"
            ) from error
        if "shared memory(shm)" in str(error) or "shared memory object" in str(error):
            raise InputError(
                f"out of shared memory, in which the processes that read hand on images: lower {workers}, or enlarge "
                "/dev/shm (of a container: --shm-size)"
            ) from error
        if "Too many open files" in str(error):
            raise InputError(f"too many open files: lower {workers}, or raise the limit (ulimit -n)") from error
        raise


def open_dataset(name: str, root: str, split: str, **options: Any) -> Dataset:
    """A dataset of class folders, of a tar file, or of timm's other readers, without a transform.

    Raises:
        InputError: no such dataset, no such split, or no images in it.
    """
    kind = name.partition("/")[0].lower()
    if name == DIGITS:
        if not os.path.exists(root):
            write_images(digits(), Path(root))
        name = FOLDERS[0]
    if name not in FOLDERS and (kind not in PREFIXES or kind == name):
        prefixes = ", ".join(f"{prefix}/" for prefix in PREFIXES)
        expected = f"folder, {DIGITS}, or a name that starts with one of {prefixes}"
        raise InputError(f"dataset: expected {expected}, got {name!r}")
    if kind != "hfds" and kind != "hfids" and not options.get("download") and not os.path.exists(root):
        raise InputError(f"data_dir: no such folder or file: {root}")
    if kind in ("wds", "hfids"):
        options["input_img_mode"] = ""  # as they are; `Stream` converts them
    if kind == "wds":
        # timm's keys first: a sample may have a mask of another format.
        options["input_key"] = ";".join(dict.fromkeys(["jpg", "png", "webp", *(end[1:] for end in sorted(EXTENSIONS))]))
    try:
        if name in FOLDERS:
            return open_folder(root, split, options.get("class_map"))
        dataset = create_dataset(name, root=root, split=split, **options)
        if len(dataset) == 0:
            raise RuntimeError("it holds no images")
    except InputError:
        raise
    except Exception as error:  # the readers, what they read with, and a download can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} {root}, split {split!r}: cannot be used: {reason}") from error
    if hasattr(dataset, "loader"):  # torchvision's, of files
        dataset.loader = os.fspath  # hands on the path, for `read_image`
    return dataset


def open_folder(root: str, split: str, class_map: str | dict[str, int] | None = None) -> ImageDataset:
    """A dataset of the class folders below `root`, or below the folder of the split in it, or of a tar file.

    Args:
        root: the folder or file.
        split: its folder goes by this name or another of `SYNONYMS`; without any `root` holds the class folders.
        class_map: timm's, numbers by class in place of those in natural order; other classes are left out.

    Raises:
        InputError: it has folders of other splits alone, or is neither a folder nor a tar file.
        FolderError: no class folders, or no images in them.
    """
    path = Path(root)
    if not path.is_dir():
        if path.suffix != ".tar":
            raise InputError(f"data_dir: expected a folder or a .tar file, got {root}")
        return ImageDataset(root, reader=TarReader(root, class_map))
    split = split.partition("[")[0]
    names = (split, *(name for names in SYNONYMS if split in names for name in names))
    found = next((path / name for name in names if (path / name).is_dir()), None)
    if found is None:
        others = [name for name in sorted(subfolders(path)) if name.lower() in SPLITS and subfolders(path / name)]
        if others:
            raise InputError(f"data_dir: {root} has no folder of the split {split!r}, only {', '.join(others)}")
    return ImageDataset(str(found or path), reader=FolderReader(str(found or path), class_map))


class FolderReader(ReaderImageFolder):
    """timm's reader, of the layout that docs/data.md defines: a class is a folder on the first level.

    Attributes:
        left_out: how many of what is no image of a class, for `listing`.
    """

    def __init__(self, root: str, class_map: str | dict[str, int] | None = None) -> None:
        self.root = root
        classes, images, self.left_out = find_classes(root)
        self.samples, self.class_to_idx = with_class_map(images, classes, class_map, root)


class TarReader(ReaderImageInTar):
    """timm's reader, with the classes that `FolderReader` has of the unpacked file; `left_out` counts images alone.

    A folder that holds all the others, as `tar -cf train.tar train` packs it, is no class.
    """

    def __init__(self, root: str, class_map: str | dict[str, int] | None = None) -> None:
        try:
            packed, _, _, tarfiles = extract_tarinfos(root, extensions=set(EXTENSIONS), sort=False)
        except ValueError as error:  # timm's, where there is none
            raise FolderError(f"{root}: no images in it ({error})") from error
        self.root, self.root_is_tar, self.cache_tarfiles, self.tar_state = root, True, True, tarfiles[0][1]
        self.left_out: Counter[str] = Counter()
        files, names = [], []
        for file, _, inner in sorted(packed, key=lambda item: natural_key(item[0].path)):
            # A tar file within the tar file is a folder.
            parts = Path(Path(inner.name).stem if inner else "", file.path.lstrip("/")).parts
            if any(map(is_clutter, parts)):
                self.left_out["hidden"] += 1
            else:
                files.append((file, None, inner))
                names.append("/".join(parts))
        names = without_common_folder(names)
        classes, images, beside = classes_of_files(files, names)
        if beside:
            self.left_out["images beside the class folders"] = beside
        if not classes:
            raise FolderError(f"{root}: no class folders in it, only {listing(self.left_out)}")
        samples, self.class_to_idx = with_class_map(images, classes, class_map, root)
        self.samples, self.targets = [sample for sample, _ in samples], [number for _, number in samples]


def without_common_folder(names: list[str]) -> list[str]:
    """Paths within a tar file without the folders that hold all class folders."""
    while len({name.partition("/")[0] for name in names if "/" in name}) == 1 and any(n.count("/") > 1 for n in names):
        names = [name.partition("/")[2] if "/" in name else name for name in names]
    return names


def with_class_map(
    images: list[tuple], classes: list[str], class_map: str | dict[str, int] | None, root: str
) -> tuple[list[tuple], dict[str, int]]:
    """Images with the numbers that a class map gives their classes, and the numbers by class."""
    if not class_map:
        return images, {name: number for number, name in enumerate(classes)}
    numbers = load_class_map(class_map, root)
    images = [(file, numbers[classes[number]]) for file, number in images if classes[number] in numbers]
    return images, numbers


def location(dataset: Dataset) -> Path | None:
    """The folder or tar file that a dataset's images are in; None of other kinds of data."""
    reader = getattr(dataset, "reader", None)
    return Path(reader.root).resolve() if isinstance(reader, FolderReader | TarReader) else None


def classes_of(dataset: Dataset) -> list[str] | None:
    """Names of the classes in the order of their numbers, if the dataset tells."""
    reader = getattr(dataset, "reader", dataset)
    if wnids := getattr(reader, "wnids", None):  # torchvision's ImageNet, whose classes share some of their names
        return list(wnids)
    numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # of a tar file
    if numbers:
        named: dict[int, str] = {}
        for name, number in numbers.items():
            named.setdefault(number, name)  # the first of those that a class map gives one number
        return [named[number] for number in sorted(named)]
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}  # Hugging Face
    names = getattr(features.get("label"), "names", None)
    return list(names) if names else None


def print_contents(split: str, dataset: Any, file: TextIO | None = None) -> None:
    """Prints the classes of a split and their images, as far as the data tells, and warns of what was left out.

    Args:
        split: its name.
        dataset: of `open_dataset`.
        file: default: stdout. Warnings go to stderr.
    """
    reader = getattr(dataset, "reader", dataset)
    numbers = getattr(reader, "targets", None)  # of a tar file, and of torchvision's
    if numbers is None:
        numbers = [number for _, number in getattr(reader, "samples", ())]
    counts = Counter(map(int, numbers))
    names = classes_of(dataset) or []
    line = f"{split}: {len(names)} classes, {len(dataset)} images" if names else f"{split}: {len(dataset)} images"
    if names:
        line += ": " + first([f"{name} {counts[i]}" if counts else name for i, name in enumerate(names)], 20)
    if counts and len(names) > 20:
        line += f"; {min(counts.values())} to {max(counts.values())} images a class"
    print(line, file=file, flush=True)
    if left_out := getattr(reader, "left_out", None):
        print(f"warning: {split}: left out {listing(left_out)}", file=sys.stderr)


def check_splits(train: Dataset, val: Dataset, num_classes: int | None = None) -> None:
    """Both splits must have the same classes; folders are numbered by their own names, so others would be mixed up.

    Args:
        train, val: of `open_dataset`.
        num_classes: what the recipe asks for. With a number one class alone is a warning, without one an error.

    Raises:
        InputError: they are the same images, a class is missing in one of them, or there is only one class.
    """
    a, b = location(train), location(val)
    if a and b and (a == b or a in b.parents or b in a.parents):
        raise InputError(f"val: its images, those in {b}, are images of the training, which has those in {a}")
    ours, theirs = classes_of(train), classes_of(val)
    if a and ours and len(ours) == 1:
        problem = f"train: one class alone, {ours[0]}, in {a}; expected the folder that holds the class folders"
        if num_classes is None:
            raise InputError(problem)
        print(f"warning: {problem}", file=sys.stderr)
    if ours is None or theirs is None or ours == theirs:
        return
    both = f"train has {first(ours, 20)}; val has {first(theirs, 20)}"
    for names, others, where in ((ours, theirs, "val"), (theirs, ours, "train")):
        missing = [name for name in names if name not in others]
        if missing:
            raise InputError(f"{where}: no images of {len(missing)} of {len(names)} classes: {first(missing)}; {both}")
    raise InputError(f"val: its classes are in another order than train's; {both}")


def check_classes(classes: torch.Tensor, num_classes: int) -> None:
    """Classes (B,) of images must be ones that the model has.

    Raises:
        InputError: one is not.
    """
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        raise InputError(f"class: expected 0 to {num_classes - 1}, got {wrong[0]}")


class Images(Dataset):
    """A dataset with an index, augmented; an item's key is (epoch, place in the epoch, index).

    An image that cannot be read is reported once, by name. In training the next image takes its place; else the item is
    None, which `collate` drops. More than `limit` of them are an InputError, and so are all of them. `mode` is that of
    `read_image`.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        transform_schedule: Mapping[int, Transform],
        seed: int,
        training: bool,
        limit: int,
        mode: str = "RGB",
    ) -> None:
        self.dataset, self.transform, self.transform_schedule = dataset, transform, transform_schedule
        self.seed, self.training, self.limit, self.mode = seed, training, limit, mode
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
        return scheduled(self.transform_schedule, epoch, self.transform)(image), target

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
        count = int(self.unreadable.sum())
        if count == len(self):  # in training, the next one would be sought for ever
            raise InputError(f"none of the {count} images can be read")
        if count > self.limit:
            names = ", ".join(self.name(i) for i in self.unreadable.nonzero().flatten().tolist()[:10])
            raise InputError(f"more than {self.limit} images cannot be read (max_unreadable): {names}")

    def name(self, index: int) -> str:
        return self.dataset.filename(index) if hasattr(self.dataset, "filename") else f"number {index}"


class ResumableBatchSampler:
    """Batches of keys for `Images`, of one process. It iterates over an epoch from batch `start` on.

    The processes take turns in the images of a global batch, so that the batch is the same for any number of processes.
    With repeated augmentation (Hoffer et al., 2020) the copies of an image are neighbours, and an epoch sees fewer
    different images.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int,
        world: int,
        seed: int | None,
        repeats: int = 1,
        drop_last: bool = True,
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
        self,
        dataset: IterableDataset,
        transform: Transform,
        seed: int,
        epoch: int,
        rank: int,
        repeats: int,
        mode: str = "RGB",
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
        batch_size: images in a batch of this process.
        training: in random order, incomplete batches dropped; else in the dataset's order, all images.
        reopen: makes a new dataset for each epoch. A stream needs this, since its shuffling keeps a state.
        rank: number of this process.
        world: how many processes there are.
        seed: of the order and the augmentation.
        repeats: copies of an image in an epoch, of as many fewer images.
        workers: processes that read; 0 for this one.
        limit: images that may be unreadable.
        mode: of the images, as `image_mode` finds it.
        transform_schedule: those in its place from an epoch on.

    Raises:
        InputError: more than `limit` images cannot be read.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        batch_size: int,
        training: bool,
        reopen: Callable[[], Any] | None = None,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        repeats: int = 1,
        workers: int = 0,
        limit: int = 10,
        mode: str = "RGB",
        transform_schedule: Mapping[int, Transform] | None = None,
    ) -> None:
        self.dataset, self.transform, self.batch_size, self.training = dataset, transform, batch_size, training
        self.transform_schedule = transform_schedule or {}
        self.reopen = reopen or (lambda: dataset)
        self.rank, self.seed, self.repeats, self.workers, self.mode = rank, seed, repeats, workers, mode
        self.streams = isinstance(self.dataset, IterableDataset)
        self.pin = torch.cuda.is_available()
        if not self.streams:
            self.batch_sampler = ResumableBatchSampler(
                len(self.dataset), batch_size, rank, world, seed if training else None, repeats, drop_last=training
            )
            images = Images(self.dataset, transform, self.transform_schedule, seed, training, limit, mode)
            self.loader = DataLoader(
                images,
                batch_sampler=self.batch_sampler,
                num_workers=workers,
                collate_fn=collate,
                pin_memory=self.pin,
                persistent_workers=workers > 0,
                worker_init_fn=leave_group,
            )

    def __len__(self) -> int:
        """Batches an epoch has."""
        if not self.streams:
            return len(self.batch_sampler)
        images = len(self.dataset)  # of this process, as timm counts
        return images // self.batch_size if self.training else -(-images // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on: images (B, C, H, W) and classes (B,)."""
        if not self.streams:
            self.batch_sampler.epoch, self.batch_sampler.start = epoch, start
            return self.readable()
        dataset = self.reopen()
        dataset.set_epoch(epoch)
        dataset.set_loader_cfg(num_workers=self.workers)
        loader = DataLoader(
            Stream(
                dataset,
                scheduled(self.transform_schedule, epoch, self.transform),
                self.seed,
                epoch,
                self.rank,
                self.repeats,
                self.mode,
            ),
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
        except InputError as error:  # of a process that reads; its traceback is no news
            raise InputError(str(error).strip().rpartition("InputError: ")[2]) from error


def eval_transform(preprocessing: dict[str, Any]) -> Transform:
    """timm's transform for evaluation from what `timm.data.resolve_data_config` gives."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: preprocessing[key] for key in keys}, is_training=False)


# How the names of those operations of timm begin that move pixels.
MOVES = ("Rotate", "Shear", "Translate")


def train_transform(preprocessing: dict[str, Any], **augmentation: Any) -> Transform:
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
        InputError: the model takes so many channels as no image has.
    """
    return mode_of(preprocessing["input_size"][0])


def report_unreadable(errors: Sequence[UnreadableImageError | str], images: int) -> None:
    """Names the images that cannot be read, and among several says how many they are."""
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors and images > 1:
        print(f"error: {len(errors)} of {images} images cannot be read", file=sys.stderr)
