"""Converts a checkpoint from the authors' layout to ours, or back.

    svit convert stvit-small-224.pth svit_small.in1k.safetensors
    svit convert svit_small.in1k.safetensors stvit-small-224.pth

The weights under "model" are taken, whose top-1 is the published one; `--ema` takes "model_ema".
"""

import argparse

from svit.convert import MODELS, convert

from .base import at_least, make_parser


def parser() -> argparse.ArgumentParser:
    parser = make_parser("convert", __doc__)
    parser.add_argument("source", metavar="IN", help="the checkpoint: .pth or .safetensors")
    parser.add_argument("target", metavar="OUT", help=".safetensors for our layout, .pth for the authors'")
    parser.add_argument("--model", metavar="NAME", choices=MODELS, help=f"default: what fits of {', '.join(MODELS)}")
    parser.add_argument(
        "--num-classes", metavar="N", type=at_least(0), default=1000, help="default: %(default)s; 0: no head"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    model = convert(args.source, args.target, args.model, args.num_classes, args.ema)
    weights = "moving average of the weights" if args.ema else "weights"
    print(f"read {args.source} ({weights} of {model}), wrote {args.target}")
    return 0
