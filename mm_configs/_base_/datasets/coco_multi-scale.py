# COCO 2017 with the augmentation of DETR (Carion et al. 2020): the short side between 480 and 800 pixels; half of the
# images are cut to a random part first.
_base_ = "coco.py"

short_sides = [(480 + 32 * i, 1333) for i in range(11)]
train_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=short_sides, keep_ratio=True)],
            [
                dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                dict(type="RandomChoiceResize", scales=short_sides, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
del short_sides
