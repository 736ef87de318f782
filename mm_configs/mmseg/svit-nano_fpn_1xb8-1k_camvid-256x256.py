# Semantic FPN small enough to train on a CPU in minutes: SViT-nano from scratch, narrow heads, 1000 iterations of 8
# crops of 256 x 256. For trying things out and for small data sets; it is not in the paper. docs/segmentation.md has
# its result.
_base_ = [
    "../_base_/models/semantic-fpn.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/adamw_80k.py",
    "../_base_/seg_runtime.py",
]

channels = 64
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(arch="svit_nano"),
    neck=dict(in_channels=[24, 48, 96, 160], out_channels=channels),
    decode_head=dict(in_channels=[channels] * 4, channels=channels, num_classes=11),
)
del channels

train_cfg = dict(max_iters=1000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=100, end=1000, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=8)
