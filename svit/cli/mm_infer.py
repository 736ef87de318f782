"""Draws what a detector of MMDetection or a segmentor of MMSegmentation finds in images.

    svit mm-infer mask-rcnn_svit-s_fpn_1x_coco epoch_12.pth street.jpg --out found.png
    svit mm-infer svit-s_upernet_8xb2-160k_ade20k-512x512 iter_160000.pth a.jpg photos/ --out pictures/

Boxes, masks and scores, or the classes laid over the image. CONFIG and CHECKPOINT are files, or names of those that
come with the package.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from PIL import Image

from svit.adapters.checkpoints import refuse_foreign_objects
from svit.adapters.checks import check_backbone, check_checkpoint, classes_of, datasets, type_of
from svit.adapters.configs import load_config
from svit.adapters.images import first, problem_with
from svit.errors import InputError
from svit.files import atomic_write
from svit.folders import find_images
from svit.images import UnreadableImageError, read_image
from svit.names import distinct

from .base import add_device, choose_device, make_parser, named
from .mm_train import Options, add_checkpoint, drop_start_weights, refusals_as_errors

# From an RGB image (H, W, 3) to the picture (H, W, 3) and what was found in words.
Look = Callable[[np.ndarray], tuple[np.ndarray, str]]


def parser() -> argparse.ArgumentParser:
    parser = make_parser("mm-infer", __doc__)
    parser.add_argument("config", metavar="CONFIG")
    add_checkpoint(parser)
    parser.add_argument("images", metavar="IMAGE", type=named, nargs="+", help="a file, or a folder with all below it")
    parser.add_argument(
        "--out", metavar="PATH", type=Path, required=True, help="a picture, or a folder, where several are drawn"
    )
    parser.add_argument(
        "--score", metavar="S", type=score, default=0.3, help="least score of what a detector draws; default: 0.3"
    )
    add_device(parser)
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", action=Options)
    return parser


def score(text: str) -> float:
    """A type of arguments: a number; above 1 nothing is drawn. To NaN no score compares."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text}")
    return value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    refuse_foreign_objects()
    with refusals_as_errors(ValueError, UnpicklingError):
        targets = plan(args.images, args.out)
        device = str(choose_device(args.device))
        config = load_config(args.config, args.cfg_options)
        drop_start_weights(config)
        check_backbone(config)
        check_checkpoint(config, args.checkpoint)
        draw = segmentor if config.get("default_scope") == "mmseg" else detector
        look = draw(config, args.checkpoint, device, args.score)
    unreadable = 0
    for image, target in targets.items():
        try:
            pixels = np.asarray(read_image(image))
        except UnreadableImageError as error:
            print(f"warning: {error}", file=sys.stderr)
            unreadable += 1
            continue
        try:
            picture, found = look(pixels)
        except (cv2.error, IndexError, RuntimeError) as error:  # of an image a pixel wide, or too large for the memory
            size = f"{pixels.shape[1]} x {pixels.shape[0]}"
            print(f"warning: {image}: the config's model does not take {size} pixels ({error})", file=sys.stderr)
            unreadable += 1
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as part:
                Image.fromarray(picture).save(part)
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
        print(f"{image} -> {target}: {found}")
    if unreadable:
        raise InputError(f"{unreadable} of {len(targets)} images could not be read; the others are drawn")
    return 0


def plan(paths: list[Path], out: Path) -> dict[Path, Path]:
    """Which picture goes where, for the images named and those in the folders named.

    Raises:
        InputError: none is an image, or two would go to the same place, to an image's, or nowhere.
        FolderError: see `find_images`.
    """
    images = find_images(paths)
    if all(problem_with(image) for image in images):  # the others, one by one, are no reason not to start
        raise InputError(f"no image to draw in: {first(f'{image}: {problem_with(image)}' for image in images)}")
    one = len(images) == 1 == len(paths) and not paths[0].is_dir()
    if one and out.suffix and not out.is_dir():
        if not out.parent.is_dir():
            raise InputError(f"--out: there is no folder {out.parent}")
        if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
            raise InputError(f"--out: expected the name of a picture, such as found.png, or a folder, got {out}")
        targets = {images[0]: out}
    else:
        if out.exists() and not out.is_dir():
            raise InputError(f"--out: expected a folder for {len(images)} images, got {out}")
        targets = {image: out / picture_name(image, paths) for image in images}
    if len(set(targets.values())) < len(images):
        raise InputError(f"--out: two of the images would be drawn to the same file in {out}")
    replaced = {image.resolve() for image in images} & {target.resolve() for target in targets.values()}
    if replaced:
        raise InputError(f"--out: expected another place than the images', got {out}, where {replaced.pop()} is one")
    return targets


def picture_name(image: Path, paths: list[Path]) -> Path:
    """Where a picture goes below the folder of all: as the image lies in the folder named, or its name alone."""
    folder = next((path for path in paths if image != path and image.is_relative_to(path)), image.parent)
    return image.relative_to(folder).with_suffix(".png")


def detector(config: Config, checkpoint: str, device: str, score: float) -> Look:
    """The detector."""
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(model=config, weights=checkpoint, device=device, show_progress=False)
    meta = dataset_meta(config, checkpoint) or inferencer.model.dataset_meta
    inferencer.model.dataset_meta = inferencer.visualizer.dataset_meta = meta
    classes = distinct(meta["classes"])

    def look(image: np.ndarray) -> tuple[np.ndarray, str]:
        found = inferencer(bgr(image), return_datasamples=True)["predictions"][0]
        # Here and not by the inferencer, which would take the channels for RGB.
        inferencer.visualizer.add_datasample("image", image, found, draw_gt=False, pred_score_thr=score)
        instances = found.pred_instances
        counts = Counter(classes[i] for i in instances.labels[instances.scores >= score].tolist())
        words = ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing"
        return inferencer.visualizer.get_image(), words

    return look


def segmentor(config: Config, checkpoint: str, device: str, score: float) -> Look:
    """The segmentor."""
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(model=config, weights=checkpoint, device=device)
    meta = dataset_meta(config, checkpoint) or inferencer.model.dataset_meta
    classes = distinct(meta["classes"])
    inferencer.visualizer.set_dataset_meta(**meta)
    inferencer.visualizer.alpha = 0.8

    def look(image: np.ndarray) -> tuple[np.ndarray, str]:
        found = inferencer(bgr(image), return_datasamples=True)
        # Here and not by the inferencer, which would take the channels for RGB.
        inferencer.visualizer.add_datasample("image", image, found, draw_gt=False)
        labels, counts = np.unique(found.pred_sem_seg.data.cpu().numpy(), return_counts=True)
        order = np.argsort(-counts)
        shares = [f"{counts[i] / counts.sum():.0%} {classes[labels[i]]}" for i in order]
        return inferencer.visualizer.get_image(), ", ".join(shares)

    return look


def dataset_meta(config: Config, checkpoint: str) -> dict[str, Any] | None:
    """Names and colours of the classes: the config's, where the checkpoint has none. None leaves it to the library.

    Without names mmdet takes COCO's, and mmseg those of Cityscapes.
    """
    whole = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    meta = whole.get("meta") or {}
    if meta.get("dataset_meta") or meta.get("CLASSES"):
        return None
    for dataset in datasets((config.get("test_dataloader") or {}).get("dataset")):
        if classes := classes_of(dataset):
            own = dataset.get("metainfo") or {}
            palette = own.get("palette") or getattr(type_of(dataset), "METAINFO", {}).get("palette")
            some = np.random.default_rng(0).integers(0, 256, (len(classes), 3)).tolist()
            return {"classes": tuple(classes), "palette": palette or [tuple(colour) for colour in some]}
    return None


def bgr(image: np.ndarray) -> np.ndarray:
    """The order of channels in which OpenCV loads images for the pipelines."""
    return np.ascontiguousarray(image[..., ::-1])
