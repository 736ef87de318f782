# UPerNet with SViT-S, 160k iterations of 16 crops of 512 x 512.
# Paper, ADE20K val: 48.6 mIoU at one scale, 49.0 at several (mm_test.py --tta), 926 GFLOPs at 512 x 2048.
# Settings: the paper does not print its own; these are those of UniFormer and RMT, of the same line: AdamW, lr 6e-5,
# weight decay 0.01 but on norms, biases and vectors, 1500 iterations of warm-up, then linear decay; drop path 0.15,
# BatchNorm over all GPUs, a LayerNorm on each map.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_160k.py",
    "../_base_/seg_runtime.py",
]

model = dict(
    backbone=dict(
        arch="svit_small",
        drop_path_rate=0.15,
        stoken_size=(8, 4, 1, 1),
        init_cfg=dict(type="Pretrained", checkpoint="pretrained/svit_small.in1k.safetensors"),
    ),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
