"""Trains an image classifier, any model of timm, by a recipe.

    svit train cifar10 --data-dir data/cifar10
    svit train imagenet_small --data-dir data/imagenet --resume
    torchrun --nproc-per-node 8 -m svit train imagenet_small --data-dir data/imagenet --set mixed_precision=bf16
    svit train finetune --data-dir photos --set checkpoint=svit_small.safetensors epochs=10

RECIPE is a YAML file or the name of one that comes with the package; --set changes keys of it. One command serves a
CPU, a GPU, many GPUs and many machines (torchrun's --nnodes and --rdzv-endpoint). The folder --output gets
best.safetensors and last.safetensors (weights), state.pt (what --resume goes on from), log.csv, TensorBoard's events
and recipe.yaml.
SIGTERM and Ctrl-C save the state and exit.
"""

import argparse
from pathlib import Path
from typing import Any

from svit.errors import InputError
from svit.files import check_utf8
from svit.training.data import lost_readers_as_error
from svit.training.loop import Training
from svit.training.recipe import find_recipe, load_recipe, recipe_names

from .base import make_parser, out_of_memory_as_error


class PrintRecipe(argparse.Action):
    """Prints the recipe of that name, or without one the names of all, and ends the process."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        print(find_recipe(values).read_text(encoding="utf-8").rstrip() if values else "\n".join(recipe_names()))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    parser = make_parser("train", __doc__)
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--list", nargs=0, action=PrintRecipe, help="print the names of the package's recipes, and end")
    parser.add_argument("--show", metavar="NAME", action=PrintRecipe, help="print a recipe, and end")
    parser.add_argument("--data-dir", metavar="DIR", help="in place of the recipe's data_dir")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: outputs/train/NAME_OF_RECIPE")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="keys of the recipe")
    parser.add_argument(
        "--resume",
        metavar="STATE",
        nargs="?",
        const="auto",
        help="go on from a state; auto (the default) from that in the output folder, from the start if there is none",
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, though there is a GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 143 after SIGTERM, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    output = args.output or Path("outputs", "train", Path(args.recipe).stem)
    check_utf8("--output", str(output.absolute()))
    recipe = load_recipe(args.recipe, args.set, args.data_dir)
    advice = (
        f"lower batch_size, now {recipe.batch_size}, and raise grad_accum by as much, which keeps the images of an "
        "update; or set grad_checkpointing=true, mixed_precision=bf16 or a smaller img_size"
    )
    try:
        with out_of_memory_as_error(advice), lost_readers_as_error("workers"):
            stopped_by = Training(recipe, output, args.resume, args.cpu).run()
    except OSError as error:
        raise InputError(f"{error}; what was saved before is whole") from error
    return 128 + stopped_by if stopped_by else 0
