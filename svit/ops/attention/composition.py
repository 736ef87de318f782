"""What the attention half is made of. The reference, the fused primitives and the layers are ways through this."""

from collections.abc import Callable

from torch import Tensor


def attention_half(
    x: Tensor,
    cell: tuple[int, int],
    n_iter: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    attend: Callable[[Tensor], Tensor],
    scale: Callable[[Tensor], Tensor] | None,
    residual: Tensor | None,
    sample: Callable[..., tuple[Tensor, ...]],
    spread: Callable[..., Tensor],
) -> tuple[Tensor, ...]:
    """residual + scale(attention(norm(x))): sampling, attention among the super tokens, upsampling.

    Args:
        x: map (B, H, W, C).
        cell, n_iter: of the sampling.
        norm_weight, norm_bias, eps: of the layer norm, which is part of the sampling; None for no norm.
        attend: from super tokens (B, hh, ww, C) to the same.
        scale: multiplies super tokens by factors a channel and an image, or None. Upsampling is linear, so this is
            the same as to multiply its result.
        residual: map to add, or None.
        sample, spread: a backend's.

    Returns:
        map (B, H, W, C), and what `sample` gave: super tokens, association and, of some, the mass.
    """
    sampled = sample(x, cell, n_iter, norm_weight, norm_bias, eps)
    tokens = attend(sampled[0])
    if scale is not None:
        tokens = scale(tokens)
    return spread(tokens, sampled[1], cell, (x.shape[1], x.shape[2]), residual), *sampled
