"""What decides whether layers may run as one fused step."""

from timm.layers import DropPath, is_scriptable, use_fused_attn
from torch import nn


def default_backend(backend: str | None) -> str | None:
    """`backend`, or the reference where timm's switches ask for plain operations."""
    if backend is None and (not use_fused_attn() or is_scriptable()):
        return "reference"
    return backend


def untouched(layers: dict[nn.Module, type[nn.Module] | tuple[type[nn.Module], ...]]) -> bool:
    """Whether each layer does just what it was built for: of that very class, its forward its own, without hooks.

    A fused path that goes round their forward methods must ask.
    """
    return all(
        type(m) in (t if isinstance(t, tuple) else (t,)) and not hooked(m) and "forward" not in vars(m)
        for m, t in layers.items()
    )


def hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def drops_nothing(*drops: nn.Module) -> bool:
    """Whether dropout layers, or drop paths, let all pass as they stand now."""
    return all(
        untouched({drop: (nn.Identity, nn.Dropout, DropPath)}) and (not drop.training or probability(drop) == 0)
        for drop in drops
    )


def probability(drop: nn.Module) -> float:
    return drop.drop_prob if isinstance(drop, DropPath) else getattr(drop, "p", 0.0)
