# Semantic FPN small enough to try ADE20K, or a folder in its format, on a CPU: SViT-nano from scratch, narrow heads,
# 4000 iterations of 8 crops of 256 x 256. It is not in the paper.
_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/seg_runtime.py",
]

channels = 64
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(arch="svit_nano"),
    neck=dict(in_channels=[24, 48, 96, 160], out_channels=channels),
    decode_head=dict(in_channels=[channels] * 4, channels=channels),
)
del channels

train_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(1024, 256), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(256, 256), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(type="Resize", scale=(1024, 256), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(int(1024 * r), int(256 * r)), keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=4000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=100, end=4000, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=8)
