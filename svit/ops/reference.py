"""The ops in plain PyTorch: any device, any floating dtype, any cell. The oracle of every other backend.

Shapes are named by these letters (the maths is in docs/ops.md):

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
    # Super token (y, x) is neighbour k of the cell at (y + 1 - k // 3, x + 1 - k % 3): each share moves by one cell, in
    # at one border and out at the other. Padding alone does it, whose backward needs no map of zeros for each step.
    shares = [F.pad(share, (0, 0, k % 3 - 1, 1 - k % 3, k // 3 - 1, 1 - k // 3)) for k, share in enumerate(s.unbind(3))]
    return torch.stack(shares).sum(0)


def associate_cells(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """q (B, hh, ww, 9, P) from cells (B, hh, ww, P, C) and super tokens (B, hh, ww, C).

    A neighbour outside the grid is a zero vector: its logit is 0 and it takes its share.
    """
    logits = torch.matmul(neighbours(s * x.shape[-1] ** -0.5), x.transpose(-1, -2))
    return widen(logits).softmax(3).to(x.dtype)


def aggregate_cells(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Total (B, hh, ww, C) and mass (B, hh, ww) of each super token, float32 at least."""
    q = widen(q)
    return sum_neighbours(wide_matmul(q, widen(x))), sum_neighbours(q.sum(-1, keepdim=True)).squeeze(-1)


def weighted_mean(total: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return total / (mass.unsqueeze(-1) + 1e-12)


def associate(x: torch.Tensor, s: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    return associate_cells(to_cells(x, cell), s)


def aggregate(x: torch.Tensor, q: torch.Tensor, cell: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return aggregate_cells(to_cells(x, cell), q)


def spread(
    s: torch.Tensor,
    q: torch.Tensor,
    cell: tuple[int, int],
    size: tuple[int, int],
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
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
        # The parameters may be wider than x, and are where autocast chose the dtype of x.
        x = F.layer_norm(widen(x), [x.shape[-1]], widen(weight), None if bias is None else widen(bias), eps).to(x.dtype)
    cells = to_cells(x, cell)
    # q is a constant to autograd (model and paper): s then depends on x through the last weighted mean alone.
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


def depthwise3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, gelu: bool = False) -> torch.Tensor:
    x, weight, bias = x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype)
    if gelu:
        x = F.gelu(x)
    if computes_in_16_bit(x):
        y = x + F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    else:
        # The centre tap takes the residual in, which saves a pass; in 16 bit it would lose digits to the 1.
        identity = F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        y = F.conv2d(x, weight + identity, bias, padding=1, groups=x.shape[1])
    return y.permute(0, 2, 3, 1)


def depthwise3x3_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias; the last two float32 at least."""
    g, x = (widen(t.permute(0, 3, 1, 2)) for t in (grad, x))
    weight = weight.to(x.dtype)
    u = F.gelu(x) if gelu else x
    C = x.shape[1]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        g, u, weight, [C], [1, 1], [1, 1], [1, 1], False, [0, 0], C, [True, True, True]
    )
    dx = dx + g
    if gelu:
        dx = torch.ops.aten.gelu_backward(dx, x)
    return dx.permute(0, 2, 3, 1).to(grad.dtype), dweight, dbias


def bias_gelu_affine(x: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """GELU(x + bias) * scale + shift, float32 at least, to the dtype of x."""
    u = widen(x)
    u = F.gelu(u + bias.to(u.dtype))
    return (u * scale.to(u.dtype) + shift.to(u.dtype)).to(x.dtype)


def attend(
    s: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Self-attention among all super tokens of an image: (B, hh, ww, C) to the same. qkv comes head by head."""
    B, hh, ww, C = s.shape
    qkv = F.linear(s.flatten(1, 2), qkv_weight.to(s.dtype), qkv_bias.to(s.dtype))
    q, k, v = qkv.reshape(B, hh * ww, num_heads, 3, C // num_heads).transpose(1, 2).unbind(3)
    result = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, hh, ww, C)
    return F.linear(result, proj_weight.to(s.dtype), proj_bias.to(s.dtype))


def attend_backward(
    grad: torch.Tensor,
    s: torch.Tensor,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    scale: torch.Tensor | None,
    num_heads: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `attend(s, ...) * scale`: of s, the four parameters and scale (B, C), float32 at least.

    Written out, since it runs inside of a backward, where compilers follow no other backward.
    """
    B, hh, ww, C = s.shape
    d = C // num_heads
    s, qkv_weight, qkv_bias, proj_weight, proj_bias = map(widen, (s, qkv_weight, qkv_bias, proj_weight, proj_bias))
    s, grad = s.flatten(1, 2), widen(grad).flatten(1, 2)  # (B, N, C)
    q, k, v = F.linear(s, qkv_weight, qkv_bias).reshape(B, -1, num_heads, 3, d).transpose(1, 2).unbind(3)
    weights = (q @ k.transpose(-1, -2) * d**-0.5).softmax(-1)  # (B, heads, N, N)
    result = (weights @ v).transpose(1, 2).reshape(B, -1, C)
    dscale = (grad * F.linear(result, proj_weight, proj_bias)).sum(1)
    if scale is not None:
        grad = grad * widen(scale).unsqueeze(1)
    dproj = torch.einsum("bno,bni->oi", grad, result), grad.sum((0, 1))
    dresult = (grad @ proj_weight).reshape(B, -1, num_heads, d).transpose(1, 2)
    dweights = dresult @ v.transpose(-1, -2)
    dlogits = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * d**-0.5
    dqkv = torch.stack([dlogits @ k, dlogits.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dresult], dim=3)
    dqkv = dqkv.transpose(1, 2).reshape(B, -1, 3 * C)
    ds = (dqkv @ qkv_weight).reshape(B, hh, ww, C)
    return ds, torch.einsum("bno,bni->oi", dqkv, s), dqkv.sum((0, 1)), *dproj, dscale


def super_token_attention(
    x: torch.Tensor,
    cell: tuple[int, int],
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    scale: torch.Tensor | None,
    num_heads: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + scale * attention(norm(x)), and s, q and mass of the sampling (empty without `keep`)."""
    s, q, mass = sample(x, cell, 1, norm_weight, norm_bias, eps)
    tokens = attend(s, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
    if scale is not None:
        tokens = tokens * scale[:, None, None].to(tokens.dtype)
    y = spread(tokens, q, cell, (x.shape[1], x.shape[2]), x)
    return (y, s, q, mass) if keep else (y, s.new_empty(0), q.new_empty(0), mass.new_empty(0))


def conv_ffn(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    depthwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> torch.Tensor:
    """residual + 1x1 conv of u + depthwise conv of u, with u = GELU(1x1 conv of x)."""
    u = depthwise3x3(F.linear(x, weight1.to(x.dtype), bias1.to(x.dtype)), depthwise_weight, depthwise_bias, gelu=True)
    return residual + F.linear(u, weight2.to(x.dtype), bias2.to(x.dtype))
