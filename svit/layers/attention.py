from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, use_fused_attn
from torch import nn

from svit.ops import _dispatch, sample, spread, super_token_attention
from svit.ops._checks import is_integer, positive_int
from svit.ops._dispatch import Plan, choose_plan, exporting, transformed
from svit.ops._numerics import autocast_dtype
from svit.ops.attention.composition import attention_half
from svit.ops.super_token import graph

from . import folding
from .checks import check_map, pair
from .fusing import (
    DROPS,
    default_backend,
    dropout_inactive,
    is_plain_pointwise,
    pointwise,
    renamed,
    runs_packed,
    runs_stock_forward,
)

torch.fx.wrap("check_map")
# One step each in a graph of torch.fx, so that timm's AttentionExtract finds the attention's softmax and no other.
torch.fx.wrap("sample")
torch.fx.wrap("spread")

REFERENCE = Plan("sample", "reference", _dispatch.REFERENCE, False)  # PyTorch's operations, module by module


class SuperTokenAttention(nn.Module):
    """Super token attention (paper: section 3.2).

    Sampling averages the pixels into one super token for each cell. The weights are a soft association of each pixel
    with the 3 x 3 super tokens around its cell. The super tokens attend to each other. Upsampling gives each pixel the
    weighted sum of its 9 super tokens. With cells of one pixel the layer is plain global attention among the pixels.

    Args:
        dim: channels C.
        num_heads: attention heads, a divisor of `dim`.
        stoken_size: height and width of a cell in pixels: an int or a pair.
        n_iter: rounds of association, at least 1.
        differentiable_association: pass gradients through the association too. The output is the same. The paper and
            every published model have False.
        attn_drop: dropout rate of the attention weights among super tokens.
        proj_drop: dropout rate after the output projection.
        backend: of sampling and upsampling: None for the best backend that serves the input, or the name of one. If
            timm's fused attention is off, or the model is made for export or scripting, None means 'reference'. A
            differentiable association needs 'reference'.

    Shape: (B, dim, H, W) to the same shape, any floating dtype, H and W of at least 1. Channels-last is fastest.

    Raises:
        ValueError: an argument out of range, or an input of another shape.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int | tuple[int, int] = 1,
        n_iter: int = 1,
        differentiable_association: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_integer(num_heads) or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim {dim}, got {num_heads!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = int(dim)
        self.num_heads = int(num_heads)
        self.cell = pair(stoken_size, "stoken_size")
        self.n_iter = positive_int(n_iter, "n_iter")
        self.differentiable_association = differentiable_association
        self.fused_attn = use_fused_attn()
        if differentiable_association and backend not in (None, "reference"):
            raise ValueError(f"backend: expected 'reference' for a differentiable association, got {backend!r}")
        self.backend = "reference" if differentiable_association else default_backend(backend)

        self.qkv = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, way: str = "") -> torch.Tensor:
        """Runs the layer. `way` is "reference" if the caller has chosen that; with "" the layer chooses."""
        x = check_map(x, self.dim)
        if self.cell == (1, 1):
            return self.attend(x)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles what stands behind an `and`
            if isinstance(x, torch.Tensor):  # not so in torch.fx
                x = x.permute(0, 2, 3, 1)
                plan = REFERENCE if way == "reference" else choose_plan("sample", x, self.backend)
                if plan.backend == "reference" and exporting():
                    plan = graph.PLAN
                sampling, upsampling = plan.ops.sample, plan.ops.spread
                if plan.backend != "reference":
                    x = x.to(autocast_dtype(x)).contiguous()
                elif self.differentiable_association:
                    sampling = partial(sampling, differentiable=True)
                half = x, self.cell, self.n_iter, None, None, 0.0, self.attend_tokens, None, None
                return attention_half(*half, sampling, upsampling)[0].permute(0, 3, 1, 2)
        B, C, H, W = x.shape
        s, q = sample(
            x.permute(0, 2, 3, 1),
            self.cell,
            self.n_iter,
            differentiable=self.differentiable_association,
            backend=self.backend,
        )
        s = self.attend(s.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return spread(s, q, self.cell, (H, W), backend=self.backend).permute(0, 3, 1, 2)

    @torch.jit.ignore
    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether `forward_residual` saves passes over x: a backend serves x that includes the norm and the sum."""
        return isinstance(x, torch.Tensor) and self.choose_plan(x).backend != "reference"

    @torch.jit.ignore
    def choose_plan(self, x: torch.Tensor, norm: LayerNorm2d | None = None) -> Plan:
        """Chooses what runs x + self(norm(x)) for x (B, dim, H, W).

        The caller has checked that neither module is hooked or changed. If the plan's backend is the reference, the
        modules run one by one, else `forward_residual` runs.
        """
        if self.cell == (1, 1):
            return REFERENCE
        x = x.permute(0, 2, 3, 1)
        if self.n_iter == 1:
            sizes: dict[str, Any] = {"cell": self.cell, "num_heads": self.num_heads}
            plan = choose_plan("super_token_attention", x, self.backend, strict=False, **sizes)
            if plan.backend != "reference" and self.layers_are_stock():
                return plan
        parameters = () if norm is None else ((norm.weight, (self.dim,)), (norm.bias, (self.dim,)))
        return choose_plan("sample", x, self.backend, parameters)

    @torch.jit.ignore
    def layers_are_stock(self) -> bool:
        """Whether the child modules are plain: no active dropout, no hooks, no wrappers."""
        drops = self.attn_drop, self.proj_drop
        if not (runs_stock_forward(dict.fromkeys(drops, DROPS)) and dropout_inactive(*drops)):
            return False
        return all(is_plain_pointwise(conv) and conv.bias is not None for conv in (self.qkv, self.proj))

    @torch.jit.ignore
    def forward_residual(
        self,
        x: torch.Tensor,
        norm: LayerNorm2d,
        scale: Callable[[torch.Tensor], torch.Tensor] | None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Runs x + scale(self(norm(x))) in fewer passes: it reads x three times, or once, and writes the result once.

        Args:
            x: map (B, dim, H, W).
            norm: the sampling includes it.
            scale: a function that multiplies a map (B, dim, ., .) by a factor for each channel and image, such as layer
                scale and drop path, or None. It is applied to the super tokens, since upsampling is linear.
            plan: the result of `choose_plan`, or None to choose here.
        """
        plan = self.choose_plan(x, norm) if plan is None else plan
        x = check_map(x, self.dim).permute(0, 2, 3, 1)
        if plan.op == "super_token_attention":
            factors = None
            if scale is not None:
                factors = scale(torch.ones(x.shape[0], self.dim, 1, 1, device=x.device)).flatten(1)
            qkv, proj = self.qkv, self.proj
            # The plan says that both have a bias.
            assert qkv.bias is not None
            assert proj.bias is not None
            y = super_token_attention(
                x, self.cell, norm.weight, norm.bias, norm.eps, qkv.weight.flatten(1), qkv.bias, proj.weight.flatten(1),
                proj.bias, self.num_heads, factors, self.backend,
            )  # fmt: skip
            return y.permute(0, 3, 1, 2)
        y = attention_half(
            x.to(autocast_dtype(x)).contiguous(),
            self.cell,
            self.n_iter,
            norm.weight,
            norm.bias,
            norm.eps,
            self.attend_tokens,
            None if scale is None else partial(scale_tokens, scale),
            x.contiguous(),
            plan.ops.sample,
            plan.ops.spread,
        )[0]
        return y.permute(0, 3, 1, 2)

    @torch.jit.ignore
    def attend_tokens(self, s: torch.Tensor) -> torch.Tensor:
        """`attend` for super tokens (B, hh, ww, C). The result is contiguous and keeps their dtype, as kernels need."""
        y = self.attend(s.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if y.shape != s.shape:
            raise ValueError(f"proj: expected a map of {s.shape[3]} channels, got {list(y.permute(0, 3, 1, 2).shape)}")
        return y.to(s.dtype).contiguous()

    fuses, add_to = renamed("fuses", "can_fuse"), renamed("add_to", "forward_residual")

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Multi-head self-attention among all H * W tokens of a map (B, C, H, W)."""
        B, C, H, W = x.shape
        d = self.dim // self.num_heads
        packed = False
        if not torch.jit.is_scripting():
            if not self.fused_attn and exporting():
                return self.attend_in_graph(x)
            packed = runs_packed(x, self.qkv, self.proj)
        # Channels must be contiguous, else PyTorch's attention falls back to one that stores the N x N map.
        qkv = self.qkv(x) if torch.jit.is_scripting() else pointwise(self.qkv, x, packed)
        qkv = qkv.permute(0, 2, 3, 1).contiguous().reshape(B, H * W, self.num_heads, 3, d)
        q, k, v = qkv.transpose(1, 2).unbind(3)  # (B, heads, N, d) each
        fused = self.fused_attn
        if not torch.jit.is_scripting():
            # PyTorch's fused attention has no jvp, no second derivative and no other dropout. As in all of timm, hooks
            # of the dropout layer do not run then; `timm.layers.set_fused_attn(False)` makes them run.
            fused = fused and not transformed() and type(self.attn_drop) is nn.Dropout
        if fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.attn_drop.training else 0.0)
        else:
            attn = torch.matmul(q * d**-0.5, k.transpose(-1, -2)).softmax(-1)
            x = torch.matmul(self.attn_drop(attn), v)
        x = x.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        x = self.proj(x) if torch.jit.is_scripting() else pointwise(self.proj, x, packed)
        return self.proj_drop(x)

    @torch.jit.ignore
    def attend_in_graph(self, x: torch.Tensor) -> torch.Tensor:
        """`attend` for exported graphs: tokens are the last dimension, and the weights of q include the scale."""
        B, C, H, W = x.shape
        d = self.dim // self.num_heads
        if is_plain_pointwise(self.qkv):
            scales = x.new_full((d,), d**-0.5), x.new_ones(2 * d)
            factor = torch.cat(scales).repeat(self.num_heads)
            weight, bias = self.qkv.weight * factor.view(-1, 1, 1, 1), self.qkv.bias
            qkv, scale = F.conv2d(x, weight, None if bias is None else bias * factor), 1.0
        else:
            qkv, scale = self.qkv(x), d**-0.5
        q, k, v = qkv.reshape(B, self.num_heads, 3 * d, H * W).split(d, dim=2)  # (B, heads, d, N) each
        q = q if scale == 1.0 else q * scale
        attn = torch.matmul(k.transpose(-1, -2), q).softmax(-2)  # each query is a column
        x = torch.matmul(v, self.attn_drop(attn)).reshape(B, C, H, W)
        return self.proj_drop(self.proj(x))

    def fuse(self) -> "SuperTokenAttention":
        """Lets oneDNN keep the weights of both convolutions in its own layout, for inference on a CPU."""
        folding.keep_packed(self.backend, self.qkv, self.proj)
        return self


def scale_tokens(scale: Callable[[torch.Tensor], torch.Tensor], s: torch.Tensor) -> torch.Tensor:
    """Applies `scale`, a function of maps (B, C, ., .), to super tokens (B, hh, ww, C)."""
    return scale(s.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).to(s.dtype).contiguous()
