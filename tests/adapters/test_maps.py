"""Necks and heads that contradict the backbone's maps are refused with what they should say; all else passes."""

import re
from pathlib import Path

import pytest
import torch

from helpers import needs_mm

needs_mm()

from mmengine.config import Config  # noqa: E402

from svit.adapters import ConfigError, TimmBackbone, load_config  # noqa: E402
from svit.adapters.maps import check_maps  # noqa: E402

FOLDER = Path(__file__).parents[2] / "mm_configs"
FILES = sorted(path for kind in ("mmdet", "mmseg") for path in (FOLDER / kind).glob("*.py"))


def check(config: Config) -> None:
    arguments = dict(config.model.backbone, init_cfg=None)
    del arguments["type"]
    with torch.device("meta"):
        check_maps(config.model, TimmBackbone(**arguments))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_configs_that_come_with_the_package(file):
    check(load_config(str(file)))


SMALL = {"model.backbone.arch": "test_svit"}  # maps of 8, 16, 24 and 32 channels
MASK_RCNN = ("mask-rcnn_svit-nano_fpn_1x_coco", {**SMALL, "model.neck.in_channels": [8, 16, 24, 32]})
CASCADE = (
    "cascade-mask-rcnn_svit-s_fpn_ms-3x_coco",
    {**SMALL, "model.neck.in_channels": [8, 16, 24, 32], "model.backbone.stoken_size": None},
)
RETINA = (
    "retinanet_svit-s_fpn_1x_coco",
    {**SMALL, "model.neck.in_channels": [16, 24, 32], "model.backbone.stoken_size": None},
)
FPN = ("svit-nano_fpn_1xb8-1k_camvid-256x256", {**SMALL, "model.neck.in_channels": [8, 16, 24, 32]})
UPERNET = (
    "svit-s_upernet_8xb2-160k_ade20k-512x512",
    {
        **SMALL,
        "model.backbone.stoken_size": None,
        "model.decode_head.in_channels": [8, 16, 24, 32],
        "model.auxiliary_head.in_channels": 24,
    },
)


@pytest.mark.parametrize("base", [MASK_RCNN, CASCADE, RETINA, FPN, UPERNET], ids=lambda base: base[0])
def test_smallest_backbone(base):
    check(load_config(*base))


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (
            MASK_RCNN,
            {"backbone.out_indices": (1, 2, 3)},
            "neck.in_channels: expected [16, 24, 32], the channels of test_svit's maps 1, 2, 3, got [8, 16, 24, 32]",
        ),
        (
            MASK_RCNN,
            {"neck.in_channels": [24, 48, 96, 160]},
            "neck.in_channels: expected [8, 16, 24, 32], the channels of test_svit's maps 0, 1, 2, 3, got [24, 48, 96",
        ),
        (MASK_RCNN, {"neck.num_outs": 3}, "neck.num_outs: expected 4 or more, one a map, got 3"),
        (MASK_RCNN, {"neck.type": "FNP"}, "neck: cannot be built (KeyError: 'FNP"),
        (
            MASK_RCNN,
            {"rpn_head.in_channels": 256},
            "rpn_head.in_channels: expected 64, the channels of the neck's maps, got 256",
        ),
        (
            MASK_RCNN,
            {"rpn_head.anchor_generator.strides": [8, 16, 32, 64, 128]},
            "rpn_head: expected anchors or points of the strides [4, 8, 16, 32, 64], those of the neck's maps, got [8",
        ),
        (MASK_RCNN, {"neck.num_outs": 4}, "rpn_head: expected anchors or points of the strides [4, 8, 16, 32], those"),
        (
            MASK_RCNN,
            {"roi_head.bbox_roi_extractor.featmap_strides": [8, 16, 32]},
            "roi_head.bbox_roi_extractor.featmap_strides: expected [4, 8, 16, 32, 64], of the neck's maps, or the "
            "first of them, got [8, 16, 32]",
        ),
        (
            MASK_RCNN,
            {"roi_head.mask_roi_extractor.featmap_strides": [4, 8, 16, 32, 64, 128]},
            "roi_head.mask_roi_extractor.featmap_strides: expected [4, 8, 16, 32, 64]",
        ),
        (
            MASK_RCNN,
            {"roi_head.mask_roi_extractor.out_channels": 256},
            "roi_head.mask_roi_extractor.out_channels: expected 64, the channels of the neck's maps, got 256",
        ),
        (
            MASK_RCNN,
            {"roi_head.bbox_head.in_channels": 256},
            "roi_head.bbox_head.in_channels: expected 64, as bbox_roi_extractor.out_channels, got 256",
        ),
        (
            CASCADE,
            {"roi_head.mask_head.in_channels": 64},
            "roi_head.mask_head.in_channels: expected 256, as mask_roi_extractor.out_channels, got 64",
        ),
        (CASCADE, {"neck.out_channels": 64}, "rpn_head.in_channels: expected 64, the channels of the neck's maps, got"),
        (
            RETINA,
            {"backbone.out_indices": (0, 1, 2, 3)},
            "neck.in_channels: expected [8, 16, 24, 32], the channels of test_svit's maps 0, 1, 2, 3, got [16, 24, 32]",
        ),
        (
            RETINA,
            {"backbone.out_indices": (0, 1, 2, 3), "neck.in_channels": [8, 16, 24, 32]},
            "bbox_head: expected anchors or points of the strides [4, 8, 16, 32, 64], those of the neck's maps, got [8",
        ),
        (
            FPN,
            {"decode_head.in_channels": [64, 64, 64, 32]},
            "decode_head.in_channels: expected [64, 64, 64, 64], the channels of the neck's maps, got [64, 64, 64, 32]",
        ),
        (
            FPN,
            {"decode_head.in_index": [0, 1, 2, 4]},
            "decode_head.in_index: expected numbers of the neck's maps, below 4, got [0, 1, 2, 4]",
        ),
        (
            UPERNET,
            {"backbone.out_indices": (1, 2, 3)},
            "decode_head.in_index: expected numbers of test_svit's maps 1, 2, 3, below 3, got [0, 1, 2, 3]",
        ),
        (
            UPERNET,
            {"decode_head.in_channels": [96, 192, 448, 640]},
            "decode_head.in_channels: expected [8, 16, 24, 32], the channels of test_svit's maps 0, 1, 2, 3, got [96",
        ),
        (
            UPERNET,
            {"auxiliary_head.in_channels": 32},
            "auxiliary_head.in_channels: expected 24, the channels of test_svit's maps 0, 1, 2, 3, got 32",
        ),
        (UPERNET, {"auxiliary_head.in_index": 4}, "auxiliary_head.in_index: expected numbers of test_svit's maps"),
    ],
)
def test_refused(base, options, message):
    name, fitting = base
    config = load_config(name, {**fitting, **{f"model.{key}": value for key, value in options.items()}})
    with pytest.raises(ConfigError, match=re.escape(f"model.{message}")):
        check(config)


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (
            MASK_RCNN,
            {
                "backbone.out_indices": (1, 2, 3),
                "neck.in_channels": [16, 24, 32],
                "rpn_head.anchor_generator.strides": [8, 16, 32, 64, 128],
                "roi_head.bbox_roi_extractor.featmap_strides": [8, 16, 32],
                "roi_head.mask_roi_extractor.featmap_strides": [8, 16, 32],
            },
        ),
        (MASK_RCNN, {"roi_head.mask_roi_extractor.featmap_strides": [4]}),
        (
            MASK_RCNN,
            {"neck.start_level": 1, "neck.num_outs": 4, "rpn_head.anchor_generator.strides": [8, 16, 32, 64]}
            | {f"roi_head.{kind}_roi_extractor.featmap_strides": [8, 16, 32] for kind in ("bbox", "mask")},
        ),
        (UPERNET, {"auxiliary_head.in_index": -1, "auxiliary_head.in_channels": 32}),
        (UPERNET, {"decode_head.in_index": [1, 2, 3], "decode_head.in_channels": [16, 24, 32]}),
        (UPERNET, {"auxiliary_head": None}),
    ],
)
def test_passes(base, options):
    name, fitting = base
    check(load_config(name, {**fitting, **{f"model.{key}": value for key, value in options.items()}}))


def test_several_necks_and_heads():
    """Each neck takes the maps of the one before; of several auxiliary heads the one that is wrong is named."""
    config = load_config(*FPN)
    config.model.neck = [dict(config.model.neck), dict(type="FPN", in_channels=[32] * 4, out_channels=64, num_outs=4)]
    with pytest.raises(ConfigError, match=r"neck.1.in_channels: expected \[64, .* the maps of model.neck.0, got \[32"):
        check(config)
    config.model.neck[1]["in_channels"] = [64] * 4
    config.model.neck[1]["out_channels"] = 32
    with pytest.raises(ConfigError, match=r"decode_head.in_channels: expected \[32, 32, 32, 32\], the channels of"):
        check(config)
    config = load_config(*UPERNET)
    config.model.auxiliary_head = [dict(config.model.auxiliary_head), dict(config.model.auxiliary_head, in_index=3)]
    with pytest.raises(ConfigError, match=r"auxiliary_head.1.in_channels: expected 32, .*, got 24"):
        check(config)


def test_more_outputs_than_maps():
    """Each is half as large as the one before; the smallest has one pixel."""
    strides = [4, 8, 16, 32, 64, 128, 256]
    options = {"model.neck.num_outs": 7, "model.rpn_head.anchor_generator.strides": strides}
    check(load_config(MASK_RCNN[0], {**MASK_RCNN[1], **options}))
