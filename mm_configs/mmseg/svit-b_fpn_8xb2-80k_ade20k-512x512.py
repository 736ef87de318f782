# Semantic FPN with SViT-B, 80k iterations of 16 crops of 512 x 512.
# The paper has no such figure.
# Settings: those of svit-s_fpn_8xb2-80k_ade20k-512x512.py, drop path 0.4.
_base_ = "svit-s_fpn_8xb2-80k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="svit_base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="pretrained/svit_base.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
