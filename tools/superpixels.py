"""Measures super tokens as superpixels, against human segmentations, beside SLIC and the grid of cells.

    python tools/superpixels.py bsds500 --model svit_nano.photos20 --report superpixels.md --plot superpixels.svg

The folder has `images/NAME.jpg` and `segmentations/NAME.npz`, whose arrays (H, W) are human segmentations of the image.
A method divides each image into about as many regions as the model has cells of each size of `--cells`. Printed are
means over the images, of the means over an image's segmentations:

- ASA, achievable segmentation accuracy: the share of pixels that is right if each region takes the segment that it
  overlaps most (Liu et al., CVPR 2011).
- recall, of boundaries: the share of the segments' boundary pixels with a boundary of the regions at most 2 pixels
  away, to the sides as well as up and down (Achanta et al., PAMI 2012).
- UE, undersegmentation error: the pixels by which regions cross segments, the smaller part of each crossing, over all
  pixels (Neubert and Protzel, 2012).
- CO, compactness: 4 pi area / perimeter^2 of the regions, weighted by area (Schick et al., ICPR 2012).

A higher ASA, recall and compactness is better, and a lower UE. More regions improve all but compactness. Regions are
counted as they are, also those that fall apart into several pieces.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import maximum_filter
from skimage.measure import regionprops
from skimage.segmentation import slic
from tabulate import tabulate
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import normalize, to_tensor

from svit import processes
from svit.checkpoints import create_model
from svit.cli.base import at_least, make_parser
from svit.errors import InputError
from svit.files import atomic_write
from svit.images import read_image
from svit.visualize import Association, last_of_stages, watch

MEASURES = ("ASA", "recall", "UE", "CO")
TOLERANCE = 2  # pixels

Partition = Callable[[np.ndarray, torch.Tensor], np.ndarray]


def overlaps(regions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """(regions, segments) int64: how many pixels each region has in each segment. Both (H, W), labels from 0."""
    columns = segments.max() + 1
    flat = np.bincount((regions * columns + segments).ravel(), minlength=(regions.max() + 1) * columns)
    return flat.reshape(-1, columns)


def achievable_accuracy(regions: np.ndarray, segments: np.ndarray) -> float:
    """The share of pixels that is right if each region takes the segment it overlaps most."""
    return overlaps(regions, segments).max(1).sum() / regions.size


def undersegmentation(regions: np.ndarray, segments: np.ndarray) -> float:
    """For each region and segment that overlap, the smaller of the region's two parts; summed, over all pixels."""
    inside = overlaps(regions, segments)
    return np.minimum(inside, inside.sum(1, keepdims=True) - inside).sum() / regions.size


def boundaries(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels that differ from the one to the right or from the one below."""
    found = np.zeros(labels.shape, bool)
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    found[:-1] |= labels[:-1] != labels[1:]
    return found


def boundary_recall(regions: np.ndarray, segments: np.ndarray, tolerance: int = TOLERANCE) -> float:
    """The share of the segments' boundary pixels with one of the regions at most `tolerance` pixels away.

    It is 1 where the segmentation has no boundary.
    """
    wanted = boundaries(segments)
    if not wanted.any():
        return 1.0
    found = maximum_filter(boundaries(regions), 2 * tolerance + 1)
    return found[wanted].mean()


def compactness(regions: np.ndarray) -> float:
    """4 pi area / perimeter^2 of the regions, at most 1 each, weighted by area."""
    return sum(
        region.area * min(4 * math.pi * region.area / region.perimeter**2, 1) if region.perimeter else 0
        for region in regionprops(regions + 1)
    ) / float(regions.size)


def measure(regions: np.ndarray, segmentations: list[np.ndarray]) -> dict[str, float]:
    """The number of regions and `MEASURES`, means over the segmentations."""
    regions = np.unique(regions, return_inverse=True)[1].reshape(regions.shape)
    rows = [
        (achievable_accuracy(regions, s), boundary_recall(regions, s), undersegmentation(regions, s))
        for s in segmentations
    ]
    asa, recall, ue = np.mean(rows, 0)
    return {"regions": int(regions.max()) + 1, "ASA": asa, "recall": recall, "UE": ue, "CO": compactness(regions)}


def read_folder(folder: Path) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Images (H, W, 3) uint8 and their segmentations, (H, W) labels from 0.

    Raises:
        InputError: there are no images, or a segmentation is missing or of another size.
    """
    images = sorted((folder / "images").glob("*.jpg"))
    if not images:
        raise InputError(f"{folder}: expected images/*.jpg, got none")
    for path in images:
        photo = np.asarray(read_image(path))
        file = folder / "segmentations" / f"{path.stem}.npz"
        if not file.is_file():
            raise InputError(f"{path}: expected its segmentations in {file}")
        with np.load(file) as arrays:
            segmentations = [
                np.unique(arrays[key], return_inverse=True)[1].reshape(arrays[key].shape) for key in arrays
            ]
        for segmentation in segmentations:
            if segmentation.shape != photo.shape[:2]:
                raise InputError(f"{file}: expected {photo.shape[:2]}, the image's size, got {segmentation.shape}")
        yield photo, segmentations


def associate(model: torch.nn.Module, photo: np.ndarray) -> Association:
    """The association of the last layer of the model's first stage."""
    config = resolve_model_data_config(model)
    x = normalize(to_tensor(photo.copy()), config["mean"], config["std"])  # a copy may be written to
    with watch(model) as layers:
        model.forward_intermediates(x[None], indices=[0], intermediates_only=True, stop_early=True)
    return last_of_stages(layers)["stage 1"].association()


def methods(model: torch.nn.Module, untrained: torch.nn.Module, photo: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The names of the methods and their partitions of a photo (H, W, 3)."""
    size = photo.shape[:2]
    found = associate(model, photo)
    yield "super tokens", found.partition(size).numpy()
    yield "super tokens, random weights", associate(untrained, photo).partition(size).numpy()
    count = found.q.shape[0] * found.q.shape[1]
    yield "SLIC", slic(photo, n_segments=count, compactness=10, start_label=0)
    (hh, ww), (H, W) = found.q.shape[:2], size
    yield "grid", np.arange(H)[:, None] * hh // H * ww + np.arange(W) * ww // W


def parser() -> argparse.ArgumentParser:
    parser = make_parser("superpixels", __doc__)
    parser.add_argument("folder", type=Path, help="images and segmentations")
    parser.add_argument("--model", default="svit_nano.photos20", help="an SViT with weights (%(default)s)")
    parser.add_argument("--checkpoint", help="its weights (those that come with the package)")
    parser.add_argument("--cells", nargs="+", type=at_least(2), default=[10, 8, 6, 5, 4, 3], help="%(default)s")
    parser.add_argument("--limit", metavar="N", type=at_least(1), help="the first N images alone")
    parser.add_argument("--report", metavar="FILE", type=Path, help="write the table here too")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw ASA, recall and UE by the number of regions")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser()
    args = options.parse_args(argv)
    for file in filter(None, (args.report, args.plot)):  # before the work, not after
        if not file.parent.is_dir():
            options.error(f"there is no folder {file.parent}")
    try:
        compare(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(args: argparse.Namespace) -> None:
    """Measures, prints, and writes what `args` names."""
    data = list(read_folder(args.folder))[: args.limit]
    rows = []
    for cell in args.cells:
        torch.manual_seed(0)  # here, so that the random weights are the same for all cells
        cells = {"stoken_size": [cell, 1, 1, 1]}
        if args.checkpoint:
            model = create_model(args.model, args.checkpoint, **cells)
        else:
            model = create_model(args.model, pretrained=True, **cells)
        untrained = create_model(args.model.partition(".")[0], **cells)
        found: dict[str, list[dict[str, float]]] = {}
        for number, (photo, segmentations) in enumerate(data, 1):
            print(f"cells of {cell}: image {number} of {len(data)}", end="\r", file=sys.stderr, flush=True)
            for name, regions in methods(model, untrained, photo):
                found.setdefault(name, []).append(measure(regions, segmentations))
        for name, measures in found.items():
            means = {key: np.mean([one[key] for one in measures]) for key in ("regions", *MEASURES)}
            rows.append({"method": name, "cell": cell, **means})
    rows.sort(key=lambda row: list(found).index(row["method"]))
    text = tabulate(rows, headers="keys", tablefmt="github", floatfmt=("", "", ".0f", ".4f", ".4f", ".4f", ".3f"))
    print(text)
    if args.report:
        with atomic_write(args.report) as part:
            part.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for ax, key in zip(figure.subplots(1, 3), MEASURES[:3], strict=True):
        for name in dict.fromkeys(row["method"] for row in rows):
            points = sorted((row["regions"], row[key]) for row in rows if row["method"] == name)
            ax.plot(*zip(*points, strict=True), marker=".", label=name)
        ax.set(xlabel="regions", title={"ASA": "achievable accuracy", "recall": "boundary recall"}.get(key, key))
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    processes.run(main)
