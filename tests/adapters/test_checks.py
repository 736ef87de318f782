import json
import os
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from helpers import needs_mm

needs_mm()

from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import DATASETS, MODELS  # noqa: E402

from mm_data import ade_folder, coco_folder  # noqa: E402
from svit.adapters import ConfigError, TimmBackbone, load_config  # noqa: E402
from svit.adapters.checks import check_backbone, check_checkpoint, check_data  # noqa: E402
from svit.adapters.configs import fit_to_machine  # noqa: E402
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
    with pytest.raises(ConfigError, match=r"decode_head.in_channels: expected \[8, 16, 24, 32\], .* test_svit's maps"):
        check_backbone(config)
    config.model.decode_head.in_channels = [8, 16, 24, 32]
    config.model.auxiliary_head.in_channels = 24
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
    lost = {**weights, "decode_head.conv_seg.bias": torch.full_like(weights["decode_head.conv_seg.bias"], torch.nan)}
    torch.save({"state_dict": lost}, file)
    with pytest.raises(CheckpointError, match=f"{file} holds numbers that are not finite, in decode_head.conv_seg.bia"):
        check_checkpoint(config, file)
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


def test_a_training_goes_on_from_its_state_alone(tmp_path):
    config = load_config("svit-nano_fpn_1xb8-1k_camvid-256x256")
    weights = revert_sync_batchnorm(MODELS.build(config.model)).state_dict()
    file = str(tmp_path / "model.pth")
    torch.save({"state_dict": weights, "meta": {"epoch": 3, "iter": 30}}, file)
    check_checkpoint(config, file, resumes=True)
    for content in (weights, {"state_dict": weights}, {"state_dict": weights, "meta": {"dataset_meta": {}}}):
        torch.save(content, file)
        check_checkpoint(config, file)
        with pytest.raises(CheckpointError, match="model.pth: holds no state of a training to go on from; set load_"):
            check_checkpoint(config, file, resumes=True)


def test_heads_of_other_classes_are_left_alone(coco):
    coco.model.roi_head.semantic_head = dict(type="FusedSemanticHead", num_classes=183)
    check_data(coco, "train")
    coco.model.roi_head.bbox_head = [dict(num_classes=1), dict(num_classes=2)]
    with pytest.raises(ConfigError, match=r"model.roi_head.bbox_head.1.num_classes: expected 1, .* got 2"):
        check_data(coco, "train")


def segmentor(root: Path) -> Config:
    return load_config("svit-nano_fpn_1xb8-4k_ade20k-256x256", {"work_dir": str(root / "work")}, str(root))


def found_by_mmseg(config: Config, split: str) -> list[str]:
    """Names of the images that the data set reads, below its folder."""
    dataset = DATASETS.build(config[f"{split}_dataloader"].dataset)
    folder = dataset.data_prefix["img_path"]
    return sorted(os.path.relpath(dataset.get_data_info(i)["img_path"], folder) for i in range(len(dataset)))


def test_linked_folders(tmp_path):
    """MMSegmentation follows links to folders; so does the check, which counts no image twice or not at all."""
    root = ade_folder(tmp_path / "ade")
    for kind in ("images", "annotations"):
        folder = root / kind / "training"
        folder.rename(tmp_path / kind)
        folder.mkdir()
        (folder / "town").symlink_to(tmp_path / kind)
    config = segmentor(root)
    check_data(config, "train")
    assert found_by_mmseg(config, "train") == [f"town/{i}.jpg" for i in range(8)]
    (tmp_path / "images/x.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(ConfigError, match="img_path: links that lead nowhere, .*: .*training/town/x.jpg"):
        check_data(segmentor(root), "train")
    (tmp_path / "images/x.jpg").unlink()
    (tmp_path / "images/again").symlink_to(tmp_path / "images")
    with pytest.raises(ConfigError, match="img_path: .* holds a link to a folder that holds it, which MMSeg"):
        check_data(segmentor(root), "train")


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX"])
def test_hidden_folders(tmp_path, name):
    """MMSegmentation would train on what is in them, unless a file lists the images."""
    root = ade_folder(tmp_path / "ade")
    for kind in ("images", "annotations"):
        (root / kind / "training" / name).mkdir()
    (root / "annotations/training" / name / "0.png").touch()  # masks go by the images' names
    config = segmentor(root)
    check_data(config, "train")
    assert found_by_mmseg(config, "train") == [f"{i}.jpg" for i in range(8)]
    shutil.copy(root / "images/training/0.jpg", root / "images/training" / name)
    message = f"img_path: MMSegmentation would read 1 files in folders of .*/training .*: {name}/0.jpg. Remove them"
    with pytest.raises(ConfigError, match=message):
        check_data(segmentor(root), "train")
    (root / "list.txt").write_text("0\n3\n")
    config = segmentor(root)
    config.train_dataloader.dataset.ann_file = "list.txt"
    check_data(config, "train")
    assert found_by_mmseg(config, "train") == ["0.jpg", "3.jpg"]
    for change, message in ((lambda f: f.write_text(""), "lists no images"), (Path.unlink, "no such file")):
        change(root / "list.txt")
        with pytest.raises(ConfigError, match=f"train_dataloader.dataset.ann_file: .*{message}"):
            check_data(config, "train")


def test_images_of_another_suffix(tmp_path):
    root = ade_folder(tmp_path / "ade")
    for i in (1, 2):
        Path(root, f"images/training/{i}.jpg").rename(root / f"images/training/{i}.JPG")
    with pytest.warns(UserWarning, match=r"2 images in .*training do not end in img_suffix='.jpg' .*: 1.JPG, 2.JPG"):
        check_data(segmentor(root), "train")


@pytest.mark.parametrize("absent", ["folder", "files", "prefix"])
@pytest.mark.parametrize("tta", [False, True], ids=["", "tta"])
def test_test_split_without_masks(tmp_path, absent, tta):
    """The evaluator writes its predictions; every image is loaded, without a mask. The other splits need theirs."""
    root = ade_folder(tmp_path / "ade")
    config = segmentor(root)
    config.work_dir = str(tmp_path / "work")
    if absent == "prefix":
        config.test_dataloader.dataset.data_prefix = dict(img_path="images/validation")
    else:
        shutil.rmtree(root / "annotations/validation")
    if absent == "files":
        (root / "annotations/validation").mkdir()
    if tta:
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
    with pytest.warns(UserWarning, match="has no annotations: results are written to .*/work/results, no metrics"):
        check_data(config, "test")
    assert config.test_evaluator.format_only
    assert config.test_evaluator.output_dir == str(tmp_path / "work/results")
    dataset = DATASETS.build(config.test_dataloader.dataset)
    assert len(dataset) == 4
    samples = dataset[0]["data_samples"]
    assert not any("gt_sem_seg" in sample for sample in (samples if tta else [samples]))
    if absent == "folder":
        with pytest.raises(ConfigError, match="val_dataloader.*seg_map_path: no such folder: .*annotations/validation"):
            check_data(segmentor(root), "val")
    if absent == "files":
        with pytest.raises(ConfigError, match=r"seg_map_path: no file that ends in .png in .*annotations/validation"):
            check_data(segmentor(root), "val")


def test_results_that_would_replace_each_other(tmp_path):
    """IoUMetric names them after the images alone."""
    root = ade_folder(tmp_path / "ade")
    shutil.rmtree(root / "annotations/validation")
    for town in ("a", "b"):
        (root / "images/validation" / town).mkdir()
        shutil.copy(root / "images/validation/8.jpg", root / "images/validation" / town / "x.jpg")
    with pytest.raises(ConfigError, match="several images have the same name, x; the results of one would"):
        check_data(segmentor(root), "test")


def test_other_evaluators_need_annotations(tmp_path):
    root = ade_folder(tmp_path / "ade")
    shutil.rmtree(root / "annotations/validation")
    config = segmentor(root)
    config.test_evaluator = dict(type="CityscapesMetric", output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="test_evaluator: CityscapesMetric needs annotations, .*validation has none"):
        check_data(config, "test")


def test_mask_checks(tmp_path):
    """One behind each LoadAnnotations, in test-time augmentation too, however often the config is looked at."""
    config = segmentor(ade_folder(tmp_path / "ade"))
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    config.model.decode_head.ignore_index = 7
    for _ in range(2):
        check_data(config, "train", "test")
    (_, load, check, *_) = config.train_dataloader.dataset.pipeline
    assert (load["type"], check) == ("LoadAnnotations", dict(type="CheckMask", num_classes=150, ignore_index=7))
    assert config.train_dataloader.dataset.ignore_index == 7
    transforms = config.test_dataloader.dataset.pipeline[1]["transforms"]  # a list of alternatives for each step
    assert [[step["type"] for step in choice] for choice in transforms[2:]] == [
        ["LoadAnnotations"],
        ["CheckMask"],
        ["PackSegInputs"],
    ]
    samples = DATASETS.build(config.test_dataloader.dataset)[0]["data_samples"]
    assert len(samples) == 6
    assert all("gt_sem_seg" in sample for sample in samples)
    assert str(config.train_dataloader.dataset.pipeline).count("CheckMask") == 1


def test_config_without_env_cfg(coco, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for missing in (True, False):
        coco.pop("env_cfg", None)
        if not missing:
            coco.env_cfg = None
        fit_to_machine(coco)
        assert coco.env_cfg == dict(dist_cfg=dict(backend="gloo"))
    check_data(coco, "train")


def test_data_set_of_several(coco):
    """The annotations of each part are looked at."""
    part = coco.train_dataloader.dataset
    other = deepcopy(part)
    other.ann_file = "annotations/other.json"
    coco.train_dataloader.dataset = dict(
        type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[part, other])
    )
    with pytest.raises(ConfigError, match="no such file: .*other.json"):
        check_data(coco, "train")
    Path(coco.data_root, "annotations/other.json").write_text(annotations(coco).read_text())
    check_data(coco, "train")
