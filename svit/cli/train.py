"""Trains an image classifier, any model of timm, by a recipe.

    python tools/train.py cifar10 --data-dir data/cifar10
    python tools/train.py imagenet_small --data-dir data/imagenet --resume
    torchrun --nproc-per-node 8 tools/train.py imagenet_small --data-dir data/imagenet --set mixed_precision=bf16
    python tools/train.py finetune --data-dir photos --set checkpoint=svit_small.safetensors epochs=10

RECIPE is a YAML file or the name of one that comes with the package; --set changes keys of it. One command serves a
CPU, a GPU, many GPUs and many machines (torchrun's --nnodes and --rdzv-endpoint). The folder --output gets
best.safetensors and last.safetensors (weights), state.pt (what --resume goes on from), log.csv, TensorBoard's events
and recipe.yaml.
SIGTERM and Ctrl-C save the state and exit. docs/training.md tells more.
"""

import argparse
import sys
from pathlib import Path

from svit.convert import CheckpointError
from svit.training.data import DataError, is_reader_gone
from svit.training.loop import Training, TrainingError
from svit.training.models import ModelError, out_of_memory_as_error
from svit.training.recipe import RecipeError, load_recipe
from svit.training.state import OutputError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 after an error, 143 after SIGTERM, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE")
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
    args = parser.parse_args(argv)
    output = args.output or Path("outputs", "train", Path(args.recipe).stem)
    try:
        recipe = load_recipe(args.recipe, args.set, args.data_dir)
        with out_of_memory_as_error(
            f"lower batch_size, now {recipe.batch_size}, and raise grad_accum by as much, which keeps the images of an "
            "update; or set grad_checkpointing=true, mixed_precision=bf16 or a smaller img_size"
        ):
            stopped_by = Training(recipe, output, args.resume, args.cpu).run()
    except (RecipeError, DataError, ModelError, CheckpointError, OutputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; what was saved before is whole", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_reader_gone(error):
            raise
        print(f"error: {str(error).splitlines()[0]} If memory ran short, lower workers", file=sys.stderr)
        return 1
    return 128 + stopped_by if stopped_by else 0
