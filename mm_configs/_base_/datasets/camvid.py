# CamVid road scenes, 480 x 360, with the 11 classes of Badrinarayanan et al. (SegNet, 2017): images in img/{train, val,
# test} as .jpg, masks of class numbers (255: none) of the same names in ann/{train, val, test} as .png. A folder of
# images and masks of your own needs no more than this file with other names: docs/segmentation.md.
data_root = "data/camvid"
metainfo = dict(
    classes=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=[
        [128, 128, 128],
        [128, 0, 0],
        [192, 192, 128],
        [128, 64, 128],
        [60, 40, 222],
        [128, 128, 0],
        [192, 128, 128],
        [64, 64, 128],
        [64, 0, 128],
        [64, 64, 0],
        [0, 128, 192],
    ],
)
dataset = dict(type="BaseSegDataset", data_root=data_root, metainfo=metainfo, img_suffix=".jpg", seg_map_suffix=".png")

# color_ignore_orientation: masks refer to the pixels as they are stored, not as EXIF data turn them.
train_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(480, 360), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(256, 256), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]

train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(dataset, data_prefix=dict(img_path="img/train", seg_map_path="ann/train"), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(dataset, data_prefix=dict(img_path="img/val", seg_map_path="ann/val"), pipeline=test_pipeline),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(dataset, data_prefix=dict(img_path="img/test", seg_map_path="ann/test"), pipeline=test_pipeline),
)

val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
del metainfo, dataset
