"""Decides whether layers may run as one fused step."""

import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import DropPath, is_scriptable, use_fused_attn
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from svit.ops import onednn
from svit.ops._dispatch import exporting

# Dropout layers. These classes do nothing else.
DROPS: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, DropPath)
PLAIN = (nn.Parameter, torch.Tensor, type(None))

# Layers, each with the class or classes that it is expected to be of.
Expected = dict[nn.Module, type[nn.Module] | tuple[type[nn.Module], ...]]

POINTWISE = (1, 1), (1, 1), (0, 0), 1  # kernel size, stride, padding and groups of a 1x1 convolution


def default_backend(backend: str | None) -> str | None:
    """`backend`, or the reference if timm's switches ask for plain operations."""
    if backend is None and (not use_fused_attn() or is_scriptable()):
        return "reference"
    return backend


def runs_stock_forward(layers: Expected) -> bool:
    """Whether each layer is of exactly the given class, runs the forward method of that class, and has no hooks.

    Its parameters must be plain tensors, neither quantized nor sharded. A fused path that bypasses forward methods must
    check this. Each block calls it several times, so it makes no calls of its own.
    """
    if _has_any_global_hook():
        return False
    for m, t in layers.items():
        if type(m) is not t and not (isinstance(t, tuple) and type(m) in t):
            return False
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if "forward" in m.__dict__:
            return False
        for p in m._parameters.values():
            # A tracer puts a FakeTensor or FunctionalTensor in the place of a plain one.
            if type(p) not in PLAIN and not isinstance(p, (FakeTensor, FunctionalTensor)):
                return False
    return True


def dropout_inactive(*drops: nn.Module) -> bool:
    """Whether dropout layers and drop paths, each one of `DROPS`, change nothing in their current state."""
    for drop in drops:
        if drop.training and (drop.drop_prob if isinstance(drop, DropPath) else getattr(drop, "p", 0.0)) != 0:
            return False
    return True


def pointwise(conv: nn.Module, x: torch.Tensor, packed: bool | None = None) -> torch.Tensor:
    """Runs a 1x1 convolution, conv(x): (B, C, H, W) to (B, C', H, W).

    On a GPU in 16 bit it runs as a matrix product: cuBLAS adds the bias inside the product, cuDNN in another pass over
    the result. The product is channels-last. On a CPU it uses the weight in oneDNN's layout if `packed` is true.
    `packed` is the result of `runs_packed`; None calls that here. TorchScript passes no modules to functions, so a
    scripted caller writes conv(x).
    """
    if type(conv) is nn.Conv2d and (packed or (packed is None and "packed" in vars(conv) and runs_packed(x, conv))):
        return onednn.convolution(x, conv.weight, conv.bias, packed=vars(conv)["packed"])
    if not runs_as_product(conv, x):
        return conv(x)
    B, _, H, W = x.shape
    # Flattened, since not every version of PyTorch adds the bias inside the product of a 4-dimensional tensor.
    y = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), conv.weight.flatten(1), conv.bias)
    return y.view(B, H, W, conv.weight.shape[0]).permute(0, 3, 1, 2)


def convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Runs conv(x), with the weight in oneDNN's layout if `runs_packed` allows it."""
    if not runs_packed(x, conv) or isinstance(conv.padding, str):
        return conv(x)
    return onednn.convolution(x, conv.weight, conv.bias, conv.stride, conv.padding, packed=vars(conv)["packed"])


def runs_packed(x: torch.Tensor, *convs: nn.Conv2d) -> bool:
    """Whether convolutions of x run with their weights in oneDNN's layout, which they keep after `fuse()`."""
    for conv in convs:
        if "packed" not in vars(conv) or (conv.dilation, conv.padding_mode) != ((1, 1), "zeros"):
            return False
    if not isinstance(x, torch.Tensor) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    weights = [conv.weight for conv in convs]
    if not runs_stock_forward(dict.fromkeys(convs, nn.Conv2d)) or not onednn.usable("", x, weights=weights)[0]:
        return False
    return x.dim() == 4 and x.shape[1] == weights[0].shape[1]  # else the convolution raises the error


def runs_as_product(conv: nn.Module, x: torch.Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether `pointwise` runs a matrix product instead of the forward method of `conv`.

    In float32 it does not: by default PyTorch rounds convolutions to TF32, but not products. In a trace or an export,
    which other programs read, it does not either.
    """
    if not (isinstance(x, torch.Tensor) and x.is_cuda) or for_other_programs():
        return False
    if x.dtype != torch.float16 and x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cuda"):
        return False
    return is_plain_pointwise(conv)


def is_plain_pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether `conv` is a plain 1x1 convolution without hooks or a changed forward method."""
    return type(conv) is nn.Conv2d and runs_stock_forward({conv: nn.Conv2d}) and (
        conv.kernel_size, conv.stride, conv.padding, conv.groups,
    ) == POINTWISE  # fmt: skip


def for_other_programs() -> bool:
    """Whether torch.jit.trace or torch.export records what runs."""
    return torch.jit.is_tracing() or exporting()


def renamed(old: str, new: str) -> Callable[..., Any]:
    """A method under its deprecated name."""

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        message = f"{type(self).__name__}.{old} is deprecated, use {new}"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args, **kwargs)

    return torch.jit.ignore(method)
