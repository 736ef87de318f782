# BCCD: 364 microscope images of blood, 640 x 480, with boxes of three kinds of cells; docs/bccd.md says where it is.
data_root = "data/bccd/"
metainfo = dict(
    classes=("WBC", "RBC", "Platelets"),
    palette=[(70, 130, 255), (230, 60, 60), (60, 200, 90)],
)
dataset = dict(type="CocoDataset", data_root=data_root, metainfo=metainfo, data_prefix=dict(img="images/"))
load = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(type="LoadAnnotations", with_bbox=True),
]

# A smear has no up and no down.
train_pipeline = [
    *load,
    dict(type="RandomResize", scale=(512, 384), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PhotoMetricDistortion", brightness_delta=16, hue_delta=6),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    load[0],
    dict(type="Resize", scale=(512, 384), keep_ratio=True),
    load[1],
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(dataset, ann_file="train.json", filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(dataset, ann_file="val.json", test_mode=True, pipeline=test_pipeline),
)
test_dataloader = dict(
    val_dataloader, dataset=dict(dataset, ann_file="test.json", test_mode=True, pipeline=test_pipeline)
)

val_evaluator = dict(type="CocoMetric", ann_file=data_root + "val.json", metric="bbox", classwise=True)
test_evaluator = dict(val_evaluator, ann_file=data_root + "test.json")
del dataset, load
