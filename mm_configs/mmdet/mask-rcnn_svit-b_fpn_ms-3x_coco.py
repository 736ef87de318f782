# Mask R-CNN with SViT-B, 36 epochs, multi-scale.
# Paper, COCO val2017: 51.0 box AP, 45.4 mask AP, 359 GFLOPs at 800 x 1280.
# Settings: those of mask-rcnn_svit-s_fpn_ms-3x_coco.py, drop path 0.4.
_base_ = "mask-rcnn_svit-s_fpn_ms-3x_coco.py"

model = dict(
    backbone=dict(
        arch="svit_base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="pretrained/svit_base.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
