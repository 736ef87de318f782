"""What decides whether layers may run as one fused step."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, is_scriptable, use_fused_attn
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook


def default_backend(backend: str | None) -> str | None:
    """`backend`, or the reference where timm's switches ask for plain operations."""
    if backend is None and (not use_fused_attn() or is_scriptable()):
        return "reference"
    return backend


def untouched(layers: dict[nn.Module, type[nn.Module] | tuple[type[nn.Module], ...]]) -> bool:
    """Whether each layer does just what it was built for: of that very class, its forward its own, without hooks.

    Its parameters are plain tensors too, not quantized or sharded ones. A fused path that goes round their forward
    methods must ask.
    """
    if _has_any_global_hook():
        return False
    for m, t in layers.items():  # asked many times a forward: a loop takes half the time of `all`
        if type(m) is not t and not (isinstance(t, tuple) and type(m) in t):
            return False
        if hooked(m) or "forward" in m.__dict__:
            return False
        for p in m._parameters.values():
            if not plain(p):
                return False
    return True


def hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def plain(p: torch.Tensor | None) -> bool:
    """Whether a parameter is a tensor as PyTorch makes them, or one that a tracer puts in its place."""
    return p is None or type(p) in (nn.Parameter, torch.Tensor) or isinstance(p, (FakeTensor, FunctionalTensor))


def drops_nothing(*drops: nn.Module) -> bool:
    """Whether dropout layers, or drop paths, let all pass as they stand now."""
    return all(
        untouched({drop: (nn.Identity, nn.Dropout, DropPath)}) and (not drop.training or probability(drop) == 0)
        for drop in drops
    )


def probability(drop: nn.Module) -> float:
    return drop.drop_prob if isinstance(drop, DropPath) else getattr(drop, "p", 0.0)


def pointwise(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """conv(x) of a 1x1 convolution, on a GPU in 16 bit as a product of matrices: (B, C, H, W) to (B, C', H, W).

    cuDNN adds a bias in a pass of its own over the result, cuBLAS inside the product. The result is channels-last.
    Under TorchScript, which passes no modules to functions, callers write conv(x).
    """
    if not runs_as_product(conv, x):
        return conv(x)
    B, _, H, W = x.shape
    # PyTorch adds the bias inside the product for matrices, but not for maps in every version.
    y = F.linear(x.permute(0, 2, 3, 1).flatten(0, 2), conv.weight.flatten(1), conv.bias)
    return y.view(B, H, W, conv.weight.shape[0]).permute(0, 3, 1, 2)


def runs_as_product(conv: nn.Module, x: torch.Tensor) -> bool:
    """Whether `pointwise` goes round the forward of `conv`.

    Not in float32, where PyTorch lets convolutions round to TF32 unless told otherwise, and products only if told to.
    Not in a trace or an export, which other programs read.
    """
    if not (isinstance(x, torch.Tensor) and x.is_cuda) or for_other_programs():
        return False
    if x.dtype != torch.float16 and x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cuda"):
        return False
    return is_plain_pointwise(conv)


def is_plain_pointwise(conv: nn.Module) -> bool:
    """Whether `conv` is a convolution of single pixels and runs its own forward, nothing else."""
    if not untouched({conv: nn.Conv2d}) or conv.padding != (0, 0) or conv.groups != 1:
        return False
    return conv.kernel_size == conv.stride == (1, 1)


def for_other_programs() -> bool:
    """Whether what runs is written down by torch.jit.trace or torch.export."""
    # Not torch.compiler.is_exporting(), which is true under torch.compile too (PyTorch 2.11).
    return torch.jit.is_tracing() or getattr(torch.compiler, "_is_exporting_flag", False)
