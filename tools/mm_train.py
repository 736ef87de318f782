"""Trains a detector of MMDetection or a segmentor of MMSegmentation from a config.

    python tools/mm_train.py mask-rcnn_svit-s_fpn_1x_coco --data-root data/coco
    python tools/mm_train.py mm_configs/mmseg/svit-s_upernet_8xb2-160k_ade20k-512x512.py --amp --resume
    torchrun --nproc-per-node 8 tools/mm_train.py mask-rcnn_svit-s_fpn_1x_coco

CONFIG is a file or the name of one that comes with the package. One command serves a CPU, a GPU, many GPUs and many
machines (torchrun's --nnodes and --rdzv-endpoint). docs/detection.md and docs/segmentation.md tell more.
"""

import argparse
import os
import sys
from pathlib import Path
from pickle import UnpicklingError

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner, find_latest_checkpoint

import processes
from svit.adapters.checkpoints import refuse_foreign_objects
from svit.adapters.checks import check_backbone, check_checkpoint, check_data
from svit.adapters.configs import ConfigError, fit_to_machine, load_config
from svit.adapters.images import ImageError
from svit.convert import CheckpointError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument(
        "--amp",
        metavar="DTYPE",
        nargs="?",
        const="float16",
        choices=["float16", "bfloat16"],
        help="mixed precision, on a GPU: float16 (default) or bfloat16",
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the rate with the batch of all processes")
    add_common_arguments(parser)
    args = parser.parse_args(argv)
    refuse_foreign_objects()
    try:
        config = load_config(args.config, args.cfg_options, args.data_root)
        config.work_dir = args.work_dir or config.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
        config.launcher = args.launcher
        set_resume(config, args.resume)
        if args.amp:
            use_amp(config, args.amp)
        if args.auto_scale_lr:
            if "base_batch_size" not in config.get("auto_scale_lr", {}):
                raise ConfigError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
            config.auto_scale_lr.enable = True
        if config.get("load_from"):
            check_checkpoint(config, config.load_from, backbone_only=not config.resume)
            drop_start_weights(config)
        check_backbone(config)
        check_data(config, "train", "val")
        start_processes(config)
        runner = Runner.from_cfg(config)
    except ValueError as error:
        return failed(error)
    try:
        runner.train()
    except (CheckpointError, ImageError, UnpicklingError) as error:
        return failed(error)
    return 0


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What training and testing both take."""
    parser.add_argument(
        "--cfg-options",
        metavar="KEY=VALUE",
        nargs="+",
        action=DictAction,
        help="values to replace in the config, such as train_dataloader.batch_size=4",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none",
        help="what started the processes; default: pytorch under torchrun, else none",
    )


def set_resume(config: Config, resume: str | None) -> None:
    """Where to go on from; a work dir that holds another run is left alone."""
    taken = Path(config.work_dir, "last_checkpoint").exists()
    if resume == "auto":
        if taken:
            config.resume, config.load_from = True, find_latest_checkpoint(config.work_dir)
        return
    if resume is not None:
        config.resume, config.load_from = True, resume
        taken = taken and Path(resume).resolve().parent != Path(config.work_dir).resolve()
    if taken and (resume is not None or not config.get("resume")):
        raise ConfigError(f"--work-dir: {config.work_dir} holds a run already; go on with --resume or name another")


def use_amp(config: Config, dtype: str) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("--amp: mmengine's mixed precision needs a GPU")
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


def failed(error: Exception) -> int:
    """Says what is wrong; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    processes.run(main)
