"""Small data sets for the tests of detection and segmentation: a photograph of coins, its masks from a threshold."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage import data, filters, measure, morphology

TILE = 96
TRAIN, VAL = range(8), range(8, 12)


def coins() -> tuple[np.ndarray, np.ndarray]:
    """The photograph (H, W) and a number for each coin in it (H, W), 0 between them."""
    photo = data.coins()
    flat = photo - ndimage.gaussian_filter(photo.astype(float), 50)  # the light falls in from one side
    mask = morphology.closing(flat > filters.threshold_otsu(flat), morphology.disk(3))
    mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask), iterations=3)
    return photo, measure.label(mask)


def tiles() -> list[tuple[np.ndarray, np.ndarray]]:
    """The photograph and its coins in pieces of TILE x TILE pixels, 3 rows of 4."""
    photo, labels = coins()
    corners = [(y, x) for y in range(0, 3 * TILE, TILE) for x in range(0, 4 * TILE, TILE)]
    return [(photo[y : y + TILE, x : x + TILE], labels[y : y + TILE, x : x + TILE]) for y, x in corners]


def coco_folder(root: Path) -> Path:
    """Writes COCO's format with one category, 'coin': 8 images to train on and 4 others to evaluate on."""
    pieces = tiles()
    for split, numbers in (("train", TRAIN), ("val", VAL)):
        images, annotations = [], []
        (root / f"{split}2017").mkdir(parents=True)
        for i in numbers:
            photo, labels = pieces[i]
            Image.fromarray(photo).convert("RGB").save(root / f"{split}2017" / f"{i}.png")
            images.append(dict(id=i, file_name=f"{i}.png", width=TILE, height=TILE))
            for coin in np.unique(labels[labels > 0]):
                encoded = coco_mask.encode(np.asfortranarray(labels == coin, dtype=np.uint8))
                if coco_mask.area(encoded) < 100:  # a sliver at the edge of the tile
                    continue
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=i,
                        category_id=1,
                        iscrowd=0,
                        area=float(coco_mask.area(encoded)),
                        bbox=coco_mask.toBbox(encoded).tolist(),
                        segmentation=dict(encoded, counts=encoded["counts"].decode()),
                    )
                )
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="coin")])
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def ade_folder(root: Path) -> Path:
    """Writes ADE20K's format, in which 0 is no class: 1 between the coins, 2 on them."""
    pieces = tiles()
    for split, numbers in (("training", TRAIN), ("validation", VAL)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in numbers:
            photo, labels = pieces[i]
            Image.fromarray(photo).convert("RGB").save(root / "images" / split / f"{i}.jpg", quality=95)
            Image.fromarray((1 + (labels > 0)).astype(np.uint8)).save(root / "annotations" / split / f"{i}.png")
    return root
