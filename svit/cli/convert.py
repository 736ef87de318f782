"""Converts a checkpoint from the authors' layout to ours, or back.

    python tools/convert_checkpoint.py stvit-small-224.pth svit_small.in1k.safetensors
    python tools/convert_checkpoint.py svit_small.in1k.safetensors stvit-small-224.pth

The weights under "model" are taken, whose top-1 is the published one; `--ema` takes "model_ema".
"""

import argparse
import sys

from svit.convert import MODELS, CheckpointError, convert


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="the checkpoint: .pth or .safetensors")
    parser.add_argument("target", metavar="OUT", help=".safetensors for our layout, .pth for the authors'")
    parser.add_argument("--model", metavar="NAME", choices=MODELS, help=f"default: what fits of {', '.join(MODELS)}")
    parser.add_argument("--num-classes", metavar="N", type=int, default=1000, help="default: 1000; 0: no head")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    args = parser.parse_args(argv)
    try:
        model = convert(args.source, args.target, args.model, args.num_classes, args.ema)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    weights = "moving average of the weights" if args.ema else "weights"
    print(f"read {args.source} ({weights} of {model}), wrote {args.target}")
    return 0
