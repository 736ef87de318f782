"""scikit-learn's handwritten digits as a folder of images: real data that is there without a download."""

from pathlib import Path

import numpy as np
from PIL import Image

from svit.errors import InputError
from svit.files import atomic_write

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits() -> dict[str, Image.Image]:
    """1,797 images of 8 x 8 pixels, enlarged to 32 x 32, by their paths, such as train/seven/0007.png.

    Every fifth image is kept for val.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise InputError("dataset: digits needs scikit-learn: pip install 'svit[demo]'") from error
    data = load_digits()
    found = {}
    for number, (image, target) in enumerate(zip(data.images, data.target, strict=True)):
        split = "train" if number % 5 else "val"
        image = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
        found[f"{split}/{NAMES[target]}/{number:04}.png"] = image.resize((32, 32), Image.Resampling.BICUBIC)
    return found


def write_images(images: dict[str, Image.Image], folder: Path) -> None:
    """Writes images by their paths to a new folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as part:
        for name, image in images.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(part / name)
