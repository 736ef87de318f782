"""A small data set of real images for the tests of classification: handwritten digits, as folders and as shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = ("four", "one", "three", "two", "zero")  # as a folder sorts them
DIGITS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
TRAIN, VAL = 16, 8  # images a class


def digits(name: str, start: int, count: int) -> list[Image.Image]:
    """Some of scikit-learn's digits of one class, enlarged to 16 x 16."""
    data = load_digits()
    images = data.images[data.target == DIGITS[name]][start : start + count]
    return [Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16), Image.BICUBIC) for image in images]


def folder(root: Path) -> Path:
    """Writes root/train/CLASS/N.png and root/val/CLASS/N.png."""
    for split, start, count in (("train", 0, TRAIN), ("val", TRAIN, VAL)):
        for name in CLASSES:
            target = root / split / name
            target.mkdir(parents=True)
            for number, image in enumerate(digits(name, start, count)):
                image.save(target / f"{number:02}.png")
    return root


def shards(root: Path) -> Path:
    """Writes the training images as WebDataset shards with timm's _info.json, one shard a class."""
    root.mkdir(parents=True)
    splits = {}
    for split, start, count in (("train", 0, TRAIN), ("validation", TRAIN, VAL)):
        names = []
        for index, name in enumerate(CLASSES):
            names.append(f"{split}-{index}.tar")
            with tarfile.open(root / names[-1], "w") as tar:
                for number, image in enumerate(digits(name, start, count)):
                    png = io.BytesIO()
                    image.save(png, "png")
                    add(tar, f"{name}{number:02}.png", png.getvalue())
                    add(tar, f"{name}{number:02}.cls", str(index).encode())
        lengths = [count] * len(names)
        splits[split] = {
            "name": split,
            "filenames": names,
            "shard_lengths": lengths,
            "num_samples": sum(lengths),
        }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
