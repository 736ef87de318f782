# What UPerNet and Semantic FPN share: the preprocessing of crops, the backbone, inference on the whole image.
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    # The BatchNorms learn statistics over all GPUs: see `sync_bn` in the schedule.
    backbone=dict(type="TimmBackbone", out_indices=(0, 1, 2, 3), out_norm=True, norm_eval=False),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
