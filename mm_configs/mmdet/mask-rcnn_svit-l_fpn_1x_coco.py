# Mask R-CNN with SViT-L, 12 epochs.
# Paper, COCO val2017: 50.8 box AP, 45.5 mask AP, 470 GFLOPs at 800 x 1280.
# Settings: those of mask-rcnn_svit-s_fpn_1x_coco.py, drop path 0.5.
_base_ = "mask-rcnn_svit-s_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="svit_large",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="pretrained/svit_large.in1k.safetensors"),
    ),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
