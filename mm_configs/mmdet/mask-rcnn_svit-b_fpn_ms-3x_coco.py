# Mask R-CNN with SViT-B, 36 epochs, multi-scale.
# Paper, COCO val2017: 51.0 box AP, 45.4 mask AP, 359 GFLOPs at 800 x 1280.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same group: AdamW, lr 1e-4 at
# batch 16, weight decay 0.05 but on norms, biases and vectors, drop path 0.4, BatchNorm at ImageNet's statistics, a
# LayerNorm on each map.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/det_runtime.py",
]

model = dict(
    backbone=dict(
        arch="svit_base",
        drop_path_rate=0.4,
        stoken_size=(8, 4, 1, 1),
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/svit_base.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
