"""Sampling and upsampling for exported graphs (ONNX, torch.export): the reference's results with a quarter of its
nodes. Letters as in reference.py.

A depthwise 3 x 3 convolution of the super tokens, zero-padded, picks the neighbours. The transposed convolution sums
over them. Super tokens are maps (B, C, hh, ww) here.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from svit.ops._dispatch import Plan
from svit.ops._numerics import widen

from .reference import layer_norm


def is_whole(length: int, cell: int) -> bool:
    """Whether cells are known to cover `length` pixels without padding. For a dynamic size they are not."""
    return isinstance(length, int) and length % cell == 0


def to_cells(x: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Cuts a map (B, H, W, C) into cells (B, hh, ww, P, C), zero-padded on the right and the bottom to whole cells."""
    h, w = cell
    B, H, W, C = x.shape
    hh, ww = (H + h - 1) // h, (W + w - 1) // w
    if not (is_whole(H, h) and is_whole(W, w)):
        x = F.pad(x, (0, 0, 0, ww * w - W, 0, hh * h - H))
    return x.reshape(B, hh, h, ww, w, C).transpose(2, 3).reshape(B, hh, ww, h * w, C)


def from_cells(x: torch.Tensor, cell: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Cells (B, hh, ww, C, P) to a map, cropped to `size`: (B, C, H, W)."""
    h, w = cell
    B, hh, ww, C, _ = x.shape
    # A cell's row stays contiguous, so that runtimes copy it at once.
    x = x.reshape(B, hh, ww, C, h, w).permute(0, 3, 1, 4, 2, 5).reshape(B, C, hh * h, ww * w)
    if not (is_whole(size[0], h) and is_whole(size[1], w)):
        x = F.pad(x, (0, size[1] - ww * w, 0, size[0] - hh * h))
    return x


def taps(s: torch.Tensor, channels: int) -> torch.Tensor:
    """Kernels (9 * channels, 1, 3, 3) in the dtype of s: 9 for each channel, and each picks one neighbour."""
    return torch.eye(9, dtype=s.dtype, device=s.device).reshape(9, 1, 3, 3).repeat(channels, 1, 1, 1)


def neighbours(s: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """(B, C, hh, ww) to (B, hh, ww, C, 9), times `factor`."""
    B, C, hh, ww = s.shape
    s = F.conv2d(s, taps(s, C) * factor, padding=1, groups=C)
    return s.reshape(B, C, 9, hh, ww).permute(0, 3, 4, 1, 2)


def sum_neighbours(s: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Adjoint of `neighbours`, plus `bias`: (B, 9 * C, hh, ww) to (B, C, hh, ww)."""
    C = s.shape[1] // 9
    return F.conv_transpose2d(s, taps(s, C), bias, padding=1, groups=C)


def associate(cells: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """q (B, hh, ww, 9, P) of cells (B, hh, ww, P, C) and super tokens (B, C, hh, ww)."""
    logits = torch.matmul(neighbours(s, s.shape[1] ** -0.5).transpose(-1, -2), cells.transpose(-1, -2))
    return widen(logits).softmax(3).to(cells.dtype)


def aggregate(cells: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Super tokens (B, C, hh, ww)."""
    B, hh, ww, _, C = cells.shape
    pixels = F.pad(widen(cells), (0, 1), value=1.0)  # a channel of ones, whose weighted sum is the mass
    total = torch.matmul(widen(q), pixels).permute(0, 4, 3, 1, 2).reshape(B, (C + 1) * 9, hh, ww)
    tiny = F.pad(total.new_full((1,), 1e-12), (C, 0))  # a bias: graph optimizers remove such an addition
    total, mass = sum_neighbours(total, tiny).split((C, 1), dim=1)
    return (total / mass).to(cells.dtype)


def sample(
    x: torch.Tensor,
    cell: tuple[int, int],
    n_iter: int = 1,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    differentiable: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Super tokens (B, hh, ww, C) and association q (B, hh, ww, 9, P)."""
    if weight is not None:
        x = layer_norm(x, weight, bias, eps)
    cells = to_cells(x, cell)
    pixels = cells if differentiable else cells.detach()  # as in the reference
    q = associate(pixels, widen(pixels).mean(3).to(cells.dtype).permute(0, 3, 1, 2))
    for _ in range(n_iter - 1):
        q = associate(pixels, aggregate(pixels, q))
    return aggregate(cells, q).permute(0, 2, 3, 1), q


def spread(
    s: torch.Tensor,
    q: torch.Tensor,
    cell: tuple[int, int],
    size: tuple[int, int],
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each pixel's weighted sum of its 9 super tokens, plus the residual: (B, H, W, C)."""
    cells = torch.matmul(neighbours(s.permute(0, 3, 1, 2)), q.to(s.dtype))
    y = from_cells(cells, cell, size)
    if residual is not None:
        y = (residual.permute(0, 3, 1, 2) + y).to(residual.dtype)
    return y.permute(0, 2, 3, 1)


PLAN = Plan("sample", "reference", SimpleNamespace(sample=sample, spread=spread), False)
