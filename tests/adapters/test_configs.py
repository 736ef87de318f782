import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import needs_mm

needs_mm()

from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402
from mmengine.structures import InstanceData, PixelData  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

from svit.adapters import ConfigError, config_names, find_config, load_config  # noqa: E402
from svit.adapters.configs import fit_to_machine  # noqa: E402

FOLDER = Path(__file__).parents[2] / "mm_configs"
FILES = sorted(path for kind in ("mmdet", "mmseg") for path in (FOLDER / kind).glob("*.py"))
PUBLISHED = [file for file in FILES if re.search("svit-[sbl]_", file.name)]
TINY = {"arch": "test_svit", "init_cfg": None, "drop_path_rate": 0.0}
# The paper's tables, as the headers quote them.
PAPER = {
    "mask-rcnn_svit_fpn_1x_coco": {
        "small": "47.6 box AP, 43.1 mask AP, 252 GFLOPs at 800 x 1280",
        "base": "49.7 box AP, 44.8 mask AP, 359 GFLOPs at 800 x 1280",
        "large": "50.8 box AP, 45.5 mask AP, 470 GFLOPs at 800 x 1280",
    },
    "mask-rcnn_svit_fpn_ms-3x_coco": {
        "small": "49.2 box AP, 44.2 mask AP, 252 GFLOPs at 800 x 1280",
        "base": "51.0 box AP, 45.4 mask AP, 359 GFLOPs at 800 x 1280",
        "large": "51.7 box AP, 45.9 mask AP, 470 GFLOPs at 800 x 1280",
    },
    "cascade-mask-rcnn_svit_fpn_ms-3x_coco": {"base": "53.9 box AP, 46.8 mask AP, 837 GFLOPs at 800 x 1280"},
    "svit_upernet_8xb2-160k_ade20k-512x512": {
        "small": "48.6 mIoU at one scale, 49.0 at several (mm_test.py --tta), 926 GFLOPs at 512 x 2048",
        "base": "50.7 mIoU at one scale, 51.9 at several (mm_test.py --tta), 1036 GFLOPs at 512 x 2048",
        "large": "52.4 mIoU at one scale, 53.2 at several (mm_test.py --tta), 1151 GFLOPs at 512 x 2048",
    },
}
WIDTHS = {"svit_small": (64, 128, 320, 512), "svit_base": (96, 192, 384, 512), "svit_large": (96, 192, 448, 640)}


def config_of(file: Path) -> Config:
    """A config that runs on this machine, from random weights."""
    config = load_config(str(file))
    fit_to_machine(config)
    return config


def shrink(config: Config) -> None:
    """The smallest SViT in place of the backbone."""
    widths = (8, 16, 24, 32)
    indices = config.model.backbone.get("out_indices", (0, 1, 2, 3))
    if config.model.backbone.arch == "resnet18":
        indices = [i - 1 for i in indices]
    config.model.backbone.update(TINY, out_indices=tuple(indices))
    widths = [widths[i] for i in indices]
    if "neck" in config.model:
        config.model.neck.in_channels = widths
    else:
        config.model.decode_head.in_channels = widths
        config.model.auxiliary_head.in_channels = widths[2]


def detection_sample(size: tuple[int, int]) -> DetDataSample:
    h, w = size
    masks = np.zeros((2, h, w), np.uint8)
    masks[0, 10:40, 10:50] = 1
    masks[1, 20:60, 40:90] = 1
    instances = InstanceData(
        bboxes=torch.tensor([[10.0, 10, 50, 40], [40, 20, 90, 60]]),
        labels=torch.tensor([0, 1]),
        masks=BitmapMasks(masks, h, w),
    )
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    return DetDataSample(metainfo=meta, gt_instances=instances)


def run(config: Config, size: tuple[int, int] = (64, 96)) -> None:
    """The loss of two images with its gradients, and a prediction."""
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    detects = config.default_scope == "mmdet"
    if not detects:
        size = model.data_preprocessor.size = (64, 64)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in range(2)]
    if detects:
        samples = [detection_sample(size) for _ in images]
    else:
        masks = [torch.arange(size[0] * size[1]).view(1, *size) // 100 % 3 for _ in images]
        samples = [SegDataSample(gt_sem_seg=PixelData(data=mask), metainfo=dict(img_shape=size)) for mask in masks]
    model.train()
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    loss, logs = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    assert {"loss_cls", "decode.loss_ce", "s0.loss_cls"} & set(logs)
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.model.stem.parameters())

    model.eval()
    with torch.no_grad():
        if detects:
            data = model.data_preprocessor(dict(inputs=images[:1], data_samples=samples[:1]), training=False)
            (result,) = model(**data, mode="predict")
            found = result.pred_instances
            assert found.bboxes.shape == (len(found.labels), 4)
            assert not hasattr(model, "roi_head") or found.masks.shape[1:] == size
        else:
            meta = dict(img_shape=size, ori_shape=(50, 70), pad_shape=size)
            data = dict(inputs=images[:1], data_samples=[SegDataSample(metainfo=meta)])
            data = model.data_preprocessor(data, training=False)
            (result,) = model(**data, mode="predict")
            assert result.pred_sem_seg.data.shape == (1, 50, 70)
            assert result.seg_logits.data.shape[0] == config.model.decode_head.num_classes


def test_all_are_here():
    assert len(PUBLISHED) == 16
    assert config_names() == sorted(file.stem for file in FILES)
    kinds = [f"{head}_svit-{size}_fpn_{schedule}_coco" for size in "sbl" for head, schedule in
             (("mask-rcnn", "1x"), ("mask-rcnn", "ms-3x"), ("cascade-mask-rcnn", "ms-3x"))]  # fmt: skip
    kinds += ["retinanet_svit-s_fpn_1x_coco"]
    kinds += [f"svit-{size}_{head}_ade20k-512x512" for size in "sbl" for head in ("upernet_8xb2-160k", "fpn_8xb2-80k")]
    assert {file.stem for file in PUBLISHED} == set(kinds)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tiny(file):
    config = config_of(file)
    shrink(config)
    run(config)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_true_size(file):
    run(config_of(file))


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_settings(file):
    """What recipe and paper say, from the name of the file."""
    config = load_config(str(file))
    size = {"s": "small", "b": "base", "l": "large"}[re.search("svit-([sbl])", file.stem)[1]]
    backbone = config.model.backbone
    assert backbone.arch == f"svit_{size}"
    assert backbone.drop_path_rate == {"small": 0.15, "base": 0.4, "large": 0.5}[size]
    assert backbone.out_norm
    assert tuple(backbone.stoken_size) == (8, 4, 1, 1)
    assert backbone.init_cfg == dict(type="Pretrained", checkpoint=f"pretrained/svit_{size}.in1k.safetensors")
    widths = [WIDTHS[backbone.arch][i] for i in backbone.out_indices]
    takes_maps = config.model.neck if "neck" in config.model else config.model.decode_head
    assert list(takes_maps.in_channels) == widths
    optim = config.optim_wrapper
    assert optim.optimizer.type == "AdamW"
    assert optim.paramwise_cfg == dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
    loader = config.train_dataloader
    assert config.auto_scale_lr.base_batch_size == 16
    if config.default_scope == "mmdet":
        epochs = 36 if "3x" in file.stem else 12
        assert (optim.optimizer.lr, optim.optimizer.weight_decay) == (1e-4, 0.05)
        assert config.train_cfg.max_epochs == epochs
        assert config.param_scheduler[1].milestones == ([27, 33] if epochs == 36 else [8, 11])
        assert backbone.norm_eval
        kinds = [step.type for step in loader.dataset.pipeline]
        assert ("RandomChoice" in kinds) == ("3x" in file.stem)
        assert ("Resize" in kinds) == ("1x" in file.stem)
    else:
        long = "160k" in file.stem
        assert (optim.optimizer.lr, optim.optimizer.weight_decay) == ((6e-5, 0.01) if long else (1e-4, 1e-4))
        assert config.train_cfg.max_iters == (160000 if long else 80000)
        assert config.param_scheduler[-1].power == (1.0 if long else 0.9)
        assert loader.batch_size == 2
        assert (backbone.norm_eval, config.sync_bn) == (False, "torch")
    header = file.read_text().partition("_base_")[0]
    assert "Settings: " in header
    figures = PAPER.get(file.stem.replace(f"svit-{size[0]}", "svit"), {}).get(size)
    assert (figures or "The paper has no such figure") in header


def test_find_config(tmp_path, monkeypatch):
    assert find_config("mask-rcnn_svit-s_fpn_1x_coco") == FOLDER / "mmdet/mask-rcnn_svit-s_fpn_1x_coco.py"
    assert find_config("mask-rcnn_svit-s_fpn_1x_coco.py") == FOLDER / "mmdet/mask-rcnn_svit-s_fpn_1x_coco.py"
    (tmp_path / "mine.py").write_text("model = dict()")
    assert find_config(str(tmp_path / "mine.py")) == tmp_path / "mine.py"
    with pytest.raises(ConfigError, match="no such file or name: mask-rcnn_svit-x.*did you mean mask-rcnn_svit"):
        find_config("mask-rcnn_svit-x_fpn_1x_coco")
    with pytest.raises(ConfigError, match="no such file or name: elsewhere/mask-rcnn"):
        find_config("elsewhere/mask-rcnn_svit-s_fpn_1x_coco")
    # as it is installed: the configs inside the package
    package = tmp_path / "svit"
    (package / "mm_configs/mmseg").mkdir(parents=True)
    (package / "mm_configs/mmseg/one.py").touch()
    monkeypatch.setattr("svit.__file__", str(package / "__init__.py"))
    assert config_names() == ["one"]
    assert find_config("one") == package / "mm_configs/mmseg/one.py"


def test_load_config(tmp_path):
    config = load_config(
        "mask-rcnn_svit-s_fpn_1x_coco", {"train_dataloader.batch_size": 5, "model.backbone.init_cfg": None}, "/x"
    )
    assert config.train_dataloader.batch_size == 5
    assert config.model.backbone.init_cfg is None
    roots = [config.data_root, *(config[f"{s}_dataloader"].dataset.data_root for s in ("train", "val", "test"))]
    assert [Path(root) for root in roots] == [Path("/x")] * 4
    for evaluator in (config.val_evaluator, config.test_evaluator):
        assert Path(evaluator.ann_file) == Path("/x/annotations/instances_val2017.json")
    assert "data/coco" not in config.pretty_text

    (tmp_path / "broken.py").write_text("model = dict(")
    with pytest.raises(ConfigError, match=r"broken\.py: cannot be read as a config"):
        load_config(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("a = 1")
    with pytest.raises(ConfigError, match="has no `model`"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "bare.py").write_text("model = dict()\nsteps = [dict(end=1)]")
    with pytest.raises(ConfigError, match="has no data_root"):
        load_config(str(tmp_path / "bare.py"), data_root="/x")
    (tmp_path / "nowhere.py").write_text("model = dict(a='')\ndata_root = ''\nfile = '/abs/b'")
    with pytest.raises(ConfigError, match="has no data_root"):
        load_config(str(tmp_path / "nowhere.py"), data_root="/x")
    assert load_config(str(tmp_path / "bare.py"), {"steps.0.end": 2}).steps == [dict(end=2)]
    for options in ({"steps.1.end": 2}, {"steps.end.a": 2}):
        with pytest.raises(ConfigError, match=re.escape(f"bare.py: does not take {options}: ")):
            load_config(str(tmp_path / "bare.py"), options)


def test_packages_that_cannot_be_imported(monkeypatch):
    for config, package in (("mask-rcnn_svit-s_fpn_1x_coco", "mmdet"), ("svit-s_fpn_8xb2-80k_ade20k-512x512", "mmseg")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, f"{package}.utils", None)
            with pytest.raises(ConfigError, match=rf"cannot be imported .*{package}.*pip install 'svit.mm.'"):
                load_config(config)


def test_boxes_alone():
    """RetinaNet asks for no masks, which a file of boxes does not have."""
    config = load_config("retinanet_svit-s_fpn_1x_coco")
    for split in ("train", "val", "test"):
        (load,) = [s for s in config[f"{split}_dataloader"].dataset.pipeline if s.type == "LoadAnnotations"]
        assert load == dict(type="LoadAnnotations", with_bbox=True)
    assert (config.val_evaluator.metric, config.test_evaluator.metric) == ("bbox", "bbox")


def test_fit_to_machine(monkeypatch):
    config = load_config("cascade-mask-rcnn_svit-s_fpn_ms-3x_coco")
    config.sync_bn = "torch"
    config.find_unused_parameters = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = config.to_dict()
    fit_to_machine(config)
    assert config.to_dict() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fit_to_machine(config)
    assert config.env_cfg.dist_cfg.backend == "gloo"
    assert config.sync_bn is None
    assert config.model_wrapper_cfg.find_unused_parameters
    assert config.model_wrapper_cfg.device_ids is None
    assert "SyncBN" not in config.pretty_text
    assert config.model.roi_head.bbox_head[2].norm_cfg.type == "BN"
