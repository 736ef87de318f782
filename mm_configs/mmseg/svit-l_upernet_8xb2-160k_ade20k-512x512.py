# UPerNet with SViT-L, 160k iterations of 16 crops of 512 x 512.
# Paper, ADE20K val: 52.4 mIoU at one scale, 53.2 at several (mm_test.py --tta), 1151 GFLOPs at 512 x 2048.
# Settings: those of svit-s_upernet_8xb2-160k_ade20k-512x512.py, drop path 0.5.
_base_ = "svit-s_upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        arch="svit_large",
        drop_path_rate=0.5,
        init_cfg=dict(checkpoint="pretrained/svit_large.in1k.safetensors"),
    ),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
