"""Dtypes of the computation, shared by the operators: what autocast asks for, and what sums want."""

import torch


@torch.fx.wrap
def widen(x: torch.Tensor) -> torch.Tensor:
    """float32 at least: sums over a cell's pixels lose their small terms in 16 bit, and 1e-12 is 0 in float16."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of sums over maps of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.fx.wrap
def matmul_in_own_dtype(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in the operands' own dtype, which autocast would lower."""
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
    # torch.compile cannot look into the first question, which matters to devices it does not know (meta).
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that autocast has convolutions and products of x compute in; that of x where it is off."""
    device = x.device.type  # `autocasts`, spelled out: this is asked at each step of a model
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return torch.get_autocast_dtype(device) if known and torch.is_autocast_enabled(device) else x.dtype


def to_autocast_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype that autocast asks for; float64 stays."""
    return x if x.dtype == torch.float64 else x.to(autocast_dtype(x))
