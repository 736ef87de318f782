"""Classifies images, or computes their features.

    svit infer photo.jpg --model svit_small --checkpoint svit_small.safetensors
    svit infer photos/ --model svit_nano.photos20 --top 3 --out classes.csv
    svit infer @files.txt 'shards/*.tar' --model svit_nano.photos20 --features --out features.parquet
    torchrun --nproc-per-node 8 -m svit infer photos/ --model svit_small --checkpoint svit_small.safetensors \\
        --out classes.jsonl --resume

An IMAGE is a file, a folder, a tar file (a shard of webdataset), a pattern in quotes, @FILE with one of these on each
line, or - for such lines on standard input. Results come in that order. What cannot be read is named, counted and
skipped; the exit status is 1 then.
"""

import argparse
import base64
import csv
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tabulate import tabulate
from tqdm import tqdm

from svit.convert import write_safetensors
from svit.errors import InputError
from svit.files import atomic_write, is_special
from svit.inference import Photo, Record, find_photos, infer
from svit.training.data import lost_readers_as_error, report_unreadable

from . import install
from .base import (
    add_device,
    add_img_size,
    add_model_arguments,
    at_least,
    check_file,
    make_parser,
    open_model,
    out_of_memory_as_error,
    this_process,
)

# Of classes and of features; those in BINARY need a file.
FORMATS = ("table", "json", "jsonl", "csv", "parquet")
FEATURE_FORMATS = ("jsonl", "parquet", "safetensors")
BINARY = ("parquet", "safetensors")

ROW_GROUP = 4096  # images that a Parquet file holds together
MOST_NAMES = 10**8  # bytes that the header of a safetensors file may have


def parser() -> argparse.ArgumentParser:
    parser = make_parser("infer", __doc__)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="see above")
    add_model_arguments(parser, "--model")
    add_img_size(parser)
    add_device(parser)
    parser.add_argument("--top", metavar="K", type=at_least(1), default=5, help="classes an image; default: 5")
    parser.add_argument("--features", action="store_true", help="what the classifier gets, pooled, in place of classes")
    parser.add_argument("--batch-size", metavar="N", type=at_least(1), default=32, help="default: %(default)s")
    parser.add_argument("--workers", metavar="N", type=at_least(0), default=2, help="processes that read; default: 2")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: standard output")
    parser.add_argument(
        "--format",
        choices=[*WRITERS],
        help="default: by the end of --out's name, else table",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run that wrote --out broke off, or start"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 1 if an image could not be read."""
    args = parse(argv)
    process = this_process(args)
    with out_of_memory_as_error("lower --batch-size or --img-size"), lost_readers_as_error("--workers"):
        unreadable, images = classify(args, process)
    if process.is_main_process:
        report_unreadable(unreadable, images)
    return 1 if unreadable else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with a format that fits the others."""
    command = parser()
    args = command.parse_args(argv)
    formats = FEATURE_FORMATS if args.features else FORMATS
    if args.format is None:
        suffix = args.out.suffix[1:].lower() if args.out else ""
        args.format = suffix if suffix in WRITERS else formats[0]
    if args.format not in formats:
        what = "features" if args.features else "classes"
        command.error(f"--format: expected one of {', '.join(formats)} for {what}, got {args.format}")
    if args.out is None and (args.resume or args.format in BINARY):
        given = "--resume" if args.resume else args.format
        command.error(f"--out: expected a file with {given}, got none")
    check_file(command, "--out", args.out)
    if args.resume and is_special(args.out):
        command.error(f"--out: expected a regular file with --resume, got {args.out}")
    if args.format == "parquet" and not importlib.util.find_spec("pyarrow"):
        raise InputError(f"--format parquet: needs pyarrow: {install('parquet')}")
    return args


def classify(args: argparse.Namespace, process: PartialState) -> tuple[list[str], int]:
    """Writes what is asked for; returns why images cannot be read, and how many images there are."""
    main = process.is_main_process
    photos = find_photos(args.images, None if main else lambda line: None)
    if args.format == "safetensors" and sum(len(json.dumps(photo.name)) + 2 for photo in photos) > MOST_NAMES:
        raise InputError("--format: expected parquet for so many images: safetensors has no room for their names")
    model, _, preprocessing = open_model(args)
    keeps = main and args.out and not is_special(args.out)
    part = Part(args.out, description(args, photos), args.resume) if keeps else None
    done = broadcast_object_list([part.done if part else 0])[0]
    batches = infer(
        model,
        photos,
        preprocessing,
        features=args.features,
        top=args.top,
        batch_size=args.batch_size,
        workers=args.workers,
        start=done,
        rank=process.process_index,
        world=process.num_processes,
    )
    bar = tqdm(total=len(photos), initial=done, unit="image", disable=not main or None)
    unreadable: list[str] = []

    def found() -> Iterator[Record]:
        """The records of all processes, in the photos' order."""
        for batch in batches:
            for record in gather_object(batch):
                bar.update()
                yield record

    with bar:
        everything = found()
        if part is not None:
            part.add(everything)
            everything = part.records()
        wanted = readable(everything, unreadable)
        if not main:
            for _ in wanted:
                pass
        elif args.out:
            with atomic_write(args.out) as whole:
                write(args.format, wanted, whole)
        else:
            write(args.format, wanted, sys.stdout)
        if part is not None:
            part.path.unlink()
    process.wait_for_everyone()  # one that ends with an error ends the others
    return unreadable, len(photos)


def description(args: argparse.Namespace, photos: list[Photo]) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    names = hashlib.sha256("\0".join(photo.name for photo in photos).encode("utf-8", "surrogateescape"))
    changed = Path(args.checkpoint).stat().st_mtime if args.checkpoint and Path(args.checkpoint).is_file() else None
    keys = ("model", "checkpoint", "pretrained", "ema", "num_classes", "in_chans", "img_size", "features", "top")
    return {
        **{key: getattr(args, key) for key in keys},
        "checkpoint's date": changed,
        "images": len(photos),
        "their names": names.hexdigest()[:16],
    }


class Part:
    """The records of a run that has not ended, in the file `FILE.part`: a line of JSON each, after its description.

    Raises:
        InputError: the file is of another run, or it is to be resumed and is not asked to.
    """

    def __init__(self, out: Path, run: dict[str, Any], resume: bool) -> None:
        self.path, self.done = out.with_name(out.name + ".part"), 0
        first = json.dumps(run) + "\n"
        if self.path.exists():
            with self.path.open("rb+") as file:
                before, end = file.readline().decode(errors="replace"), file.tell()
                for line in file:
                    if not is_record(line):  # the last may be cut short; what follows damage is done again
                        break
                    end += len(line)
                    self.done += 1
                if self.done and not resume:
                    raise InputError(
                        f"--out: {self.path} is of a run that broke off; --resume continues it, or delete it"
                    )
                if self.done and before != first:
                    raise InputError(
                        f"--resume: {self.path} is of another run, {before.strip()}, now {first.strip()}; delete it to "
                        "start again"
                    )
                file.truncate(end)
        if not self.done:
            self.path.write_text(first)

    def add(self, records: Iterable[Record]) -> None:
        with self.path.open("a", buffering=1) as file:  # a line at a time
            for record in records:
                if "features" in record:
                    record = {**record, "features": base64.b64encode(record["features"].numpy().tobytes()).decode()}
                file.write(json.dumps(record) + "\n")

    def records(self) -> Iterator[Record]:
        with self.path.open() as file:
            for line in islice(file, 1, None):
                record = json.loads(line)
                if "features" in record:
                    values = bytearray(base64.b64decode(record["features"]))
                    record["features"] = torch.frombuffer(values, dtype=torch.float32)
                yield record


def is_record(line: bytes) -> bool:
    """Whether a line of a `Part` is whole."""
    try:
        record = json.loads(line)
        base64.b64decode(record.get("features", ""), validate=True)
    except (ValueError, AttributeError, TypeError):
        return False
    return line.endswith(b"\n") and "image" in record


def readable(records: Iterable[Record], unreadable: list[str]) -> Iterator[Record]:
    """The records of images that could be read. Why others could not is added to `unreadable`."""
    for record in records:
        if "error" in record:
            unreadable.append(record["error"])
        else:
            yield record


def write(form: str, records: Iterator[Record], target: Path | TextIO) -> None:
    """Writes records to a file or to standard output. Those of a table, JSON and safetensors are held until the end."""
    if isinstance(target, Path) and form not in BINARY:
        # Names of files may be any bytes.
        with target.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            WRITERS[form](records, file)
    else:
        WRITERS[form](records, target)


def write_table(records: Iterator[Record], file: TextIO) -> None:
    table = [
        (record["image"], ", ".join(f"{top['class']} {top['probability']:.1%}" for top in record["classes"]))
        for record in records
    ]
    print(tabulate(table, headers=["image", "classes"]), file=file)


def write_json(records: Iterator[Record], file: TextIO) -> None:
    print(json.dumps(list(records), indent=1), file=file)


def write_jsonl(records: Iterator[Record], file: TextIO) -> None:
    for record in records:
        if "features" in record:
            record = {**record, "features": record["features"].tolist()}
        file.write(json.dumps(record) + "\n")


def rows(record: Record) -> list[dict[str, Any]]:
    """A row for each class."""
    return [{"image": record["image"], "rank": rank, **top} for rank, top in enumerate(record["classes"], start=1)]


def write_csv(records: Iterator[Record], file: TextIO) -> None:
    writer = csv.DictWriter(file, ["image", "rank", "class", "index", "probability"], lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerows(rows(record))


def write_parquet(records: Iterator[Record], path: Path) -> None:
    """Columns image and features (float32), or those of CSV."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "image": pyarrow.string(),
        "rank": pyarrow.int32(),
        "class": pyarrow.string(),
        "index": pyarrow.int32(),
        "probability": pyarrow.float32(),
    }
    first = next(records, None)
    if first is not None:
        records = chain([first], records)
        if "features" in first:
            columns = {"image": pyarrow.string(), "features": pyarrow.list_(pyarrow.float32(), len(first["features"]))}
    schema = pyarrow.schema(columns)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while group := list(islice(records, ROW_GROUP)):
            if "features" in group[0]:
                group = [{**record, "features": record["features"].numpy()} for record in group]
            else:
                group = [row for record in group for row in rows(record)]
            group = [{**row, "image": row["image"].encode(errors="backslashreplace").decode()} for row in group]
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


def write_features(records: Iterator[Record], path: Path) -> None:
    """The tensor "features" (N, D) in float32; the metadata has the images' names as JSON, "images"."""
    names, vectors = [], []
    for record in records:
        names.append(record["image"])
        vectors.append(record["features"])
    features = torch.stack(vectors) if vectors else torch.empty(0, 0)
    write_safetensors(path, {"features": features}, {"images": json.dumps(names)})


WRITERS: dict[str, Callable[[Iterator[Record], Any], None]] = {
    "table": write_table,
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
    "safetensors": write_features,
}
