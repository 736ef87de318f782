"""The attention half as one kernel of the CUDA library."""

import torch
from torch import Tensor

from svit.ops import cuda

cuda.LIBRARY.define(
    "super_token_attention(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight, "
    "Tensor qkv_bias, Tensor proj_weight, Tensor proj_bias, Tensor? scale, int height, int width, bool clusters, "
    "Tensor(a!) y, Tensor(b!)? s, Tensor(c!)? q, Tensor(d!)? mass) -> ()"
)


def super_token_attention(
    x: Tensor,
    cell: list[int],
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    scale: Tensor | None,
    num_heads: int,
    save_for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, W, C = x.shape
    h, w = cell
    x = cuda.aligned(x)
    clusters = cuda.max_active_clusters(C, H // h, W // w, x.device) > 0
    y = torch.empty_like(x)
    s = x.new_empty((B, H // h, W // w, C) if save_for_backward else 0)
    # Without clusters q passes through global memory.
    stores_q = save_for_backward or not clusters
    q = x.new_empty((B, H // h, W // w, 9, h * w) if stores_q else 0)
    mass = x.new_empty((B, H // h, W // w) if save_for_backward else 0, dtype=torch.float32)
    torch.ops.svit_cuda.super_token_attention(
        x, *(cuda.parameter(t, x) for t in (norm_weight, norm_bias)), eps,
        cuda.weight(qkv_weight, x), cuda.parameter(qkv_bias, x),
        cuda.weight(proj_weight, x), cuda.parameter(proj_bias, x),
        None if scale is None else cuda.aligned(scale.float().contiguous()),
        h, w, clusters, y,
        s if save_for_backward else None, q if stores_q else None, mass if save_for_backward else None,
    )  # fmt: skip
    return y, s, q if save_for_backward else x.new_empty(0), mass
