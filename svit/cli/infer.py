"""Classifies images: a file, several, or a folder of them.

    svit infer photo.jpg --model svit_small --checkpoint svit_small.safetensors
    svit infer photos/ --model svit_nano_32.cifar10 --pretrained --top 3 --format csv > classes.csv

Prints a table, JSON or CSV: the most probable classes of each image. What cannot be read is named, counted and skipped.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from svit.checkpoints import class_names
from svit.folders import find_images
from svit.images import UnreadableImageError, read_image
from svit.training.data import eval_transform, image_mode, report_unreadable

from .base import (
    add_device,
    add_img_size,
    add_model_arguments,
    at_least,
    make_parser,
    open_model,
    out_of_memory_as_error,
)


def parser() -> argparse.ArgumentParser:
    parser = make_parser("infer", __doc__)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="a file, or a folder with all below it")
    add_model_arguments(parser, "--model")
    add_img_size(parser)
    add_device(parser)
    parser.add_argument("--top", metavar="K", type=at_least(1), default=5, help="classes an image; default: 5")
    parser.add_argument("--batch-size", metavar="N", type=at_least(1), default=32, help="default: %(default)s")
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if an image could not be read."""
    args = parser().parse_args(argv)
    with out_of_memory_as_error("lower --batch-size or --img-size"):
        found, unreadable = infer(args)
    show(found, args.format)
    report_unreadable(unreadable, len(found) + len(unreadable))
    return 1 if unreadable else 0


def infer(args: argparse.Namespace) -> tuple[list[dict], list[UnreadableImageError]]:
    """The classes of each image and their probabilities, best first; and why others cannot be read."""
    paths = find_images(args.images)
    model, device, preprocessing = open_model(args)
    transform, mode = eval_transform(preprocessing), image_mode(preprocessing)
    names = class_names(model)

    found, unreadable = [], []
    for start in tqdm(range(0, len(paths), args.batch_size), disable=None, unit="batch"):
        read, tensors = [], []
        for path in paths[start : start + args.batch_size]:
            try:
                photo = read_image(path, mode)
            except UnreadableImageError as error:
                unreadable.append(error)
                continue
            read.append(path)
            tensors.append(transform(photo))
        if not read:
            continue
        with torch.inference_mode():
            images = torch.stack(tensors).to(device, memory_format=torch.channels_last)
            best = model(images).float().softmax(1).topk(min(args.top, model.num_classes))
        for path, shares, classes in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
            top = [{"class": names[c], "index": c, "probability": p} for c, p in zip(classes, shares, strict=True)]
            found.append({"image": str(path), "classes": top})
    return found, unreadable


def show(found: list[dict], form: str) -> None:
    if form == "json":
        print(json.dumps(found, indent=1))
        return
    rows = [
        {"image": image["image"], "rank": rank, **top}
        for image in found
        for rank, top in enumerate(image["classes"], start=1)
    ]
    if form == "csv":
        writer = csv.DictWriter(sys.stdout, ["image", "rank", "class", "index", "probability"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    table = [
        (image["image"], ", ".join(f"{top['class']} {top['probability']:.1%}" for top in image["classes"]))
        for image in found
    ]
    print(tabulate(table, headers=["image", "classes"]))
