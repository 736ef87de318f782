# UPerNet with an auxiliary head on the third stage (Xiao et al. 2018), as MMSegmentation trains it.
# A config adds the backbone's arch, its weights, drop_path_rate, and the heads' in_channels.
_base_ = "encoder-decoder.py"

head_norm = dict(type="SyncBN", requires_grad=True)  # plain BatchNorm where there is one process

model = dict(
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
)
del head_norm
