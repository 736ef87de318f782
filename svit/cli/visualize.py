"""Draws what a model's super tokens look like on photographs: pictures, and a page that shows them side by side.

    svit visualize cat.jpg street.jpg --model svit_small --checkpoint svit_small.safetensors
    svit visualize cat.jpg --model svit_nano.photos20 --img-size 256 --point 0.4 0.3

Open OUT/index.html. The pictures show the cells, the learned super tokens and the soft
association of the one at --point. What cannot be read is named and left out.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import nn

from svit.checkpoints import class_names
from svit.errors import InputError
from svit.files import atomic_write
from svit.folders import find_images
from svit.images import UnreadableImageError, read_image
from svit.layers import SuperTokenAttention
from svit.training.data import image_mode, report_unreadable
from svit.visualize import check_point, draw_attention, draw_iterations, draw_super_tokens, last_of_stages, watch

from .base import (
    add_device,
    add_img_size,
    add_model_arguments,
    at_least,
    brings_weights,
    choose_device,
    make_model,
    make_parser,
    named,
    out_of_memory_as_error,
)

SHOWN = 768  # pixels of a photo's longer side in the pictures, more than a panel has
LONGEST = 20  # sides to shorter ones, of photos whose pictures are of a size to look at
TOP = 3  # classes
DPI = 150

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Super tokens of {model}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem; color: #222 }}
section {{ border-top: 1px solid #ccc; margin-top: 2rem }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: flex-start }}
figure {{ margin: 0 }}
figcaption {{ color: #666 }}
img {{ display: block; max-width: 100%; height: auto }}
</style>
</head>
<body>
<h1>Super tokens of {model}</h1>
<p>Weights: {weights}</p>
{sections}
</body>
</html>
"""
SECTION = """<section>
<h2>{image}</h2>
<p>{facts}</p>
<div class="figures">
{figures}
</div>
</section>"""
FIGURE = '<figure><figcaption>{caption}</figcaption><a href="{file}"><img src="{file}" alt="{caption}"></a></figure>'


def parser() -> argparse.ArgumentParser:
    parser = make_parser("visualize", __doc__)
    parser.add_argument("images", metavar="IMAGE", type=named, nargs="+", help="a file, or a folder with all below it")
    add_model_arguments(parser, "--model")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("outputs/visualize"), help="default: %(default)s"
    )
    parser.add_argument(
        "--point",
        metavar=("X", "Y"),
        type=float,
        nargs=2,
        default=(0.5, 0.5),
        help="whose super token is looked at, as fractions of width and height from the top left; default: 0.5 0.5",
    )
    add_img_size(
        parser,
        help="what the model sees: its shorter side, or height and width; default: the model's input size as the "
        "shorter side. The whole image is resized, nothing is cropped",
    )
    parser.add_argument(
        "--n-iter",
        metavar="N",
        type=at_least(1),
        default=3,
        help="rounds of association to compare; default: %(default)s",
    )
    parser.add_argument("--format", choices=("png", "webp", "jpg"), default="png", help="default: %(default)s")
    add_device(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if an image could not be read."""
    args = parser().parse_args(argv)
    args.images = [i for path in args.images for i in (find_images([path]) if path.is_dir() else [path])]
    check(args)
    model = load_model(args)
    photos, unreadable = read_photos(args.images, image_mode(resolve_data_config({}, model=model)))
    if not photos:
        report_unreadable(unreadable, len(args.images))
        return 1
    make_folder(args.out)
    taken = {os.path.realpath(image) for image in args.images}
    # Every file takes its place at the end, the page last; on an error none does.
    with ExitStack() as files, out_of_memory_as_error("lower --img-size"):
        page = files.enter_context(atomic_write(args.out / "index.html"))
        sections = []
        for image, photo in photos.items():
            facts, figures = look(model, photo, args.img_size, args.point, args.n_iter)
            print(f"{image}: {facts}")
            shown = []
            for caption, figure in figures.items():
                name = f"{image.stem}-{caption.replace(' ', '-')}.{args.format}"
                if os.path.realpath(args.out / name) in taken:
                    raise InputError(
                        f"--out: expected another place than the images', got {args.out}, where {name} is one"
                    )
                with files.enter_context(atomic_write(args.out / name)).open("wb") as file:
                    figure.savefig(file, format=args.format, dpi=DPI, bbox_inches="tight", pad_inches=0.05)
                shown.append(FIGURE.format(file=quote(os.fsencode(name)), caption=caption))
            sections.append(SECTION.format(image=escape(image.name), facts=escape(facts), figures="\n".join(shown)))
        weights = Path(args.checkpoint).name if args.checkpoint else "pretrained" if brings_weights(args) else "random"
        text = PAGE.format(model=escape(args.model), weights=escape(weights), sections="\n".join(sections))
        page.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be any bytes
    print(f"wrote {args.out / 'index.html'}")
    report_unreadable(unreadable, len(args.images))
    return 1 if unreadable else 0


def check(args: argparse.Namespace) -> None:
    """Raises an error for what the arguments alone show to be wrong."""
    check_point(args.point)
    missing = next((image for image in args.images if not os.path.lexists(image)), None)  # a broken link is unreadable
    if missing is not None:
        raise InputError(f"{missing}: no such image")
    stems = [image.stem for image in args.images]
    twice = next((image for image in args.images if stems.count(image.stem) > 1), None)
    if twice is not None:
        raise InputError(f"{twice}: another image has the same name; their pictures would replace each other")


def read_photos(files: Sequence[Path], mode: str) -> tuple[dict[Path, Image.Image], list[UnreadableImageError]]:
    """The images, and why others cannot be read or drawn."""
    photos, unreadable = {}, []
    for file in files:
        try:
            photos[file] = read_photo(file, mode)
        except UnreadableImageError as error:
            unreadable.append(error)
    return photos, unreadable


def read_photo(file: Path, mode: str = "RGB") -> Image.Image:
    """The image as `read_image` gives it; one that is too thin to be drawn is an UnreadableImageError too."""
    photo = read_image(file, mode)
    if max(photo.size) > LONGEST * min(photo.size):
        size = f"{photo.height} x {photo.width} pixels"
        raise UnreadableImageError(f"{file}: cannot be drawn, {size}; expected sides up to 1 to {LONGEST}")
    return photo


def load_model(args: argparse.Namespace) -> nn.Module:
    """The model on its device; without a checkpoint and not pretrained its weights are random, the same at each run."""
    torch.manual_seed(0)
    model = make_model(args)
    layers = [module for module in model.modules() if isinstance(module, SuperTokenAttention)]
    if not layers:
        ours = ", ".join(timm.list_models(module="svit"))
        raise InputError(f"{args.model}: has no super-token attention; these have: {ours}")
    if all(layer.cell == (1, 1) for layer in layers):
        raise InputError(f"{args.model}: expected at least one layer with cells of more than one pixel, got none")
    return model.to(choose_device(args.device))


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written to: {error.strerror}") from error


def look(
    model: Any, photo: Image.Image, img_size: Sequence[int] | None, point: tuple[float, float], n_iter: int
) -> tuple[str, dict]:
    """What the model makes of one image: facts in words, and figures of matplotlib by what they show."""
    config = resolve_data_config({}, model=model)
    size = input_size(photo, img_size or (min(config["input_size"][1:]),), model.feature_info[-1]["reduction"])
    config.update(input_size=(config["input_size"][0], *size), crop_pct=1.0, crop_mode="squash")  # the whole image
    image = create_transform(**config)(photo)[None].to(next(model.parameters()).device)
    with watch(model) as layers:
        logits = model(image)[0]
    facts = f"seen at {size[0]} x {size[1]} pixels"
    if model.num_classes:
        facts += f", classified as {prediction(logits, class_names(model))}"

    small = photo.convert("RGB")
    small.thumbnail((SHOWN, SHOWN))
    shown = torch.from_numpy(np.array(small)).float() / 255
    stages = last_of_stages(layers)
    first = next(watched for watched in stages.values() if watched.samples)
    return facts, {
        "super tokens": draw_super_tokens(shown, stages, point),
        "attention": draw_attention(shown, stages, point),
        "rounds of association": draw_iterations(shown, first, n_iter),
    }


def input_size(photo: Image.Image, asked: Sequence[int], stride: int) -> tuple[int, int]:
    """Height and width of what the model sees.

    A shorter side keeps the photo's proportions as far as both sides are multiples of the model's stride: then the
    pixels of every map cover the image exactly, and the pictures are true to the pixel. Two numbers count as they are.
    """
    if len(asked) == 2:
        return asked[0], asked[1]
    scale = asked[0] / min(photo.size)
    width, height = (max(round(side * scale / stride), 1) * stride for side in photo.size)
    return height, width


def prediction(logits: torch.Tensor, names: Sequence[str]) -> str:
    """The first classes in words; names of ImageNet hold commas."""
    shares, classes = logits.float().softmax(-1).topk(min(TOP, len(names)))
    return "; ".join(f"{names[i]} ({share:.1%})" for i, share in zip(classes.tolist(), shares.tolist(), strict=True))
