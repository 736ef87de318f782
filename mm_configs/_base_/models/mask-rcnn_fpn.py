# Mask R-CNN with a feature pyramid, as MMDetection trains it (He et al. 2017, Lin et al. 2017).
# A config adds the backbone's arch, its weights, drop_path_rate, and the channels that go into the neck.
channels = 256
strides = [4, 8, 16, 32]
num_classes = 80

box_coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0])
one_of_many = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)
yes_or_no = dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0)
l1 = dict(type="L1Loss", loss_weight=1.0)
overlap = dict(type="MaxIoUAssigner", match_low_quality=True, ignore_iof_thr=-1)
nms_70 = dict(type="nms", iou_threshold=0.7)

model = dict(
    type="MaskRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type="TimmBackbone",
        out_indices=(0, 1, 2, 3),
        out_norm=True,
        # BatchNorm with the statistics of ImageNet, right for two images a GPU. The other way: norm_eval=False here
        # and sync_bn='torch' beside `model`.
        norm_eval=True,
    ),
    neck=dict(type="FPN", out_channels=channels, num_outs=5),
    rpn_head=dict(
        type="RPNHead",
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(
            type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[*strides, 2 * strides[-1]]
        ),
        bbox_coder=dict(box_coder, target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=yes_or_no,
        loss_bbox=l1,
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
            out_channels=channels,
            featmap_strides=strides,
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead",
            in_channels=channels,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=num_classes,
            bbox_coder=dict(box_coder, target_stds=[0.1, 0.1, 0.2, 0.2]),
            reg_class_agnostic=False,
            loss_cls=one_of_many,
            loss_bbox=l1,
        ),
        mask_roi_extractor=dict(
            type="SingleRoIExtractor",
            roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0),
            out_channels=channels,
            featmap_strides=strides,
        ),
        mask_head=dict(
            type="FCNMaskHead",
            num_convs=4,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=num_classes,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(overlap, pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3),
            sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(nms_pre=2000, max_per_img=1000, nms=nms_70, min_bbox_size=0),
        rcnn=dict(
            assigner=dict(overlap, pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5),
            sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
            mask_size=28,
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=nms_70, min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5),
    ),
)
del channels, strides, num_classes, box_coder, one_of_many, yes_or_no, l1, overlap, nms_70
