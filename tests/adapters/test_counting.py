import torch

from helpers import needs_mm

needs_mm()

from mmengine.analysis import get_model_complexity_info  # noqa: E402

import svit.adapters  # noqa: E402, F401
from svit.adapters import TimmBackbone, load_config  # noqa: E402
from svit.adapters.counting import DETECTIONS, PROPOSALS, ImageToHeads  # noqa: E402
from svit.profiling import count  # noqa: E402


def detector(name: str) -> ImageToHeads:
    torch.manual_seed(0)
    config = load_config(
        name, {"model.backbone.arch": "test_svit", "model.backbone.init_cfg": None, "model.neck.in_channels": WIDTHS}
    )
    return ImageToHeads(config)


WIDTHS = [8, 16, 24, 32]


def test_regions_do_not_depend_on_the_weights():
    """Every RoI through the box head, as many as can be found through the mask head, the RPN included."""
    found = count(detector("mask-rcnn_svit-s_fpn_1x_coco"), (64, 96), attention_products=False).by_module
    cells = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    conv = 9 * 256 * 256
    assert found["model.rpn_head"] == sum(h * w for h, w in cells) * (conv + 256 * 3 * 5)
    assert found["model.roi_head.bbox_head"] == PROPOSALS * (7 * 7 * 256 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
    mask = 14 * 14 * (4 * conv + 4 * 256 * 256) + 28 * 28 * 256 * 80
    assert found["model.roi_head.mask_head"] == DETECTIONS * mask
    assert found[""] == sum(found[f"model.{part}"] for part in ("backbone", "neck", "rpn_head", "roi_head"))


def test_cascade():
    found = count(detector("cascade-mask-rcnn_svit-s_fpn_ms-3x_coco"), (64, 96), attention_products=False).by_module
    conv = 9 * 256 * 256
    box = PROPOSALS * (7 * 7 * 4 * conv + 7 * 7 * 256 * 1024 + 1024 * (81 + 320))
    mask = DETECTIONS * (14 * 14 * (4 * conv + 4 * 256 * 256) + 28 * 28 * 256 * 80)
    assert found["model.roi_head.bbox_head"] == 3 * box
    assert found["model.roi_head.mask_head"] == 3 * mask


def test_no_auxiliary_head():
    config = load_config("svit-nano_fpn_1xb8-1k_camvid-256x256")
    with_head = load_config("svit-s_upernet_8xb2-160k_ade20k-512x512")
    with_head.model.backbone.update(arch="test_svit", drop_path_rate=0.0)
    with_head.model.decode_head.in_channels = WIDTHS
    assert not hasattr(ImageToHeads(with_head).model, "auxiliary_head")
    (logits,) = ImageToHeads(config)(torch.zeros(1, 3, 64, 64))
    assert logits.shape == (1, 11, 16, 16)


def test_mmengine_counts_attention():
    """mmdet's and mmseg's get_flops.py, over mmengine's counter, sees what fvcore with our handles sees."""
    backbone = TimmBackbone(arch="test_svit", out_norm=False).eval()
    theirs = get_model_complexity_info(backbone, (3, 64, 64), show_table=False, show_arch=False)["flops"]
    ours = count(backbone, (64, 64))
    products = {"scaled_dot_product_attention", "matmul", "conv", "linear"}
    counted = sum(n for op, n in ours.by_operator.items() if op in products)
    assert ours.by_operator["scaled_dot_product_attention"] > 0
    assert counted <= theirs <= 1.02 * ours.macs
