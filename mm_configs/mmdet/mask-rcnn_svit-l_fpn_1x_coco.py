# Mask R-CNN with SViT-L, 12 epochs.
# Paper, COCO val2017: 50.8 box AP, 45.5 mask AP, 470 GFLOPs at 800 x 1280.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same group: AdamW, lr 1e-4 at
# batch 16, weight decay 0.05 but on norms, biases and vectors, drop path 0.5, BatchNorm at ImageNet's statistics, a
# LayerNorm on each map.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/det_runtime.py",
]

model = dict(
    backbone=dict(
        arch="svit_large",
        drop_path_rate=0.5,
        stoken_size=(8, 4, 1, 1),
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/svit_large.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
