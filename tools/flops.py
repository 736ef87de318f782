"""Parameters and multiply-accumulates (MACs) of models, for one image.

    python tools/flops.py svit_small svit_base swin_tiny_patch4_window7_224
    python tools/flops.py svit_small --img-size 800 1280 --per-module
    python tools/flops.py svit_small svit_base svit_large --img-size 384 --json flops.json

docs/flops.md says what counts.
"""

import argparse
import csv
import difflib
import io
import json
import sys
from pathlib import Path

import timm
from tabulate import tabulate

import svit  # noqa: F401  registers the models
from svit.files import replacing
from svit.profiling import Count, count

# (model, image) -> MACs of the authors' code, counted by the same rules.
PUBLISHED = {
    ("svit_small", (224, 224)): 4_367_000_000,
    ("svit_small", (384, 384)): 14_156_000_000,
    ("svit_base", (224, 224)): 9_872_000_000,
    ("svit_base", (384, 384)): 31_489_000_000,
    ("svit_large", (224, 224)): 15_597_000_000,
    ("svit_large", (384, 384)): 49_748_000_000,
}
COLUMNS = ["model", "img_size", "params", "macs", "published_macs"]
MODULE_DEPTH = 4  # stages.0.blocks.0


class FlopsError(Exception):
    """What the user is told in one line."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a model of timm or svit")
    parser.add_argument(
        "--img-size",
        metavar="N",
        nargs="+",
        help="one number: a square, two: height and width; default: each model's own",
    )
    parser.add_argument("--per-module", action="store_true", help="a table of each model's modules too")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", metavar="FILE", type=Path, help="write the figures as a list of objects")
    output.add_argument("--csv", metavar="FILE", type=Path, help="write the figures as a table, img_size as HxW")
    args = parser.parse_args(argv)
    target = args.json or args.csv
    try:
        img_size = parse_size(args.img_size)
        for name in args.models:
            check_name(name)
        if target and not target.parent.is_dir():  # before the work, not after
            raise FlopsError(f"{target}: there is no folder {target.parent}")
        rows = [measure(name, img_size, args.per_module) for name in args.models]
        print(summary(rows))
        if target:
            write(target, as_json(rows) if args.json else as_csv(rows))
    except FlopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_size(values: list[str] | None) -> tuple[int, int] | None:
    """(H, W) of what --img-size was given."""
    if values is None:
        return None
    if len(values) > 2 or not all(value.isdecimal() and int(value) > 0 for value in values):
        raise FlopsError(f"--img-size: expected one or two positive whole numbers, got {' '.join(values)}")
    return int(values[0]), int(values[-1])


def check_name(name: str) -> None:
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models()))
        raise FlopsError(f"{name}: no such model" + (f"; did you mean {close}?" if close else ""))


def measure(name: str, img_size: tuple[int, int] | None, per_module: bool) -> dict:
    """The row of one model. What could not be counted goes to stderr, a table of the modules to stdout."""
    try:
        model = timm.create_model(name)
        in_chans, *own_size = model.pretrained_cfg["input_size"]
        size = img_size or tuple(own_size)
        if model.pretrained_cfg.get("fixed_input_size") and size != tuple(own_size):
            model = timm.create_model(name, img_size=size)
        result = count(model, size, in_chans)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise FlopsError(f"{name} at {show(img_size) if img_size else 'its own size'}: {first_line(error)}") from error

    for op, times in result.unsupported.items():
        print(f"warning: {name}: {op} counts as 0 (runs {times} times)", file=sys.stderr)
    if per_module:
        print(f"{name} at {show(size)}\n{modules(result)}\n")
    architecture = model.pretrained_cfg["architecture"]
    published = PUBLISHED.get((architecture, size))
    return dict(zip(COLUMNS, (name, list(size), result.params, result.macs, published), strict=True))


def show(size: list[int] | tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def as_json(rows: list[dict]) -> str:
    return json.dumps(rows, indent=2) + "\n"


def as_csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "img_size": show(row["img_size"])} for row in rows)
    return out.getvalue()


def write(target: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    try:
        with replacing(target) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FlopsError(f"{target}: cannot be written ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
