# UPerNet with an auxiliary head on the third stage (Xiao et al. 2018), as MMSegmentation trains it.
# A config adds the backbone's arch, its weights, drop_path_rate, and the heads' in_channels.
head_norm = dict(type="SyncBN", requires_grad=True)  # plain BatchNorm where there is one process

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
    decode_head=dict(
        type="UPerHead",
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=head_norm,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=head_norm,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
del head_norm
