"""Evaluates a detector of MMDetection or a segmentor of MMSegmentation.

    svit mm-test mask-rcnn_svit-s_fpn_1x_coco work_dirs/mask-rcnn_svit-s_fpn_1x_coco/epoch_12.pth
    svit mm-test svit-s_upernet_8xb2-160k_ade20k-512x512 iter_160000.pth --tta --out metrics.json
    svit mm-test retinanet_svit-nano_fpn_bccd retinanet_svit-nano_fpn_bccd
    torchrun --nproc-per-node 8 -m svit mm-test mask-rcnn_svit-s_fpn_1x_coco epoch_12.pth

CONFIG is a file or the name of one that comes with the package, and so is CHECKPOINT.
"""

import argparse
import json
import math
from pathlib import Path
from pickle import UnpicklingError

from mmengine.config import Config
from mmengine.runner import Runner

from svit.adapters.checkpoints import refuse_foreign_objects
from svit.adapters.checks import check_backbone, check_checkpoint, check_data
from svit.adapters.configs import load_config
from svit.errors import InputError
from svit.files import atomic_write

from .base import check_file, make_parser
from .mm_train import add_checkpoint, add_common_arguments, drop_start_weights, refusals_as_errors, start_processes


def parser() -> argparse.ArgumentParser:
    parser = make_parser("mm-test", __doc__)
    parser.add_argument("config", metavar="CONFIG")
    add_checkpoint(parser)
    parser.add_argument("--work-dir", metavar="DIR", help="logs; default: work_dirs/NAME_OF_CONFIG/test")
    parser.add_argument("--data-root", metavar="DIR", help="the data, in place of the config's data_root")
    parser.add_argument("--tta", action="store_true", help="several sizes and flips, if the config has tta_pipeline")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the metrics as JSON")
    add_common_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command_line = parser()
    args = command_line.parse_args(argv)
    check_file(command_line, "--out", args.out)
    refuse_foreign_objects()
    with refusals_as_errors(ValueError):
        config = load_config(args.config, args.cfg_options, args.data_root)
        config.work_dir = args.work_dir or str(Path("work_dirs", Path(args.config).stem, "test"))
        config.launcher = args.launcher
        config.load_from, config.resume = args.checkpoint, False
        drop_start_weights(config)
        check_backbone(config)
        check_checkpoint(config, args.checkpoint)
        if args.tta:
            check_tta(config)
            config.test_dataloader.dataset.pipeline = config.tta_pipeline
        check_data(config, "test")
        start_processes(config)
        if args.tta:
            config.model = dict(config.tta_model, module=config.model)
        runner = Runner.from_cfg(config)
    with refusals_as_errors(UnpicklingError):
        metrics = runner.test()
    if args.out and runner.rank == 0:
        with atomic_write(args.out) as part:
            # A class without objects has no AP: JSON knows no NaN.
            found = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
            part.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def check_tta(config: Config) -> None:
    if "tta_pipeline" not in config or "tta_model" not in config:
        raise InputError("--tta: the config has no tta_pipeline and tta_model")
