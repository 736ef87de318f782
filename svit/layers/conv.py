"""The convolutional layers of the network. Each keeps a channels-last map channels-last.

`fuse()` folds a BatchNorm into a convolution, for inference, if that is exact. It returns the module, as timm's
`reparameterize_model` expects. A second call changes nothing. Norms of another class stay, and so does a BatchNorm
without running statistics. A BatchNorm in train mode raises a ValueError, and so does a convolution or BatchNorm that
is hooked, parametrized, pruned or wrapped. Nothing has changed then. The stem has no `fuse()`: its BatchNorms stand
between a GELU and a zero-padded convolution, where a folded shift would be wrong at the borders.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_act_layer, get_norm_layer
from torch import nn

from svit.ops import _dispatch, depthwise3x3
from svit.ops._dispatch import Plan, choose_plan
from svit.ops._numerics import autocast_dtype, widen

from . import folding
from .checks import check_map
from .fusing import (
    DROPS,
    POINTWISE,
    Expected,
    convolve,
    default_backend,
    dropout_inactive,
    for_other_programs,
    pointwise,
    renamed,
    runs_stock_forward,
)

torch.fx.wrap("check_map")
torch.fx.wrap("depthwise3x3")

# Plans without a fused half-block: each layer runs by itself, or the depthwise convolution includes the GELU.
LAYERS = Plan("layers", "reference", _dispatch.REFERENCE, False)
GELU_INSIDE = LAYERS._replace(op="depthwise3x3")


class ResidualDepthwiseConv(nn.Conv2d):
    """Adds to x its depthwise 3x3 convolution, with bias: (B, dim, H, W) to the same shape.

    It is the conditional positional encoding (CPE) of a block and the middle of its conv-FFN (paper: section 3.1). With
    `gelu`, the forward method takes GELU(x) (exact) in the place of x. `backend` as in `SuperTokenAttention`. With a
    `dilation` above 1, or another `padding_mode` set later, PyTorch's convolution runs on every backend.
    """

    bias: torch.Tensor  # the bias of nn.Conv2d may be None, which TorchScript would not pass on

    def __init__(
        self,
        dim: int,
        backend: str | None = None,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim, device=device, dtype=dtype)
        self.backend = default_backend(backend)

    def forward(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        if self.dilation[0] > 1 or self.padding_mode != "zeros":
            x = F.gelu(x) if gelu else x
            return x + self._conv_forward(x, self.weight, self.bias)
        x = x.permute(0, 2, 3, 1)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles what stands behind an `and`
            if isinstance(x, torch.Tensor) and x.shape[3] == self.out_channels:
                parameters = (self.weight, (self.out_channels, 1, 3, 3)), (self.bias, (self.out_channels,))
                plan = choose_plan("depthwise3x3", x, self.backend, parameters)
                if plan.backend != "reference":
                    x = x.contiguous()
                return plan.ops.depthwise3x3(x, self.weight, self.bias, gelu).permute(0, 3, 1, 2)
        return depthwise3x3(x, self.weight, self.bias, gelu, self.backend).permute(0, 3, 1, 2)


class ConvFFN(nn.Module):
    """The feed-forward part of a block (paper: section 3.1): BatchNorm, 1x1 conv, GELU, x + depthwise conv, 1x1 conv.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two 1x1 convolutions.
        drop: dropout rate after the activation and after the second 1x1 convolution.
        norm_layer: class of the norm, or timm's name for it.
        act_layer: class of the activation, or timm's name for it.
        backend: of the depthwise convolution, as in `SuperTokenAttention`.
        dilation: of the depthwise convolution.

    Shape: (B, dim, H, W) to the same shape.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        act_layer: str | type[nn.Module] = nn.GELU,
        backend: str | None = None,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = get_norm_layer(norm_layer)(dim, **dd)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = get_act_layer(act_layer)()
        self.drop1 = nn.Dropout(drop)
        self.dwconv = ResidualDepthwiseConv(hidden_dim, backend, dilation, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, way: str = "") -> torch.Tensor:
        """Runs the layer. `way` is the op of a plan that the caller has chosen; with "" the layer chooses."""
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles what stands behind an `and`
            if way == "":
                plan = self.choose_plan(x, residual=False)
                if plan.op == "conv_ffn":
                    return self.forward_fused(x, plan)
                way = plan.op
        x = self.norm(x)
        x = self.fc1(x) if torch.jit.is_scripting() else pointwise(self.fc1, x)
        x = self.dwconv(x, True) if way == "depthwise3x3" else self.dwconv(self.drop1(self.act(x)))
        x = self.fc2(x) if torch.jit.is_scripting() else pointwise(self.fc2, x)
        return self.drop2(x)

    @torch.jit.ignore
    def choose_plan(self, x: torch.Tensor, residual: bool) -> Plan:
        """Chooses what runs x + self(x), or self(x) alone, for x (B, dim, H, W), by the current state of the layers.

        The op of the plan is "conv_ffn" if `forward_fused` serves x: in inference, with a backend that runs the fused
        half-block. It is "depthwise3x3" if that op can include the GELU, else "layers".
        """
        if not isinstance(x, torch.Tensor) or torch.jit.is_tracing():  # a trace would record the steps taken here
            return LAYERS
        fc1, dwconv, fc2 = self.fc1, self.dwconv, self.fc2
        middle: Expected = {self.act: nn.GELU, self.drop1: DROPS, dwconv: ResidualDepthwiseConv}
        stock = runs_stock_forward({**middle, fc1: nn.Conv2d, fc2: nn.Conv2d, self.drop2: DROPS})
        if not (stock or runs_stock_forward(middle)) or self.act.approximate != "none":
            return LAYERS
        if not stock or ((self.drop1.training or self.drop2.training) and not dropout_inactive(self.drop1, self.drop2)):
            return GELU_INSIDE if dropout_inactive(self.drop1) else LAYERS
        dim, hidden = x.shape[1], fc1.out_channels
        weights = fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias
        shapes = (hidden, dim, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (dim, hidden, 1, 1), (dim,)
        if (
            torch.is_grad_enabled()
            or (dwconv.dilation, dwconv.padding_mode) != ((1, 1), "zeros")
            or not (
                (fc1.kernel_size, fc1.stride, fc1.padding, fc1.groups)
                == (fc2.kernel_size, fc2.stride, fc2.padding, fc2.groups)
                == POINTWISE
            )
        ):
            return GELU_INSIDE
        for weight, shape in zip(weights, shapes, strict=True):
            if weight is None or weight.shape != shape:
                return GELU_INSIDE
        sizes: dict[str, Any] = {"hidden": hidden, "residual": residual, "weights": weights}
        plan = choose_plan("conv_ffn", x.permute(0, 2, 3, 1), dwconv.backend, strict=False, **sizes)
        return GELU_INSIDE if plan.backend == "reference" else plan

    @torch.jit.ignore
    def forward_fused(self, x: torch.Tensor, plan: Plan, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Runs self(x), plus the residual if there is one, as a fused half-block. `plan` is from `choose_plan`."""
        weight1, weight2 = self.fc1.weight.flatten(1), self.fc2.weight.flatten(1)
        for conv, weight in ((self.fc1, weight1), (self.fc2, weight2)):
            if "packed" in vars(conv):
                vars(weight)["packed"] = vars(conv)["packed"]
        y = plan.ops.conv_ffn(
            self.norm(x).to(x.dtype).permute(0, 2, 3, 1),  # autocast runs some norms in float32
            None if residual is None else residual.permute(0, 2, 3, 1),
            weight1,
            self.fc1.bias,
            self.dwconv.weight,
            self.dwconv.bias,
            weight2,
            self.fc2.bias,
        )
        return y.permute(0, 3, 1, 2)

    @torch.jit.ignore
    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether `forward_residual` serves x (B, dim, H, W): in inference, with a backend for the fused half-block."""
        return self.choose_plan(x, residual=True).op == "conv_ffn"

    @torch.jit.ignore
    def forward_residual(self, x: torch.Tensor) -> torch.Tensor:
        """Runs x + self(x) as a fused half-block. Call it only if `can_fuse(x)`."""
        return self.forward_fused(x, self.choose_plan(x, residual=True), x)

    fuses, add_to = renamed("fuses", "can_fuse"), renamed("add_to", "forward_residual")

    @torch.no_grad()
    def replacements(self) -> dict[str, nn.Module]:
        if (norm := folding.affine(self, "norm")) is None:
            return {}
        return {"fc1": folding.folded_before(self, "fc1", *norm), "norm": nn.Identity()}

    def fuse(self) -> "ConvFFN":
        folding.replace(self, self.replacements())
        folding.keep_packed(getattr(self.dwconv, "backend", None), self.fc1, self.fc2)
        return self


class Stem(nn.Module):
    """Four 3x3 convolutions, each followed by the activation and BatchNorm (paper: section 3.1).

    Args:
        in_chans: channels of the image.
        dim: channels out. The first two convolutions have half as many.
        stride: 1, 2 or 4. With 2 the third convolution has stride 2, with 4 the first one too.
        norm_layer: class of the norm, or timm's name for it.
        act_layer: class of the activation, or timm's name for it.
        backend: of bias, activation and norm at inference, as in `SuperTokenAttention`.

    Shape: (B, in_chans, H, W) to (B, dim, ceil(H / stride), ceil(W / stride)), channels-last.

    Raises:
        ValueError: an argument out of range, or an input of another shape.
    """

    STRIDES = {1: (1, 1, 1, 1), 2: (1, 1, 2, 1), 4: (2, 1, 2, 1)}

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int = 4,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        act_layer: str | type[nn.Module] = nn.GELU,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stride not in self.STRIDES:
            raise ValueError(f"stem_stride: expected one of {sorted(self.STRIDES)}, got {stride!r}")
        self.in_chans = in_chans
        self.backend = default_backend(backend)
        layers = []
        chans = in_chans
        for out_chans, s in zip((dim // 2, dim // 2, dim, dim), self.STRIDES[stride], strict=True):
            layers += [
                nn.Conv2d(chans, out_chans, 3, stride=s, padding=1, device=device, dtype=dtype),
                get_act_layer(act_layer)(),
                get_norm_layer(norm_layer)(out_chans, device=device, dtype=dtype),
            ]
            chans = out_chans
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Channels-last without naming the format: vmap has no memory formats, and torch.fx graphs with one do not
        # pickle.
        x = check_map(x, self.in_chans).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if not torch.jit.is_scripting():
            plan = self.choose_plan(x)
            if plan.backend != "reference":
                return self.forward_fused(x, plan)
        return self.layers(x)

    @torch.jit.ignore
    def choose_plan(self, x: torch.Tensor) -> Plan:
        """Chooses what follows each convolution: one pass in inference, if a backend has it and no layer is changed."""
        if torch.is_grad_enabled() or not isinstance(x, torch.Tensor) or for_other_programs():
            return LAYERS
        if not runs_stock_forward({self.layers: nn.Sequential}) or len(self.layers) != 12:
            return LAYERS
        layers = [*self.layers]
        convs, acts, norms = layers[0::3], layers[1::3], layers[2::3]
        if not runs_stock_forward({**dict.fromkeys(convs, nn.Conv2d), **dict.fromkeys(acts, nn.GELU)}):
            return LAYERS
        parameters = []
        for conv, act in zip(convs, acts, strict=True):
            if conv.bias is None or conv.weight.shape[0] != conv.out_channels or act.approximate != "none":
                return LAYERS
            parameters.append((conv.bias, (conv.out_channels,)))
        if not is_affine(norms):
            return LAYERS
        C = convs[0].out_channels  # the last two have twice as many, which a backend then serves too
        like = x.new_empty(0, 1, 1, C, dtype=autocast_dtype(x))
        return choose_plan("bias_gelu_affine", like, self.backend, parameters, strict=False)

    @torch.jit.ignore
    def can_fuse(self, x: torch.Tensor) -> bool:
        """Whether bias, activation and norm of each convolution run as one pass."""
        return self.choose_plan(x).backend != "reference"

    fuses = renamed("fuses", "can_fuse")

    @torch.jit.ignore
    def forward_fused(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Runs two passes for each layer: the convolution without its bias, then bias, GELU and BatchNorm."""
        layers = [*self.layers]
        convs, norms = layers[0::3], layers[2::3]
        epilogue = plan.ops.bias_gelu_affine
        for conv, scale, shift in zip(convs, *affine(norms), strict=True):
            x = conv._conv_forward(x, conv.weight, None).permute(0, 2, 3, 1).contiguous()
            x = epilogue(x, conv.bias, scale, shift).permute(0, 3, 1, 2)
        return x


def is_affine(norms: Sequence[nn.Module]) -> bool:
    """Whether these are BatchNorms with running statistics and the same eps, which only scale and shift."""
    if not runs_stock_forward(dict.fromkeys(norms, nn.BatchNorm2d)):
        return False
    for norm in norms:
        if norm.training or norm.running_var is None or norm.weight is None or norm.eps != norms[0].eps:
            return False
    return True


def affine(norms: Sequence[nn.BatchNorm2d]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """Scale and shift of each norm, float32 at least. Five small kernels compute those of all norms.

    They are computed at each call, since weights may change unnoticed (`.data`, the replay of a CUDA graph).
    """
    names = ("running_mean", "running_var", "weight", "bias")
    vectors = widen(torch.cat([getattr(norm, name) for name in names for norm in norms]))
    mean, var, weight, bias = vectors.view(4, -1)
    scale = weight * (var + norms[0].eps).rsqrt()
    shift = torch.addcmul(bias, mean, scale, value=-1)
    sizes = [norm.num_features for norm in norms]
    return scale.split(sizes), shift.split(sizes)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, then BatchNorm: (B, dim, H, W) to (B, out_dim, ceil(H / 2), ceil(W / 2)).

    For dense prediction `stride` may be 1, which keeps the size of the map, and `dilation` above 1. `backend` as in
    `SuperTokenAttention`. With 'reference', PyTorch's convolution runs after `fuse()` too.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        backend: str | None = None,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backend = default_backend(backend)
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=stride, padding=dilation, dilation=dilation, **dd)
        self.norm = get_norm_layer(norm_layer)(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) if torch.jit.is_scripting() else convolve(self.conv, x)
        return self.norm(x)

    @torch.no_grad()
    def replacements(self) -> dict[str, nn.Module]:
        if (norm := folding.affine(self, "norm")) is None:
            return {}
        return {"conv": folding.folded_after(self, "conv", *norm), "norm": nn.Identity()}

    def fuse(self) -> "Downsample":
        folding.replace(self, self.replacements())
        folding.keep_packed(self.backend, self.conv)
        return self


class FinalConv(nn.Module):
    """1x1 convolution, BatchNorm and SiLU between the last stage and the head: (B, dim, H, W) to (B, width, H, W).

    With `width` None there is no convolution, and BatchNorm and SiLU act on the last stage's channels. `backend` as in
    `Downsample`.
    """

    def __init__(
        self,
        dim: int,
        width: int | None,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.backend = default_backend(backend)
        self.conv = nn.Conv2d(dim, width, 1, **dd) if width else nn.Identity()
        self.norm = get_norm_layer(norm_layer)(width or dim, **dd)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x) if torch.jit.is_scripting() else pointwise(self.conv, x)
        return self.act(self.norm(x))

    @torch.no_grad()
    def replacements(self) -> dict[str, nn.Module]:
        if isinstance(self.conv, nn.Identity) or (norm := folding.affine(self, "norm")) is None:
            return {}
        return {"conv": folding.folded_after(self, "conv", *norm), "norm": nn.Identity()}

    def fuse(self) -> "FinalConv":
        folding.replace(self, self.replacements())
        folding.keep_packed(self.backend, self.conv)
        return self
