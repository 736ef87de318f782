"""Dtypes of the computation, shared by the operators: autocast's, and that of sums."""

import torch


@torch.fx.wrap
def widen(x: torch.Tensor) -> torch.Tensor:
    """x in float32 at least. In 16 bit, sums over a cell's pixels lose their small terms, and float16 has no 1e-12."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over maps of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.fx.wrap
def matmul_in_own_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in the operands' own dtype. Autocast would lower it."""
    if torch.jit.is_scripting():
        return torch.matmul(a, b)
    else:
        if autocasts(a.device.type):
            with torch.autocast(a.device.type, enabled=False):
                return torch.matmul(a, b)
        return torch.matmul(a, b)


@torch.fx.wrap
def computes_in_16_bit(x: torch.Tensor) -> bool:
    """Whether a convolution of x runs in float16 or bfloat16, by its dtype or by autocast."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return True
    if torch.jit.is_scripting():
        return False
    else:
        return autocasts(x.device.type)


@torch.jit.ignore
def autocasts(device: str) -> bool:
    """Whether autocast is on for a kind of device."""
    # torch.compile cannot trace the first call, which only matters for devices that autocast does not know (meta).
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast runs convolutions and products of x: that of x if it is off, or x is float64."""
    if x.dtype == torch.float64:
        return x.dtype
    device = x.device.type  # `autocasts`, inlined: every step of a model calls this
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else x.dtype


def to_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in autocast's dtype."""
    return x.to(autocast_dtype(x))
