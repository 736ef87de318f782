"""Evaluates an image classifier: top-1 and top-5, of each class if asked, the paper's figure beside.

    svit validate svit_small --checkpoint svit_small.safetensors --data-dir data/imagenet
    svit validate svit_nano_32.cifar10 --data-dir data --dataset torch/cifar10 --per-class
    svit validate svit_small --checkpoint svit_small.safetensors --data-dir data/imagenet \\
        --img-size 384 --crop-pct 1.0 --flip --json result.json

Size, crop and normalization are those of the checkpoint or the model, unless an option says otherwise. `--data-dir` is
a folder with one folder a class (or one that holds such a folder under val/), a tar file, or the root of what
`--dataset` names.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from svit import published
from svit.checkpoints import class_names, pretrained_cfg
from svit.errors import InputError
from svit.files import atomic_write
from svit.training.data import (
    Loader,
    classes_of,
    eval_transform,
    image_mode,
    lost_readers_as_error,
    open_dataset,
    print_contents,
)
from svit.training.evaluation import evaluate

from .base import (
    add_amp,
    add_device,
    add_img_size,
    add_model_arguments,
    at_least,
    check_file,
    make_parser,
    open_model,
    out_of_memory_as_error,
    share,
    this_process,
)

# Of tables: figures as they are written, with all their digits.
FIGURES = dict(disable_numparse=True, stralign="right")


def parser() -> argparse.ArgumentParser:
    parser = make_parser("validate", __doc__)
    add_model_arguments(parser)
    add_img_size(parser)
    add_device(parser)
    add_amp(parser)
    parser.add_argument("--data-dir", metavar="DIR", required=True)
    parser.add_argument("--dataset", metavar="NAME", default="folder", help="folder (default), torch/..., hfds/...")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--download", action="store_true", help="where timm can")
    parser.add_argument("--crop-pct", metavar="SHARE", type=share, help="of the resized image's side that is kept")
    parser.add_argument("--flip", action="store_true", help="average the logits of the image and its mirror image")
    parser.add_argument("--batch-size", metavar="N", type=at_least(1), default=128, help="default: %(default)s")
    parser.add_argument("--workers", metavar="N", type=at_least(0), default=2, help="processes that read; default: 2")
    parser.add_argument("--max-unreadable", metavar="N", type=at_least(0), default=10, help="that may be skipped")
    parser.add_argument("--per-class", action="store_true", help="top-1 of each class, the worst first")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to a file, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command_line = parser()
    args = command_line.parse_args(argv)
    process = this_process(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    check_file(command_line, "--json", args.json)
    with out_of_memory_as_error("lower --batch-size or --img-size"), lost_readers_as_error("--workers"):
        result = validate(args, process)
    if not process.is_main_process:
        return 0
    print_result(result, args.per_class)
    if args.json:
        with atomic_write(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def validate(args: argparse.Namespace, process: PartialState) -> dict:
    """What the command line asks for, as numbers: accuracy in per cent. Each process takes a share of the images."""
    model, device, preprocessing = open_model(args, crop_pct=args.crop_pct)
    options = {"download": args.download} if args.dataset.startswith("torch/") else {}
    loader = Loader(
        open_dataset(args.dataset, args.data_dir, args.split, **options),
        eval_transform(preprocessing),
        args.batch_size,
        training=False,
        rank=process.process_index,
        world=process.num_processes,
        workers=args.workers,
        limit=args.max_unreadable,
        mode=image_mode(preprocessing),
    )
    if process.is_main_process:
        print_contents(args.split, loader.dataset, sys.stderr)
    names = names_of_classes(model, classes_of(loader.dataset))
    autocast = partial(torch.autocast, device.type, getattr(torch, args.amp)) if args.amp else nullcontext
    batches = tqdm(
        loader.epoch(),
        total=len(loader),
        disable=not process.is_main_process or None,
        desc="evaluating",
        unit="batch",
    )
    total = partial(reduce, reduction="sum")
    found = evaluate(
        model, batches, cast(int, model.num_classes), device, autocast, args.flip, channels_last=True, reduce=total
    )
    height, width = preprocessing["input_size"][1:]
    result = {
        "model": args.model,
        "images": found.count,
        "unreadable": len(loader.dataset) - found.count if not loader.streams else None,
        "img_size": [height, width],
        "crop_pct": preprocessing["crop_pct"],
        "top1": found.top1,
        "top5": found.top5,
        "loss": found.loss,
        "hits": found.hits,
        "classes": {
            name: {"top1": 100 * hits / count, "images": count}
            for name, hits, count in zip(names, found.class_hits, found.class_counts, strict=True)
            if count
        },
    }
    if model.num_classes == 1000:
        architecture = pretrained_cfg(model).get("architecture") or args.model
        as_trained = (height, width) == tuple(pretrained_cfg(model)["input_size"][1:])  # the paper's 384 is fine-tuned
        name, size = architecture.partition(".")[0], (height, width)
        result["paper_top1"] = published.value(name, "ImageNet-1K", size, "top1") if as_trained else None
    return result


def names_of_classes(model: nn.Module, found: list[str] | None) -> list[str]:
    """Names of the model's classes: its checkpoint's, or else those of the data.

    Folders are numbered by their own names, so the data must have the model's classes, all of them.

    Raises:
        InputError: it has others.
    """
    stored = pretrained_cfg(model).get("label_names")
    if found and stored and list(stored) != found:
        raise InputError(f"data_dir: its classes are {found[:10]}, expected the checkpoint's {list(stored)[:10]}")
    if found and not stored and len(found) != model.num_classes:
        raise InputError(f"data_dir: {len(found)} classes, expected the model's {model.num_classes}")
    return found if found and not stored else class_names(model)


def print_result(result: dict, per_class: bool) -> None:
    height, width = result["img_size"]
    paper = result.get("paper_top1")
    row = {
        "model": result["model"],
        "images": result["images"],
        **({"unreadable": result["unreadable"]} if result["unreadable"] else {}),
        "size": f"{height} x {width}",
        "crop": result["crop_pct"],
        "top-1": f"{result['top1']:.2f}",
        "top-5": f"{result['top5']:.2f}",
        "top-1 (paper)": f"{paper:.1f}" if paper else "-",
        "loss": f"{result['loss']:.4f}",
    }
    print(tabulate([row], headers="keys", **FIGURES))
    if per_class:
        worst_first = sorted(result["classes"].items(), key=lambda item: item[1]["top1"])
        rows = [(name, f"{c['top1']:.2f}", c["images"]) for name, c in worst_first]
        print("\n" + tabulate(rows, headers=["class", "top-1", "images"], **FIGURES))
