# Cascade Mask R-CNN with SViT-L, 36 epochs, multi-scale.
# The paper has no such figure.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same group: AdamW, lr 1e-4 at
# batch 16, weight decay 0.05 but on norms, biases and vectors, drop path 0.5, BatchNorm at ImageNet's statistics, a
# LayerNorm on each map.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_multi-scale.py",
    "../_base_/schedules/adamw_3x.py",
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
