"""Folds norms and layer scales into neighbouring convolutions, for inference.

A layer that folds has `replacements()`: the modules that its `fuse()` puts in the place of its children. All are
computed before any child changes. They are copies, since a module or a weight may occur elsewhere in the model.
"""

import copy
from collections.abc import Iterable
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops.misc import FrozenBatchNorm2d

from svit.ops._numerics import widen
from svit.ops.onednn import PackedWeight

from .fusing import is_plain_pointwise, runs_stock_forward

# Exactly these classes: a subclass may compute something else (BatchNormAct2d has an activation).
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)

Stock = TypeVar("Stock", bound=nn.Module)


def replace(module: nn.Module, children: dict[str, nn.Module]) -> None:
    for name, child in children.items():
        setattr(module, name, child)


def keep_packed(backend: str | None, *convs: nn.Module) -> None:
    """Lets oneDNN keep the weights in its own layout (svit/ops/onednn.py) if `backend` is None or "onednn"."""
    for conv in convs:
        if backend not in (None, "onednn") or type(conv) is not nn.Conv2d or isinstance(conv.padding, str):
            continue
        if (conv.groups, conv.dilation, conv.padding_mode) == (1, (1, 1), "zeros"):
            vars(conv)["packed"] = PackedWeight()


def expect_stock(parent: nn.Module, name: str, *classes: type[Stock]) -> Stock:
    """Returns child `name` (dotted) of `parent`.

    Raises:
        ValueError: it is of another class, or a hook, a parametrization or another forward method changes its result.
    """
    child = parent.get_submodule(name)
    if not runs_stock_forward({child: classes}):
        expected = " or ".join(c.__name__ for c in classes)
        got = type(child).__name__ + (", which is hooked or changed" if type(child) in classes else "")
        raise ValueError(
            f"{name}: expected a plain {expected} to fold, got {got}; first make pruning, weight norm and other "
            "parametrizations permanent, merge adapters, and remove hooks"
        )
    return cast(Stock, child)


def expect_eval(parent: nn.Module, replaced: Iterable[str]) -> None:
    """Checks that the norms among the children that fold compute now what they compute folded.

    Raises:
        ValueError: a BatchNorm is in train mode.
    """
    for name in replaced:
        if isinstance(child := getattr(parent, name), _BatchNorm) and child.training:
            raise ValueError(f"{name}: expected eval mode, in which it folds, got train mode; call eval() first")


def affine(parent: nn.Module, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and shift of a BatchNorm with running statistics, float32 at least. None for any other norm, which stays.

    Raises:
        ValueError: it is hooked or changed.
    """
    norm = getattr(parent, name)
    if not isinstance(norm, BATCH_NORMS) or not (type(norm) in BATCH_NORMS or is_parametrized(norm)):
        return None
    expect_stock(parent, name, *BATCH_NORMS)
    if norm.running_mean is None or norm.running_var is None:
        return None  # it normalises with the statistics of each batch, also in eval mode
    scale = (widen(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def folded_after(parent: nn.Module, name: str, scale: torch.Tensor, shift: torch.Tensor | None = None) -> nn.Conv2d:
    """A copy of the convolution that scales and shifts each output channel.

    Raises:
        ValueError: the child is no plain nn.Conv2d, or float16 does not hold the new weights.
    """
    conv = expect_stock(parent, name, nn.Conv2d)
    weight, bias = widen(conv.weight) * scale.view(-1, 1, 1, 1), conv.bias
    bias = shift if bias is None else bias * scale if shift is None else bias * scale + shift
    return with_weights(conv, name, weight, bias)


def folded_before(parent: nn.Module, name: str, scale: torch.Tensor, shift: torch.Tensor) -> nn.Conv2d:
    """A copy of the 1x1 convolution that scales and shifts each input channel: W (s x + t) + b = (W s) x + (W t + b).

    Raises:
        ValueError: the child is no plain 1x1 nn.Conv2d, or float16 does not hold the new weights.
    """
    conv = expect_stock(parent, name, nn.Conv2d)
    if not is_plain_pointwise(conv):
        raise ValueError(f"{name}: expected a 1x1 convolution without padding and groups to fold, got {conv}")
    weight = widen(conv.weight)
    bias = weight.flatten(1) @ shift.to(weight.dtype)
    return with_weights(conv, name, weight * scale.view(1, -1, 1, 1), bias if conv.bias is None else bias + conv.bias)


def with_weights(conv: nn.Conv2d, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    new, dtype, trains = copy.deepcopy(conv), conv.weight.dtype, conv.weight.requires_grad
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=trains)
    if bias is not None:
        new.bias = nn.Parameter(bias.to(dtype), requires_grad=trains)
    if dtype == torch.float16 and not weight.is_meta and not all(p.isfinite().all() for p in new.parameters()):
        raise ValueError(f"{name}: its folded weights overflow float16; fold in float32, then convert")
    return new
