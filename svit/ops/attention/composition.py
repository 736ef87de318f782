"""The composition of the attention half. The reference, the primitives of a backend and the layers call it."""

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
    """Computes residual + scale(attention(norm(x))): sampling, attention among the super tokens, upsampling.

    Args:
        x: map (B, H, W, C).
        cell, n_iter: of the sampling.
        norm_weight, norm_bias, eps: of the layer norm, which is part of the sampling. None for no norm.
        attend: from super tokens (B, hh, ww, C) to the same shape.
        scale: multiplies super tokens by a factor for each channel and image, or None. Upsampling is linear, so the
            result is the same as if the map were multiplied.
        residual: map to add, or None.
        sample, spread: a backend's functions.

    Returns:
        map (B, H, W, C), and the results of `sample`: super tokens, association and, with some backends, the mass.
    """
    sampled = sample(x, cell, n_iter, norm_weight, norm_bias, eps)
    tokens = attend(sampled[0])
    if scale is not None:
        tokens = scale(tokens)
    return spread(tokens, sampled[1], cell, (x.shape[1], x.shape[2]), residual), *sampled
