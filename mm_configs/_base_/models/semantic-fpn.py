# Semantic FPN (Kirillov et al. 2019), as MMSegmentation trains it.
# A config adds the backbone's arch, its weights, drop_path_rate, and the channels that go into the neck.
_base_ = "encoder-decoder.py"

model = dict(
    neck=dict(type="FPN", out_channels=256, num_outs=4),
    decode_head=dict(
        type="FPNHead",
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),  # plain BatchNorm where there is one process
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
)
