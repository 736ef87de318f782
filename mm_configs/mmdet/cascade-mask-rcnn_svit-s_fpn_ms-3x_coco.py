# Cascade Mask R-CNN with SViT-S, 36 epochs, multi-scale.
# The paper has no such figure.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same line: AdamW, lr 1e-4 at
# batch 16, weight decay 0.05 but on norms, biases and vectors, drop path 0.15, BatchNorm at ImageNet's statistics, a
# LayerNorm on each map.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/det_runtime.py",
]

model = dict(
    backbone=dict(
        arch="svit_small",
        drop_path_rate=0.15,
        stoken_size=(8, 4, 1, 1),
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/svit_small.in1k.safetensors"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
