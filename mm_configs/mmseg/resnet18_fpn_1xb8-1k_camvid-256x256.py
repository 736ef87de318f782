# The baseline of svit-nano_fpn_1xb8-1k_camvid-256x256: head, data and schedule of that file, timm's ResNet-18 in place
# of SViT-nano, from scratch too. Any other model of timm with feature maps goes in the same way.
_base_ = "svit-nano_fpn_1xb8-1k_camvid-256x256.py"

model = dict(
    backbone=dict(arch="resnet18", out_indices=(1, 2, 3, 4)),  # its first map has stride 2
    neck=dict(in_channels=[64, 128, 256, 512]),
)
