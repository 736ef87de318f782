# Semantic FPN with SViT-L, 80k iterations of 16 crops of 512 x 512.
# The paper has no such figure.
# Settings: those of svit-s_fpn_8xb2-80k_ade20k-512x512.py, drop path 0.5.
_base_ = "svit-s_fpn_8xb2-80k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="svit_large",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="pretrained/svit_large.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
