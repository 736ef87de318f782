"""What the commands share: options and their checks, the model that options name, running out of memory."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_data_config
from torch import nn

from svit.checkpoints import create_model, names_weights, pretrained_cfg, size_argument
from svit.errors import InputError
from svit.images import MODES

if TYPE_CHECKING:
    from accelerate import PartialState


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of the command `svit NAME`, which the module's docstring describes."""
    return argparse.ArgumentParser(
        prog=f"svit {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def show(shape: Iterable[int]) -> str:
    """Sizes as text: 224x224."""
    return "x".join(map(str, shape))


def folder_of(file: Path) -> Path:
    """Where a file is written: of a link, where it leads to, also if nothing is there or it leads to itself."""
    return Path(os.path.realpath(file)).parent if file.is_symlink() else file.parent


def check_file(parser: argparse.ArgumentParser, option: str, file: Path | None) -> None:
    """Ends the command before the work, and not after, if the option names a file that cannot be written."""
    if file and (file.is_dir() or not folder_of(file).is_dir()):
        parser.error(f"{option}: expected a file in a folder that exists, got {file}")


def check_folder(file: Path) -> None:
    """Ends the command before the work, and not after, if the folder of a result is not there.

    Raises:
        InputError: of the file, or of what a link leads to.
    """
    folder = folder_of(file)
    if not folder.is_dir():
        raise InputError(f"{file}: there is no folder {folder}")


def named(text: str) -> Path:
    """A type of arguments: a path. Empty text, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty name")
    return Path(text)


def at_least(least: int) -> Callable[[str], int]:
    """A type of arguments: a whole number, `least` or more."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    return number


def share(text: str) -> float:
    """A type of arguments: a number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return value


class ImageSize(argparse.Action):
    """One number or two, positive and whole."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if len(values) > 2 or not all(value.isdecimal() and int(value) > 0 for value in values):
            message = f"expected one or two positive whole numbers, got {' '.join(values)}"
            raise argparse.ArgumentError(self, message)
        setattr(namespace, self.dest, [int(value) for value in values])


def add_img_size(
    parser: argparse.ArgumentParser,
    *names: str,
    help: str = "height and width in pixels, or one number for both; default: the model's own",
    default: list[int] | None = None,
) -> None:
    """--img-size, and the same option by other names: a list of one number or two, or None."""
    parser.add_argument(
        "--img-size", *names, dest="img_size", metavar="N", nargs="+", action=ImageSize, default=default, help=help
    )


def height_and_width(img_size: Sequence[int]) -> tuple[int, int]:
    """What --img-size gives, where one number means a square."""
    return img_size[0], img_size[-1]


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="default: the GPU if there is one")


def choose_device(name: str | None) -> torch.device:
    """The device of that name; None for the GPU if there is one.

    Raises:
        InputError: no such device, or it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch's words for an unknown device, and for one not there
        raise InputError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def this_process(args: argparse.Namespace) -> "PartialState":
    """This process, alone or among those that torchrun started: its rank, and how many there are.

    Where `--device` names no GPU by number, it is set to the GPU of this process.
    """
    from accelerate import PartialState

    cpu = not torch.accelerator.is_available() or str(args.device).startswith("cpu")
    process = PartialState(cpu=cpu)
    if process.num_processes > 1 and args.device in (None, "cuda"):
        args.device = str(process.device)
    return process


DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def add_amp(parser: argparse.ArgumentParser, **options: Any) -> None:
    """--amp: the name of PyTorch's dtype, or None."""
    parser.add_argument(
        "--amp",
        metavar="DTYPE",
        type=lambda text: DTYPES.get(text, text),
        choices=[*DTYPES.values()],
        **{"help": "mixed precision: bfloat16 (bf16) or float16 (fp16)", **options},
    )


def channels(text: str) -> int:
    """A type of arguments: as many channels as images have."""
    if text not in map(str, MODES):
        raise argparse.ArgumentTypeError(f"expected {', '.join(map(str, MODES))}, got {text}")
    return int(text)


def add_model_arguments(parser: argparse.ArgumentParser, name: str = "model") -> None:
    """The options that name a model and its weights, for `make_model` and `open_model`."""
    required: dict[str, Any] = {"required": True} if name.startswith("-") else {}
    parser.add_argument(
        name,
        metavar="MODEL",
        help="any model of timm; hf-hub:, local-dir: and a tag, as in svit_nano.photos20, bring weights",
        **required,
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="weights: .safetensors, or a file of torch.save")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights, or those that come with svit")
    parser.add_argument("--ema", action="store_true", help="the moving average, of a file that holds both")
    parser.add_argument(
        "--num-classes", metavar="N", type=at_least(1), help="default: the checkpoint's or the model's own"
    )
    parser.add_argument("--in-chans", metavar="N", type=channels, help="channels, 1 to 4; default: as --num-classes")


def make_model(args: argparse.Namespace, **arguments: Any) -> nn.Module:
    """The model of `add_model_arguments`'s options, on the CPU.

    Args:
        args: what the parser gave.
        arguments: further ones of `timm.create_model`.

    Raises:
        InputError: as `svit.checkpoints.create_model`.
    """
    for name in ("num_classes", "in_chans"):
        if getattr(args, name) is not None:
            arguments[name] = getattr(args, name)
    model = create_model(args.model, args.checkpoint, brings_weights(args), args.ema, **arguments)
    known = pretrained_cfg(model).get("num_classes")
    if brings_weights(args) and known != model.num_classes:
        what = f"of {known} classes, --num-classes asks for {model.num_classes}"
        print(f"warning: the weights are {what}: those of the classifier are random", file=sys.stderr)
    return model


def brings_weights(args: argparse.Namespace) -> bool:
    """Whether timm has the weights: it is asked for them, or the name says where they are."""
    return args.pretrained or (args.checkpoint is None and names_weights(args.model))


def warn_of_random_weights(args: argparse.Namespace) -> None:
    if args.checkpoint is None and not brings_weights(args):
        print("warning: neither --checkpoint nor --pretrained: the weights are random", file=sys.stderr)


def open_model(args: argparse.Namespace, **preprocessing: Any) -> tuple[nn.Module, torch.device, dict[str, Any]]:
    """The model that these options name, on its device, and the preprocessing of its images.

    Args:
        args: what a parser with `add_model_arguments`, `add_img_size` and `add_device` gave.
        preprocessing: values that differ from the model's; None counts as nothing.

    Raises:
        InputError: as `svit.checkpoints.create_model`; or the device cannot be used.
    """
    size = height_and_width(args.img_size) if args.img_size else None
    device = choose_device(args.device)
    warn_of_random_weights(args)
    model = make_model(args, **size_argument(args.model, size)).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    preprocessing = {key: value for key, value in preprocessing.items() if value is not None}
    if size:
        preprocessing["input_size"] = (resolve_data_config({}, model=model)["input_size"][0], *size)
    return model, device, resolve_data_config(preprocessing, model=model)


@contextmanager
def out_of_memory_as_error(advice: str) -> Iterator[None]:
    """Running out of memory inside of it is an InputError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error):
            raise InputError(f"out of memory: {advice}") from error
        raise
