"""Trains a detector of MMDetection or a segmentor of MMSegmentation from a config.

    svit mm-train mask-rcnn_svit-s_fpn_1x_coco --data-root data/coco
    svit mm-train svit-s_upernet_8xb2-160k_ade20k-512x512 --amp --resume
    torchrun --nproc-per-node 8 -m svit mm-train mask-rcnn_svit-s_fpn_1x_coco

CONFIG is a file or the name of one that comes with the package. One command serves a CPU, a GPU, many GPUs and many
machines (torchrun's --nnodes and --rdzv-endpoint).
"""

import argparse
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from svit import processes
from svit.adapters.checkpoints import find_checkpoint, refuse_foreign_objects
from svit.adapters.checks import check_backbone, check_checkpoint, check_data
from svit.adapters.configs import fit_to_machine, load_config
from svit.adapters.saving import BuffersHook, SeedHook, StopHook, Stopped, seed_epochs
from svit.errors import InputError

from .base import add_amp, make_parser


def parser() -> argparse.ArgumentParser:
    parser = make_parser("mm-train", __doc__)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--work-dir", metavar="DIR", help="logs and checkpoints; default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument("--data-root", metavar="DIR", help="the data, in place of the config's data_root")
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        nargs="?",
        const="auto",
        help="go on from a checkpoint; without one named: from the newest in the work dir, from the start if none is",
    )
    add_amp(parser, nargs="?", const="float16", help="mixed precision, on a GPU: float16 (fp16, default) or bfloat16")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the rate with the batch of all processes")
    add_common_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 143 after SIGTERM, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    refuse_foreign_objects()
    with refusals_as_errors(ValueError, AssertionError):
        config = load_config(args.config, args.cfg_options, args.data_root)
        config.work_dir = args.work_dir or config.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
        config.launcher = args.launcher
        set_resume(config, args.resume)
        guard_checkpoints(config)
        by_epoch = seed_epochs(config)
        if args.amp:
            use_amp(config, args.amp)
        if args.auto_scale_lr:
            if "base_batch_size" not in config.get("auto_scale_lr", {}):
                raise InputError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
            config.auto_scale_lr.enable = True
        if config.get("load_from"):
            check_checkpoint(config, config.load_from, not config.resume, bool(config.resume))
            drop_start_weights(config)
        check_backbone(config)
        check_data(config, "train", "val")
        start_processes(config)
        runner = Runner.from_cfg(config)
        # Now, where a wrong number is a message, and not in `train`.
        runner.train_loop  # noqa: B018  # the property builds it
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    try:
        with processes.stop_signals() as signals, refusals_as_errors(UnpicklingError):
            runner.register_hook(StopHook(signals))
            runner.register_hook(BuffersHook())
            if by_epoch:
                runner.register_hook(SeedHook())
            runner.train()
    except Stopped as stopped:
        if is_main_process():
            newest = find_newest(config)
            left = f"--resume goes on from {newest}" if newest else "there is no checkpoint yet"
            print(f"{stopped.signal.name}: ended after an iteration; {left}")
        return 128 + stopped.signal
    return 0


class Options(DictAction):  # type: ignore[misc]
    """--cfg-options, and a message of what is none."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        wrong = next((value for value in values if "=" not in value), None)
        if wrong is not None:
            raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {wrong}")
        super().__call__(parser, namespace, values, option)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What training and testing both take."""
    parser.add_argument(
        "--cfg-options",
        metavar="KEY=VALUE",
        nargs="+",
        action=Options,
        help="values to replace in the config, such as train_dataloader.batch_size=4",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none",
        help="what started the processes; default: pytorch under torchrun, else none",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """What testing and inference run."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=find_checkpoint,
        help="of the whole model: a file, or the name of one of the package",
    )


def set_resume(config: Config, resume: str | None) -> None:
    """Where to go on from; a work dir that holds another run is left alone."""
    newest = find_newest(config)
    if resume is None and config.get("resume") and not config.get("load_from"):
        resume = "auto"
    if resume == "auto":
        if newest is not None:
            config.resume, config.load_from = True, newest
        return
    taken = newest is not None
    if resume is not None:
        config.resume, config.load_from = True, resume
        taken = newest is not None and Path(resume).resolve().parent != Path(newest).resolve().parent
    if taken and (resume is not None or not config.get("resume")):
        raise InputError(f"--work-dir: {config.work_dir} holds a run already; go on with --resume or name another")


def find_newest(config: Config) -> str | None:
    """The newest checkpoint of the run in the work dir.

    mmengine writes down its whole path, which after the folder was moved or copied is another run's, or nobody's: the
    name alone counts. Where that was not written whole, the newest file that was counts.
    """
    folder, pointer = Path(config.work_dir), Path(config.work_dir, "last_checkpoint")
    stored = pointer.read_text().strip() if pointer.is_file() else ""
    if "://" in stored:
        return stored
    hook = (config.get("default_hooks") or {}).get("checkpoint")
    out = hook.get("out_dir") if isinstance(hook, dict) else None
    if out and Path(out) != folder:
        folder = Path(out, folder.name)
    if stored:
        return str(folder / Path(stored).name)
    numbers = {path: re.fullmatch(r"(?:epoch|iter)_(\d+)", path.stem) for path in folder.glob("*.pth")}
    whole = {path: int(number[1]) for path, number in numbers.items() if number and zipfile.is_zipfile(path)}
    return str(max(whole, key=lambda path: whole[path])) if whole else None


def guard_checkpoints(config: Config) -> None:
    """Puts FiniteCheckpointHook in the place of mmengine's hook, wherever that is what the config has."""
    hooks = dict(config.get("default_hooks") or {})
    hook = hooks.get("checkpoint", {"type": "CheckpointHook", "interval": 1})  # what mmengine adds by itself
    if isinstance(hook, dict) and hook.get("type") in ("CheckpointHook", "mmengine.CheckpointHook", CheckpointHook):
        config.default_hooks = {**hooks, "checkpoint": {**hook, "type": "FiniteCheckpointHook"}}


def use_amp(config: Config, dtype: str) -> None:
    if not torch.cuda.is_available():
        raise InputError("--amp: mmengine's mixed precision needs a GPU")
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.dtype = dtype
    config.optim_wrapper.loss_scale = "dynamic"


def drop_start_weights(config: Config) -> None:
    """A checkpoint of the whole model needs none that the backbone alone would start from."""
    if config.model.get("backbone", {}).get("init_cfg"):
        config.model.backbone.init_cfg = None


def start_processes(config: Config) -> None:
    """Fits the config to the machine. On a CPU the processes meet here: mmengine asks for a GPU to do so."""
    fit_to_machine(config)
    if config.launcher == "pytorch" and not torch.cuda.is_available() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")


@contextmanager
def refusals_as_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Exceptions of these kinds, which mmengine raises of configs and files, are InputErrors."""
    try:
        yield
    except kinds as error:
        raise InputError(str(error) or type(error).__name__) from error
