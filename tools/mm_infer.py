"""Draws what a detector of MMDetection or a segmentor of MMSegmentation finds in images.

    python tools/mm_infer.py mask-rcnn_svit-s_fpn_1x_coco epoch_12.pth street.jpg --out found.png
    python tools/mm_infer.py svit-s_upernet_8xb2-160k_ade20k-512x512 iter_160000.pth a.jpg b.jpg --out pictures/

Boxes, masks and scores, or the classes laid over the image. CONFIG is a file or the name of one that comes with the
package.
"""

import argparse
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
from mmengine.config import DictAction
from PIL import Image

import processes
from classification.models import choose_device
from mm_train import drop_start_weights, failed
from svit.adapters.checkpoints import refuse_foreign_objects
from svit.adapters.checks import check_checkpoint
from svit.adapters.configs import ConfigError, load_config
from svit.adapters.images import problem_with
from svit.files import replacing


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of the whole model, as mm_train.py writes it")
    parser.add_argument("images", metavar="IMAGE", type=Path, nargs="+")
    parser.add_argument(
        "--out", metavar="PATH", type=Path, required=True, help="a picture, or a folder, where several are drawn"
    )
    parser.add_argument(
        "--score", metavar="S", type=float, default=0.3, help="least score of what a detector draws; default: 0.3"
    )
    parser.add_argument("--device", metavar="NAME", help="default: the GPU if there is one")
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", action=DictAction)
    args = parser.parse_args(argv)
    refuse_foreign_objects()
    try:
        targets = plan(args.images, args.out)
        device = str(choose_device(args.device))
        config = load_config(args.config, args.cfg_options)
        drop_start_weights(config)
        check_checkpoint(config, args.checkpoint)
        draw = segmentor if config.get("default_scope") == "mmseg" else detector
        look = draw(config, args.checkpoint, device, args.score)
    except (ValueError, UnpicklingError) as error:
        return failed(error)
    for image, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        picture, found = look(str(image))
        with replacing(target) as part:
            Image.fromarray(picture).save(part)
        print(f"{image} -> {target}: {found}")
    return 0


def plan(images: list[Path], out: Path) -> dict[Path, Path]:
    """Which picture goes where; every image is looked at before the first is drawn."""
    for image in images:
        problem = problem_with(image)
        if problem:
            raise ConfigError(f"{image}: {problem}")
    if len(images) == 1 and out.suffix and not out.is_dir():
        if not out.parent.is_dir():
            raise ConfigError(f"--out: there is no folder {out.parent}")
        if out.suffix.lower() not in Image.registered_extensions():
            raise ConfigError(f"--out: expected the name of a picture, such as found.png, or a folder, got {out}")
        targets = {images[0]: out}
    else:
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out: expected a folder for {len(images)} images, got {out}")
        targets = {image: out / f"{image.stem}.png" for image in images}
    if len(set(targets.values())) < len(images):
        raise ConfigError(f"--out: two of the images would be drawn to the same file in {out}")
    replaced = {image.resolve() for image in images} & {target.resolve() for target in targets.values()}
    if replaced:
        raise ConfigError(f"--out: expected another place than the images', got {out}, where {replaced.pop()} is one")
    return targets


def detector(config, checkpoint: str, device: str, score: float):
    """A function from an image's path to the picture (H, W, 3) and what was found in words."""
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(model=config, weights=checkpoint, device=device, show_progress=False)
    classes = inferencer.model.dataset_meta["classes"]

    def look(image: str) -> tuple[np.ndarray, str]:
        result = inferencer(image, return_vis=True, pred_score_thr=score)
        found = result["predictions"][0]
        counts = Counter(classes[i] for i, s in zip(found["labels"], found["scores"], strict=True) if s >= score)
        return result["visualization"][0], ", ".join(f"{n} {name}" for name, n in counts.most_common()) or "nothing"

    return look


def segmentor(config, checkpoint: str, device: str, score: float):
    """A function from an image's path to the picture (H, W, 3) and what was found in words."""
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(model=config, weights=checkpoint, device=device)
    classes = inferencer.model.dataset_meta["classes"]

    def look(image: str) -> tuple[np.ndarray, str]:
        result = inferencer(image, return_vis=True)
        labels, counts = np.unique(result["predictions"], return_counts=True)
        order = np.argsort(-counts)
        shares = [f"{counts[i] / counts.sum():.0%} {classes[labels[i]]}" for i in order]
        return result["visualization"], ", ".join(shares)

    return look


if __name__ == "__main__":
    processes.run(main)
