"""Runs a script that knows nothing of svit, with svit's models registered in timm.

    svit exec validate.py --model svit_small --data-dir data/imagenet     # timm's script
    svit exec -m some.module --backbone svit_small
    torchrun --nproc-per-node 8 -m svit exec train.py --model svit_small  # timm's, too

The arguments are those of `python`. The processes that the script starts know the models too. Python's options -E, -I
and -S would prevent this.
"""

import argparse
import os
import sys
from pathlib import Path

from .base import make_parser

STARTUP = Path(__file__).with_name("startup")


def parser() -> argparse.ArgumentParser:
    parser = make_parser("exec", __doc__)
    parser.add_argument("python", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="SCRIPT ..., or -m MODULE ...")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Becomes Python with these arguments; returns nothing, unless the arguments are wrong."""
    argv = sys.argv[1:] if argv is None else argv
    command = parser()
    if argv[:1] in (["-h"], ["--help"]):
        command.parse_args(argv)
    if not argv:
        command.error("expected SCRIPT or -m MODULE")
    if argv[0] in ("-E", "-I", "-S"):
        command.error(f"expected SCRIPT or -m MODULE, got {argv[0]}, with which Python does not register the models")
    paths = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *argv], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
