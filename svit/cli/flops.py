"""Parameters and multiply-accumulates (MACs) of models, detectors and segmentors, for one image.

    svit flops svit_small svit_base swin_tiny_patch4_window7_224
    svit flops svit_small --img-size 800 1280 --per-module
    svit flops svit_small svit_base svit_large --img-size 384 --json flops.json
    svit flops mask-rcnn_svit-s_fpn_1x_coco --shape 800 1280 --no-attention-products

A detector or segmentor is a config file or the name of one that comes with the package (needs the extra `mm`).
Convolution and linear layers count, and attention's products, a multiply-accumulate each; norms and activations do not.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from tabulate import tabulate
from torch import nn

from svit import published
from svit.checkpoints import pretrained_cfg, size_argument
from svit.errors import InputError
from svit.files import atomic_write, write_csv
from svit.names import did_you_mean
from svit.profiling import Count, count

from . import install
from .base import add_img_size, check_folder, first_line, height_and_width, make_parser, show

# Heads and detectors whose cost the paper prints, and in which of its settings.
SETTINGS = {"MaskRCNN": "Mask R-CNN 1x", "CascadeRCNN": "Cascade Mask R-CNN 3x", "UPerHead": "UPerNet 160k"}
COLUMNS = ["model", "img_size", "params", "macs", "published_macs"]
MODULE_DEPTH = 4  # stages.0.blocks.0


def parser() -> argparse.ArgumentParser:
    parser = make_parser("flops", __doc__)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a model of timm or svit, or a config")
    add_img_size(
        parser,
        "--shape",
        help="one number: a square, two: height and width; default: each model's own (a config has none)",
    )
    parser.add_argument(
        "--no-attention-products",
        action="store_true",
        help="convolution and linear layers alone, as the paper counts detection and segmentation",
    )
    parser.add_argument("--per-module", action="store_true", help="a table of each model's modules too")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", metavar="FILE", type=Path, help="write the figures as a list of objects")
    output.add_argument("--csv", metavar="FILE", type=Path, help="write the figures as a table, img_size as HxW")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    target = args.json or args.csv
    img_size = height_and_width(args.img_size) if args.img_size else None
    builders = {name: builder(name, img_size) for name in args.models}
    if target:
        check_folder(target)
        if target.is_dir():
            raise InputError(f"{target}: cannot be written, it is a folder")
    products = not args.no_attention_products
    rows = [measure(*item, img_size, args.per_module, products) for item in builders.items()]
    print(summary(rows))
    if target:
        write(rows, target, "json" if args.json else "csv")
    return 0


@dataclass
class Built:
    """A model, the image it takes and the published figures that it has."""

    model: nn.Module
    in_chans: int
    size: tuple[int, int]
    published: int | None
    published_layers: int | None  # of convolution and linear layers alone


def builder(name: str, img_size: tuple[int, int] | None) -> Callable[[], Built]:
    """What builds a model or the model of a config, if there is one of that name."""
    if timm.is_model(name):
        return lambda: build_model(name, img_size)
    known, hint = timm.list_models(), ""
    try:
        from svit.adapters import config_names, load_config
    except ModuleNotFoundError as error:
        if name.endswith(".py"):
            raise InputError(f"{name}: a config needs {error.name}: {install('mm')}") from error
        hint = f"; names of configs are known with {error.name} ({install('mm')})"
    else:
        if name.endswith(".py") or name in config_names():
            if img_size is None:
                raise InputError(f"{name}: a config has no image size of its own; give --shape H W")
            return partial(build_config, load_config(name), img_size)
        known += config_names()
    raise InputError(f"{name}: no such model{did_you_mean(name, known)}{hint}")


def build_model(name: str, img_size: tuple[int, int] | None) -> Built:
    model = timm.create_model(name, **size_argument(name, img_size))
    in_chans, *own_size = pretrained_cfg(model)["input_size"]
    size = img_size or tuple(own_size)
    macs = published_macs(pretrained_cfg(model)["architecture"], "ImageNet-1K", size, "fvcore_gmacs")
    return Built(model, in_chans, size, macs, None)


def published_macs(name: str | None, setting: str, size: tuple[int, int], metric: str) -> int | None:
    gmacs = published.value(name, setting, size, metric)
    return None if gmacs is None else round(gmacs * 1e9)


def build_config(config: Any, size: tuple[int, int]) -> Built:
    from svit.adapters.counting import ImageToHeads

    backbone = config.model.backbone
    kind = config.model.get("decode_head", config.model).type
    macs = published_macs(backbone.get("arch"), SETTINGS.get(kind, ""), size, "layers_gmacs")
    return Built(ImageToHeads(config), backbone.get("in_channels", 3), size, None, macs)


def measure(
    name: str,
    build: Callable[[], Built],
    img_size: tuple[int, int] | None,
    per_module: bool,
    attention_products: bool,
) -> dict:
    """The row of one model. What could not be counted goes to stderr, a table of the modules to stdout."""
    try:
        built = build()
        result = count(built.model, built.size, built.in_chans, attention_products)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} at {show(img_size) if img_size else 'its own size'}: {first_line(error)}") from error

    for op, times in result.unsupported.items() if attention_products else ():
        print(f"warning: {name}: {op} counts as 0 (runs {times} times)", file=sys.stderr)
    if per_module:
        print(f"{name} at {show(built.size)}\n{modules(result)}\n")
    macs = built.published if attention_products else built.published_layers
    name = Path(name).stem if name.endswith(".py") else name
    return dict(zip(COLUMNS, (name, list(built.size), result.params, result.macs, macs), strict=True))


def modules(result: Count) -> str:
    table = [
        (name or "(all)", macs / 1e6, f"{macs / result.macs:.1%}")
        for name, macs in result.by_module.items()
        if macs and name.count(".") < MODULE_DEPTH
    ]
    return tabulate(table, ["module", "MMACs", "share"], floatfmt=".1f", colalign=("left", "right", "right"))


def summary(rows: list[dict]) -> str:
    table = [
        (
            row["model"],
            show(row["img_size"]),
            row["params"] / 1e6,
            row["macs"] / 1e9,
            row["published_macs"] and row["published_macs"] / 1e9,
        )
        for row in rows
    ]
    headers = ["model", "image", "params M", "GMACs", "published GMACs"]
    return tabulate(
        table, headers, floatfmt=("", "", ".2f", ".3f", ".3f"), missingval="-", colalign=("left", *["right"] * 4)
    )


def write(rows: list[dict], target: Path, form: str) -> None:
    """Writes a file, whole or not at all: "json" or "csv"."""
    try:
        if form == "csv":
            write_csv(target, [{**row, "img_size": show(row["img_size"])} for row in rows])
        else:
            with atomic_write(target) as part:
                part.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error})") from error
