"""Accuracy of a classifier."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from svit.errors import InputError

from .data import Batch, check_classes


@dataclass
class Accuracy:
    """Of how many images, and how often the right class was first or among the first five."""

    count: int
    hits: int
    hits5: int
    loss: float  # mean cross entropy
    class_hits: list[int]
    class_counts: list[int]

    @property
    def top1(self) -> float:
        """Per cent."""
        return 100 * self.hits / self.count

    @property
    def top5(self) -> float:
        """Per cent; of 5 classes and fewer it is 100."""
        return 100 * self.hits5 / self.count


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    flip: bool = False,
    channels_last: bool = False,
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
) -> Accuracy:
    """Evaluates a model, which is left in the mode that it was in.

    Args:
        model: (B, C, H, W) to logits (B, num_classes).
        batches: images and classes (B,).
        autocast: makes the context that the model runs in.
        flip: average the logits of the image and its mirror image.
        reduce: sums a tensor over the processes, each of which has other batches.

    Raises:
        InputError: there is no image, or a class that the model does not have.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    hits, hits5, counts = (torch.zeros(num_classes, dtype=dtype, device=device) for _ in range(3))
    loss = torch.zeros((), dtype=dtype, device=device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    training = model.training
    model.eval()
    try:
        for images, classes in batches:
            check_classes(classes, num_classes)
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            classes = classes.to(device, non_blocking=True)
            with autocast():
                logits = model(images)
                if flip:
                    logits = (logits + model(images.flip(-1))) / 2
            logits = logits.float()
            loss += F.cross_entropy(logits, classes, reduction="sum")
            best = logits.topk(min(5, num_classes)).indices == classes[:, None]
            hits.index_add_(0, classes, best[:, 0].to(dtype))
            hits5.index_add_(0, classes, best.any(1).to(dtype))
            counts.index_add_(0, classes, torch.ones_like(classes, dtype=dtype))
    finally:
        model.train(training)
    hits, hits5, counts, loss = (reduce(t).cpu() for t in (hits, hits5, counts, loss))
    total = int(counts.sum())
    if total == 0:
        raise InputError("there is no image to evaluate on")
    return Accuracy(
        total,
        int(hits.sum()),
        int(hits5.sum()),
        loss.item() / total,
        [int(n) for n in hits],
        [int(n) for n in counts],
    )
