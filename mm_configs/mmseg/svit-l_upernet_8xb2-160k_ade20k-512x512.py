# UPerNet with SViT-L, 160k iterations of 16 crops of 512 x 512.
# Paper, ADE20K val: 52.4 mIoU at one scale, 53.2 at several (mm_test.py --tta), 1151 GFLOPs at 512 x 2048.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same group: AdamW, lr 6e-5,
# weight decay 0.01 but on norms, biases and vectors, 1500 iterations of warm-up, then linear decay; drop path 0.5,
# BatchNorm over all GPUs, a LayerNorm on each map.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/seg_runtime.py",
]

model = dict(
    backbone=dict(
        arch="svit_large",
        drop_path_rate=0.5,
        stoken_size=(8, 4, 1, 1),
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/svit_large.in1k.safetensors"),
    ),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
