# Semantic FPN with SViT-S, 80k iterations of 16 crops of 512 x 512.
# The paper has no such figure.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same line: AdamW, lr 1e-4,
# weight decay 1e-4 but on norms, biases and vectors, polynomial decay of power 0.9; drop path 0.15, BatchNorm over all
# GPUs, a LayerNorm on each map.
_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/seg_runtime.py",
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
