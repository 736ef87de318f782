# 80,000 iterations of AdamW, 16 images a batch.
_base_ = "adamw_160k.py"

train_cfg = dict(max_iters=80000)

param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=1e-4))
