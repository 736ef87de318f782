# Cascade Mask R-CNN with SViT-L, 36 epochs, multi-scale.
# The paper has no such figure.
# Settings: those of cascade-mask-rcnn_svit-s_fpn_ms-3x_coco.py, drop path 0.5.
_base_ = "cascade-mask-rcnn_svit-s_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(
        arch="svit_large",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="pretrained/svit_large.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
