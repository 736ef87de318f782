# RetinaNet with SViT-nano and narrow heads on 205 microscope images, on two CPU cores.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/bccd.py",
    "../_base_/det_runtime.py",
]

from svit.models.svit import WEIGHTS  # noqa: E402  those that come with the package

channels = 64
model = dict(
    # Few images, unlike those of the pretraining: BatchNorms learn their statistics.
    backbone=dict(
        arch="svit_nano",
        norm_eval=False,
        init_cfg=dict(type="Pretrained", checkpoint=str(WEIGHTS / "svit_nano.photos20.safetensors")),
    ),
    neck=dict(in_channels=[48, 96, 160], out_channels=channels),
    bbox_head=dict(
        num_classes=3,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=2,
        reg_decoded_bbox=True,
        loss_bbox=dict(_delete_=True, type="GIoULoss", loss_weight=2.0),
    ),
)
del channels, WEIGHTS

max_epochs = 40
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys=dict(backbone=dict(lr_mult=0.5)),
    ),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        end=max_epochs,
        eta_min=1e-5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(checkpoint=dict(interval=5))
custom_hooks = [
    dict(type="CheckImagesHook"),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.004, update_buffers=True),
]
