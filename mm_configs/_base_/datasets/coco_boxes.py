# COCO 2017, boxes alone.
_base_ = "coco.py"

load = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
]
train_pipeline = [
    *load,
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    load[0],
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    load[1],
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
del load
