"""Multiply-accumulates of whole detectors and segmentors."""

import torch
from mmengine.analysis import complexity_analysis
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from svit.profiling import HANDLES

__all__ = ["PROPOSALS", "ImageToHeads", "register_flop_handles"]

# Regions that a two-stage detector looks at, of every image: what its RPN proposes at most.
PROPOSALS = 1000


class ImageToHeads(nn.Module):
    """A detector or segmentor as one function of an image, up to the raw outputs of its heads.

    Without what depends on the image's content and on training: no post-processing, no auxiliary head. A two-stage
    detector always gets `PROPOSALS` regions, whatever its RPN finds; of these mmdet's Mask R-CNN passes all to the box
    head and 100 to the mask head.

    Shape: (1, C, H, W), any output.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
        self.model.init_cfg = None
        for name in [name for name, _ in self.model.named_children() if name.startswith("auxiliary_head")]:
            delattr(self.model, name)
        rpn = getattr(self.model, "rpn_head", None)
        if rpn is not None:
            rpn.predict = lambda maps, samples, rescale=False: propose(rpn(maps), maps[0])

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = tuple(image.shape[-2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
        outputs = self.model(image, [BaseDataElement(metainfo=meta)], mode="tensor")
        return tuple(tensors(outputs))


def propose(outputs: object, like: torch.Tensor) -> list[InstanceData]:
    """Regions that do not depend on the RPN's outputs, of one size and place."""
    boxes = like.new_tensor([[0.0, 0.0, 64.0, 64.0]]).repeat(PROPOSALS, 1)
    return [InstanceData(bboxes=boxes)]


def tensors(value: object) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


def register_flop_handles() -> None:
    """Makes mmengine's counter, and mmdet's and mmseg's get_flops.py over it, count the products in an attention."""
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(HANDLES)
