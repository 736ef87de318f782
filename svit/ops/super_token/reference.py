"""Super-token sampling and upsampling in plain PyTorch, on any device, in any floating dtype, with any cell. The other
backends are tested against it.

Shapes are named by these letters (README.md has the maths):

    B  batch            H, W    pixels of the map         C  channels
    P  pixels a cell    hh, ww  cells of the grid, each with one super token
    9  the 3 x 3 super tokens around a pixel's own cell, row-major from the top left

No function branches on a shape, so that all can be scripted, traced and exported with dynamic sizes. `narrow` in place
of slices keeps symbolic sizes simple.
"""

import torch
import torch.nn.functional as F

from svit.ops._numerics import matmul_in_own_dtype, widen


def to_cells(x: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Cuts a map (B, H, W, C) into cells (B, hh, ww, P, C), zero-padded on the right and the bottom to whole cells."""
    h, w = cell
    B, H, W, C = x.shape
    hh, ww = (H + h - 1) // h, (W + w - 1) // w
    x = F.pad(x, (0, 0, 0, ww * w - W, 0, hh * h - H))
    return x.reshape(B, hh, h, ww, w, C).transpose(2, 3).reshape(B, hh, ww, h * w, C)


def from_cells(x: torch.Tensor, cell: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Puts cells (B, hh, ww, P, C) together again and crops to `size`: (B, H, W, C)."""
    h, w = cell
    B, hh, ww, P, C = x.shape
    x = x.reshape(B, hh, ww, h, w, C).transpose(2, 3).reshape(B, hh * h, ww * w, C)
    # A view is contiguous only if nothing is cropped, and a compiled or exported model would fix one of the two cases.
    return F.pad(x, (0, 0, 0, size[1] - ww * w, 0, size[0] - hh * h))


def neighbours(s: torch.Tensor) -> torch.Tensor:
    """The 3 x 3 super tokens around each cell, zero outside the grid: (B, hh, ww, C) -> (B, hh, ww, 9, C)."""
    B, hh, ww, C = s.shape
    s = F.pad(s, (0, 0, 1, 1, 1, 1))
    # No loop: in a loop TorchScript loses track of what requires grad.
    rows = torch.stack((s.narrow(1, 0, hh), s.narrow(1, 1, hh), s.narrow(1, 2, hh)), dim=3)
    return torch.stack((rows.narrow(2, 0, ww), rows.narrow(2, 1, ww), rows.narrow(2, 2, ww)), dim=4).flatten(3, 4)


def sum_neighbours(s: torch.Tensor) -> torch.Tensor:
    """Adjoint of `neighbours`, the sum of 9 cells' shares of a super token: (B, hh, ww, 9, C) -> (B, hh, ww, C)."""
    # Super token (y, x) is neighbour k of the cell at (y + 1 - k // 3, x + 1 - k % 3). So each share moves by one cell.
    # Padding does that, with a negative width where the share leaves the grid. Its backward makes no map of zeros.
    shares = [F.pad(share, (0, 0, k % 3 - 1, 1 - k % 3, k // 3 - 1, 1 - k // 3)) for k, share in enumerate(s.unbind(3))]
    return torch.stack(shares).sum(0)


def associate_cells(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """q (B, hh, ww, 9, P) from cells (B, hh, ww, P, C) and super tokens (B, hh, ww, C).

    A neighbour outside the grid is a zero vector: its logit is 0, and its share of the pixel is lost.
    """
    logits = torch.matmul(neighbours(s * x.shape[-1] ** -0.5), x.transpose(-1, -2))
    return widen(logits).softmax(3).to(x.dtype)


def aggregate_cells(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Total (B, hh, ww, C) and mass (B, hh, ww) of each super token, float32 at least."""
    q = widen(q)
    return sum_neighbours(matmul_in_own_dtype(q, widen(x))), sum_neighbours(q.sum(-1, keepdim=True)).squeeze(-1)


def weighted_mean(total: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return total / (mass.unsqueeze(-1) + 1e-12)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalises over the channels. Under autocast the parameters have more bits than x."""
    bias = None if bias is None else widen(bias)
    return F.layer_norm(widen(x), [x.shape[-1]], widen(weight), bias, eps).to(x.dtype)


def associate(x: torch.Tensor, s: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Association q (B, hh, ww, 9, P) of the pixels of a map (B, H, W, C) with super tokens (B, hh, ww, C)."""
    return associate_cells(to_cells(x, cell), s)


def aggregate(x: torch.Tensor, q: torch.Tensor, cell: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums (B, hh, ww, C) and masses (B, hh, ww) of a map (B, H, W, C), in float32 at least."""
    return aggregate_cells(to_cells(x, cell), q)


def spread(
    s: torch.Tensor,
    q: torch.Tensor,
    cell: tuple[int, int],
    size: tuple[int, int],
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each pixel's mean of the nine super tokens around it, weighted by q, plus the residual: map (B, H, W, C)."""
    cells = torch.matmul(q.to(s.dtype).transpose(-1, -2), neighbours(s))
    y = from_cells(cells, cell, size)
    return y if residual is None else (residual + y).to(residual.dtype)


def sample(
    x: torch.Tensor,
    cell: tuple[int, int],
    n_iter: int = 1,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    differentiable: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Super tokens s (B, hh, ww, C), association q (B, hh, ww, 9, P), mass (B, hh, ww)."""
    if weight is not None:
        x = layer_norm(x, weight, bias, eps)
    cells = to_cells(x, cell)
    # q is a constant to autograd, as in the paper: s depends on x through the last weighted mean alone.
    pixels = cells if differentiable else cells.detach()
    s = widen(pixels).mean(3)
    q = associate_cells(pixels, s.to(x.dtype))
    for _ in range(n_iter - 1):
        total, mass = aggregate_cells(pixels, q)
        q = associate_cells(pixels, weighted_mean(total, mass).to(x.dtype))
    total, mass = aggregate_cells(cells, q)
    return weighted_mean(total, mass).to(x.dtype), q, mass


def sample_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    q: torch.Tensor,
    mass: torch.Tensor,
    cell: tuple[int, int],
    weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x and of the layer norm's weight and bias (float32 at least; empty without a norm)."""
    share = widen(grad) / (mass.unsqueeze(-1) + 1e-12)
    dx = spread(share, widen(q), cell, (x.shape[1], x.shape[2]))
    if weight is None:
        return dx.to(x.dtype), dx.new_empty(0), dx.new_empty(0)
    x = widen(x)
    mean = x.mean(-1, keepdim=True)
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    normed = (x - mean) * rstd
    dweight, dbias = (dx * normed).sum((0, 1, 2)), dx.sum((0, 1, 2))
    dx = dx * weight
    dx = rstd * (dx - dx.mean(-1, keepdim=True) - normed * (dx * normed).mean(-1, keepdim=True))
    return dx.to(q.dtype), dweight, dbias
