# 160,000 iterations of AdamW, 16 images a batch.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=8000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    # By kind of layer, not by name: a name would miss the BatchNorms of the stem.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)  # svit mm-train --auto-scale-lr

# BatchNorm statistics over all GPUs, in the backbone too. The other way: None here, norm_eval=True in the backbone.
sync_bn = "torch"
