"""Super-token sampling in plain PyTorch: any device, any floating dtype, any cell. The oracle of every other backend.

Shapes are named by these letters (the maths is in README.md beside this file):

    B  batch            H, W    pixels of the map         C  channels
    P  pixels a cell    hh, ww  cells of the grid, each with one super token
    9  the 3 x 3 super tokens around a pixel's own cell, row-major from the top left

Nothing here branches on a shape, so that every function can be scripted, traced and exported with dynamic sizes; these
are taken in ways that keep symbolic sizes simple (`narrow`, which gives the length it is told, not slices).
"""

import torch
import torch.nn.functional as F


@torch.fx.wrap
def widen(x: torch.Tensor) -> torch.Tensor:
    """float32 at least: sums over a cell's pixels lose their small terms in 16 bit, and 1e-12 is 0 in float16."""
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


@torch.fx.wrap
def wide_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
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
    # torch.compile cannot look into the first question, which matters to devices it does not know (meta).
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


@torch.fx.wrap
def depthwise3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x + depthwise 3x3 convolution of x: (B, C, H, W), weight (C, 1, 3, 3), bias (C,) to (B, C, H, W)."""
    if computes_in_16_bit(x):
        return x + F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    # The centre tap takes the residual in, which saves a pass; in 16 bit it would lose digits to the 1.
    identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
    return F.conv2d(x, weight + identity, bias, padding=1, groups=x.shape[1])


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
    # Not a view, which is contiguous only if nothing is cropped: a compiled or exported model would hold to one case.
    return F.pad(x, (0, 0, 0, size[1] - ww * w, 0, size[0] - hh * h))


def neighbours(s: torch.Tensor) -> torch.Tensor:
    """The 3 x 3 super tokens around each cell, zero outside the grid: (B, hh, ww, C) -> (B, hh, ww, 9, C)."""
    B, hh, ww, C = s.shape
    s = F.pad(s, (0, 0, 1, 1, 1, 1))
    return torch.stack([s.narrow(1, k // 3, hh).narrow(2, k % 3, ww) for k in range(9)], dim=3)


def sum_neighbours(s: torch.Tensor) -> torch.Tensor:
    """Adjoint of `neighbours`: what 9 cells hold for one super token, summed: (B, hh, ww, 9, C) -> (B, hh, ww, C)."""
    B, hh, ww, K, C = s.shape
    s = F.pad(s, (0, 0, 0, 0, 1, 1, 1, 1))
    # Super token (y, x) is neighbour k of the cell at (y + 1 - k // 3, x + 1 - k % 3).
    shares = [s.select(3, k).narrow(1, 2 - k // 3, hh).narrow(2, 2 - k % 3, ww) for k in range(9)]
    return torch.stack(shares).sum(0)


def associate(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """q (B, hh, ww, 9, P), the softmax over 9 of <pixel, super token> / sqrt(C); x in cells, s (B, hh, ww, C).

    A neighbour outside the grid is a zero vector: its logit is 0 and it takes its share.
    """
    logits = torch.matmul(neighbours(s * x.shape[-1] ** -0.5), x.transpose(-1, -2))
    return widen(logits).softmax(3)


def aggregate(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Super tokens (B, hh, ww, C), the q-weighted means of the pixels of 9 cells; x in cells, q (B, hh, ww, 9, P)."""
    total = sum_neighbours(wide_matmul(q, widen(x)))
    mass = sum_neighbours(q.sum(-1, keepdim=True))
    return total / (mass + 1e-12)


def sample(
    x: torch.Tensor, cell: tuple[int, int], n_iter: int = 1, differentiable: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Super-token sampling of a map x (B, H, W, C): super tokens s (B, hh, ww, C), association q (B, hh, ww, 9, P)."""
    cells = to_cells(x, cell)
    # q is a constant to autograd (model and paper): s then depends on x through the last weighted mean alone.
    pixels = cells if differentiable else cells.detach()
    s = widen(pixels).mean(3)
    q = associate(pixels, s.to(x.dtype))
    for _ in range(n_iter - 1):
        q = associate(pixels, aggregate(pixels, q).to(x.dtype))
    return aggregate(cells, q).to(x.dtype), q


def spread(s: torch.Tensor, q: torch.Tensor, cell: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Map (B, H, W, C) whose pixels are the q-weighted sums of their 9 super tokens; a missing one adds zero."""
    cells = torch.matmul(q.to(s.dtype).transpose(-1, -2), neighbours(s))
    return from_cells(cells, cell, size)
