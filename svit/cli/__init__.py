"""The command `svit`: which commands there are, how one starts, and how it prints its errors.

A module of this package is a command: `parser()` is its command line, `main(argv)` does the work and returns the exit
status. This module imports none of them before it is asked for, so that `svit --help` answers at once.
"""

import argparse
import importlib
import importlib.util
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from svit import __version__, processes
from svit.errors import InputError
from svit.names import did_you_mean


class Command(NamedTuple):
    """A line of `svit --help`, and the extra whose packages the command imports."""

    summary: str
    extra: str | None = None


# By task, in the order of the help.
GROUPS = {
    "train and evaluate a classifier": {
        "train": Command("train a model of timm by a recipe, on folders or timm's datasets", "train"),
        "validate": Command("measure top-1 and top-5 of a model on images with known classes", "train"),
    },
    "use a model": {
        "infer": Command("classify images", "train"),
        "visualize": Command("draw what the super tokens of a model see in images", "visualize"),
        "export": Command("write a model as ONNX, torch.export or AOTInductor, and check the file", "export"),
        "convert": Command("convert a checkpoint of the authors, or back"),
        "push": Command("push a checkpoint to the Hugging Face Hub"),
    },
    "measure": {
        "flops": Command("count parameters and multiply-accumulates", "profile"),
        "benchmark": Command("time models against each other", "profile"),
    },
    "detect and segment, with MMDetection and MMSegmentation": {
        "mm-train": Command("train a detector or segmentor", "mm"),
        "mm-test": Command("evaluate one", "mm"),
        "mm-infer": Command("draw what one finds in images", "mm"),
    },
    "this machine, and other people's scripts": {
        "exec": Command("run a script with the models registered in timm, such as timm's own"),
        "info": Command("show versions, devices, backends, and extras that are missing"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}

EXAMPLES = """
first steps:
  svit train digits                   a model of handwritten digits, in two minutes
  svit train --list                   all recipes
  svit infer photo.jpg --model svit_nano.photos20
                                      with weights that come with the package
  svit COMMAND --help                 options and examples of a command
"""


def run() -> NoReturn:
    """Runs the command line of this process and ends it."""
    processes.run(main)


def main(argv: list[str] | None = None) -> int:
    """Runs `svit ARGUMENT ...`; returns the exit status.

    Raises:
        SystemExit: the arguments cannot be understood (2), or help was asked for (0).
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return command(argv[0])(argv[1:])
    parser = outline()
    if argv and not argv[0].startswith("-"):
        parser.error(f"there is no command {argv[0]!r}{did_you_mean(argv[0], COMMANDS)}")
    parser.parse_args(argv)
    parser.error("expected a COMMAND; --help lists them")


def outline() -> argparse.ArgumentParser:
    """The command line without the commands' own."""
    width = max(map(len, COMMANDS))
    groups = [
        "\n".join([f"{task}:", *(f"  {name:{width}}  {command.summary}" for name, command in group.items())])
        for task, group in GROUPS.items()
    ]
    parser = argparse.ArgumentParser(
        prog="svit",
        usage="svit COMMAND ...\n       svit --help | --version",
        description="Super Token Vision Transformer: train, evaluate, use and measure image models.\n\n"
        + "\n\n".join(groups),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"svit {__version__}")
    return parser


def command(name: str) -> Callable[[list[str] | None], int]:
    """The function that runs a command: takes its arguments, by default the process's, and returns the exit status.

    Wrong input is status 1 and a line `error: ...`; so is an extra that is not installed.
    """

    def main(argv: list[str] | None = None) -> int:
        try:
            return importlib.import_module(f"svit.cli.{name.replace('-', '_')}").main(argv) or 0
        except BrokenPipeError:  # nobody reads on, as processes.Stream has it
            return 128 + signal.SIGPIPE
        except (InputError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")  # at once: other processes write too
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            extra = COMMANDS[name].extra
            if extra is None or importlib.util.find_spec(package):
                raise  # not what a user can install
            sys.stderr.write(f"error: svit {name} needs {package}: {install(extra)}\n")
        return 1

    return main


def install(extra: str) -> str:
    """The command that installs an extra."""
    # mmcv is built against the PyTorch that is there, which no extra can ask for.
    mmcv = " && pip install --no-build-isolation mmcv==2.1.0" if extra == "mm" else ""
    return f"pip install 'svit[{extra}]'{mmcv}"
