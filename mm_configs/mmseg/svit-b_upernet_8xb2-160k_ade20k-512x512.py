# UPerNet with SViT-B, 160k iterations of 16 crops of 512 x 512.
# Paper, ADE20K val: 50.7 mIoU at one scale, 51.9 at several (mm_test.py --tta), 1036 GFLOPs at 512 x 2048.
# Settings: those of svit-s_upernet_8xb2-160k_ade20k-512x512.py, drop path 0.4.
_base_ = "svit-s_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="svit_base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="pretrained/svit_base.in1k.safetensors"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 512]),
    auxiliary_head=dict(in_channels=384),
)
