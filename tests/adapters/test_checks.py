import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from helpers import needs_mm

needs_mm()

from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from mm_data import ade_folder, coco_folder  # noqa: E402
from svit.adapters import ConfigError, TimmBackbone, load_config  # noqa: E402
from svit.adapters.checks import check_backbone, check_checkpoint, check_data  # noqa: E402
from svit.convert import CheckpointError  # noqa: E402


@pytest.fixture
def coco(tmp_path) -> Config:
    root = coco_folder(tmp_path / "coco")
    coin = {f"{split}_dataloader.dataset.metainfo.classes": ("coin",) for split in ("train", "val", "test")}
    heads = {f"model.roi_head.{head}.num_classes": 1 for head in ("bbox_head", "mask_head")}
    return load_config("mask-rcnn_svit-nano_fpn_1x_coco", {**coin, **heads}, str(root))


def test_good_data(coco, tmp_path):
    check_data(coco, "train", "val", "test")
    root = ade_folder(tmp_path / "ade")
    check_data(load_config("svit-nano_fpn_1xb8-4k_ade20k-256x256", data_root=str(root)), "train", "val", "test")


def annotations(config: Config) -> Path:
    return Path(config.data_root, "annotations/instances_train2017.json")


def rewrite(config: Config, change) -> None:
    file = annotations(config)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def cut(config: Config) -> None:
    annotations(config).write_text(annotations(config).read_text()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: Path(c.data_root).rename(c.data_root + "x"), "train_dataloader.dataset.data_root: no such folder"),
        (lambda c: Path(c.data_root, "train2017").rename(Path(c.data_root, "x")), "data_prefix.img: no such folder"),
        (lambda c: annotations(c).unlink(), "ann_file: no such file: .*instances_train2017.json"),
        (cut, "instances_train2017.json is not JSON"),
        (lambda c: annotations(c).write_bytes(b"\xff\xfe\x00"), "instances_train2017.json is not JSON"),
        (lambda c: annotations(c).write_text("[1]"), "COCO's format, it has no images, annotations, categories"),
        (lambda c: rewrite(c, lambda d: d.pop("categories")), "COCO's format, it has no categories"),
        (
            lambda c: rewrite(c, lambda d: d["categories"][0].update(name="dime")),
            "metainfo.classes: coin no category of .*instances_train2017.json, which has dime",
        ),
        (
            lambda c: c.model.roi_head.mask_head.update(num_classes=80),
            r"model.roi_head.mask_head.num_classes: expected 1, the classes of the data, got 80",
        ),
    ],
)
def test_bad_data(coco, damage, message):
    damage(coco)
    with pytest.raises(ConfigError, match=message):
        check_data(coco, "train", "val")


def test_evaluator_annotations(coco):
    Path(coco.data_root, "annotations/instances_val2017.json").unlink()
    with pytest.raises(ConfigError, match="no such file: .*instances_val2017.json"):
        check_data(coco, "val")


def test_folder_without_images(tmp_path):
    root = ade_folder(tmp_path / "ade")
    for file in (root / "images/training").iterdir():
        file.rename(file.with_suffix(".jpeg"))
    with pytest.raises(ConfigError, match=r"img_path: no file that ends in \.jpg in .*images/training"):
        check_data(load_config("svit-nano_fpn_1xb8-4k_ade20k-256x256", data_root=str(root)), "train")


def test_check_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("svit-l_upernet_8xb2-160k_ade20k-512x512")
    with pytest.raises(CheckpointError, match=r"pretrained/svit_large.in1k.safetensors: .*stvit-large-224.pth"):
        check_backbone(config)
    Path("pretrained").mkdir()
    weights = timm.create_model("test_svit").state_dict()
    safetensors.torch.save_file(weights, "pretrained/svit_large.in1k.safetensors")
    with pytest.raises(CheckpointError, match="is not of svit_large; .*other shapes"):
        check_backbone(config)
    config.model.backbone.arch = "test_svit"
    check_backbone(config)
    config.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="https://example.org/later.pth")
    check_backbone(config)  # fetched when training starts, not now
    config.model.backbone.init_cfg = None
    check_backbone(config)
    config.model.backbone.arch = "svit_huge"
    with pytest.raises(ValueError, match="^arch: no model 'svit_huge' in timm"):
        check_backbone(config)
    config.model.backbone = dict(type="ResNet", depth=18)
    check_backbone(config)


@pytest.mark.parametrize("kind", ["TimmBackbone", TimmBackbone])
def test_misspelt_argument(kind):
    config = Config(dict(model=dict(backbone=dict(type=kind, arch="test_svit", out_indeces=(1,)))))
    with pytest.raises(ConfigError, match=r"model.backbone: .*unexpected keyword argument 'out_indeces'"):
        check_backbone(config)


def test_check_checkpoint(tmp_path):
    """A checkpoint of a whole model: all of it, or the backbone where the heads may differ."""
    config = load_config("svit-nano_fpn_1xb8-1k_camvid-256x256")
    weights = revert_sync_batchnorm(MODELS.build(config.model)).state_dict()
    file = str(tmp_path / "model.pth")
    torch.save({"state_dict": weights}, file)
    check_checkpoint(config, file)
    other = load_config("svit-nano_fpn_1xb8-4k_ade20k-256x256")  # 150 classes
    with pytest.raises(CheckpointError, match=r"is not of this config's model; other shapes: 2 \(decode_head.conv_seg"):
        check_checkpoint(other, file)
    check_checkpoint(other, file, backbone_only=True)
    other.model.backbone.arch = "svit_tiny"
    with pytest.raises(CheckpointError, match="is not of this config's backbone; missing keys"):
        check_checkpoint(other, file, backbone_only=True)
    torch.save(timm.create_model("svit_nano").state_dict(), file)
    for backbone_only in (False, True):
        with pytest.raises(CheckpointError, match="missing keys"):
            check_checkpoint(config, file, backbone_only)
    with pytest.raises(CheckpointError, match="none.pth: no such checkpoint"):
        check_checkpoint(config, "none.pth")


def test_heads_of_other_classes_are_left_alone(coco):
    coco.model.roi_head.semantic_head = dict(type="FusedSemanticHead", num_classes=183)
    check_data(coco, "train")
    coco.model.roi_head.bbox_head = [dict(num_classes=1), dict(num_classes=2)]
    with pytest.raises(ConfigError, match=r"model.roi_head.bbox_head.1.num_classes: expected 1, .* got 2"):
        check_data(coco, "train")
