"""Multiply-accumulates of whole detectors and segmentors."""

from copy import deepcopy
from typing import Any

import torch
from mmengine.analysis import complexity_analysis
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from svit.profiling import HANDLES

__all__ = ["DETECTIONS", "PROPOSALS", "ImageToHeads", "register_flop_handles"]

# Regions of an image that a two-stage detector passes to its box heads (the most that its RPN proposes), and to its
# mask heads (the most that it detects).
PROPOSALS, DETECTIONS = 1000, 100


class ImageToHeads(nn.Module):
    """A detector or segmentor as one function of an image, up to the raw outputs of its heads.

    It omits what depends on the image's content or on training: post-processing and the auxiliary head. A two-stage
    detector always has `PROPOSALS` regions in its box heads and `DETECTIONS` in its mask heads.

    Args:
        config: as `load_config` gives it.

    Shape: (1, C, H, W) to a tuple of tensors.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = revert_sync_batchnorm(MODELS.build(deepcopy(config.model))).eval()
        for name in [name for name, _ in self.model.named_children() if name.startswith("auxiliary_head")]:
            delattr(self.model, name)
        self.rpn_outputs = ()
        if hasattr(self.model, "rpn_head"):
            self.model.rpn_head.predict = self.propose
        if hasattr(getattr(self.model, "roi_head", None), "_refine_roi"):  # a cascade
            self.model.roi_head.forward = self.cascade

    def propose(self, maps: tuple[torch.Tensor, ...], *_: Any, **__: Any) -> list[InstanceData]:
        """Replaces the RPN's `predict`: runs the RPN, but always proposes the same regions."""
        self.rpn_outputs = self.model.rpn_head(maps)
        return [InstanceData(bboxes=maps[0].new_tensor([[0.0, 0.0, 64.0, 64.0]]).repeat(PROPOSALS, 1))]

    def cascade(
        self, maps: tuple[torch.Tensor, ...], proposals: list[InstanceData], samples: list[Any]
    ) -> tuple[Any, ...]:
        """Replaces a cascade's `forward`, which would pass every region to the mask heads."""
        from mmdet.structures.bbox import bbox2roi

        head = self.model.roi_head
        rois, *found = head._refine_roi(
            maps, bbox2roi([p.bboxes for p in proposals]), [s.metainfo for s in samples], (PROPOSALS,)
        )
        rois = torch.cat(rois)[:DETECTIONS]
        return *found, *(head._mask_forward(stage, maps, rois)["mask_preds"] for stage in range(head.num_stages))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = tuple(image.shape[-2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
        outputs = self.model(image, [BaseDataElement(metainfo=meta)], mode="tensor")
        # The RPN's results are outputs too: a trace omits work that no output depends on.
        return tuple(tensors((outputs, self.rpn_outputs)))


def tensors(value: object) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (list, tuple)) else []


def register_flop_handles() -> None:
    """Lets mmengine's counter, which mmdet's and mmseg's get_flops.py use, count the products of an attention."""
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(HANDLES)
