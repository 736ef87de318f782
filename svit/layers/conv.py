"""The convolutional parts of the network. Each keeps a channels-last map channels-last.

`fuse()` folds, for inference, the BatchNorm that can be folded exactly and returns the module, as timm's
`reparameterize_model` expects; a second call changes nothing. Norms of another class stay, and so does a BatchNorm
without running statistics. A BatchNorm in train mode, and a convolution or BatchNorm that is hooked, parametrized,
pruned or wrapped, is a ValueError before anything changes. The stem has no `fuse()`: its BatchNorms stand between a
GELU and a zero-padded convolution, where a folded shift would be wrong at the borders.
"""

from collections.abc import Sequence

import torch
from timm.layers import get_act_layer, get_norm_layer
from torch import nn

from svit.ops import bias_gelu_affine, choose, conv_ffn, depthwise3x3
from svit.ops._numerics import autocast_dtype, widen
from svit.ops.conv_ffn import onednn

from . import folding
from .checks import check_map
from .fusing import default_backend, drops_nothing, for_other_programs, is_plain_pointwise, pointwise, untouched

torch.fx.wrap("check_map")
torch.fx.wrap("depthwise3x3")


class ResidualDepthwiseConv(nn.Conv2d):
    """x + depthwise 3x3 convolution of x, with bias: (B, dim, H, W) to the same.

    The position encoding of a block and the middle of its conv-FFN (paper: section 3.1). `backend` as in
    `SuperTokenAttention`; `gelu` convolves GELU(x) (exact) instead of x.
    """

    bias: torch.Tensor  # that of nn.Conv2d may be None, which TorchScript would not pass on

    def __init__(self, dim: int, backend: str | None = None, device=None, dtype=None) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.backend = default_backend(backend)

    def forward(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        x = depthwise3x3(x.permute(0, 2, 3, 1), self.weight, self.bias, gelu, self.backend)
        return x.permute(0, 3, 1, 2)


class ConvFFN(nn.Module):
    """A block's feed-forward part (paper: section 3.1): BatchNorm, 1x1 conv, GELU, x + depthwise 3x3 conv, 1x1 conv.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two 1x1 convolutions.
        drop: dropout rate after the activation and after the second 1x1 convolution.
        norm_layer: layer class, or timm's name of one.
        act_layer: the same of the activation.
        backend: of the depthwise convolution, as in `SuperTokenAttention`.

    Shape: (B, dim, H, W) to the same.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        act_layer: str | type[nn.Module] = nn.GELU,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = get_norm_layer(norm_layer)(dim, **dd)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.act = get_act_layer(act_layer)()
        self.drop1 = nn.Dropout(drop)
        self.dwconv = ResidualDepthwiseConv(hidden_dim, backend, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript compiles what stands behind an `and`
            if onednn.usable("conv_ffn", x)[0] and self.is_untouched():
                fc1, dwconv, fc2 = self.fc1, self.dwconv, self.fc2
                weights = fc1.weight, fc1.bias, dwconv.weight, dwconv.bias, fc2.weight, fc2.bias
                if onednn.usable("conv_ffn", x, weights=weights)[0]:
                    return onednn.conv_ffn(x, *weights)
        x = self.fc1(x) if torch.jit.is_scripting() else pointwise(self.fc1, x)
        x = self.dwconv_of_act(x)
        x = self.fc2(x) if torch.jit.is_scripting() else pointwise(self.fc2, x)
        return self.drop2(x)

    @torch.jit.ignore
    def fuses(self, x: torch.Tensor) -> bool:
        """Whether `add_to` serves x (B, dim, H, W): inference, and a backend that has the whole as one kernel."""
        # A trace would keep the steps taken here.
        if torch.is_grad_enabled() or torch.jit.is_tracing() or not isinstance(x, torch.Tensor):
            return False
        if self.norm.training or not self.is_untouched():
            return False
        x, hidden = x.permute(0, 2, 3, 1), self.fc1.out_channels
        return choose("conv_ffn", x, self.dwconv.backend, strict=False, hidden=hidden) != "reference"

    @torch.jit.ignore
    def add_to(self, x: torch.Tensor) -> torch.Tensor:
        """x + self(x), where `fuses` says so: the hidden map stays on the chip."""
        y = conv_ffn(
            self.norm(x).to(x.dtype).permute(0, 2, 3, 1),  # autocast widens some norms
            x.permute(0, 2, 3, 1),
            self.fc1.weight.flatten(1),
            self.fc1.bias,
            self.dwconv.weight,
            self.dwconv.bias,
            self.fc2.weight.flatten(1),
            self.fc2.bias,
            self.dwconv.backend,
        )
        return y.permute(0, 3, 1, 2)

    def dwconv_of_act(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.fuses_gelu(x):
                return self.dwconv(x, gelu=True)
        return self.dwconv(self.drop1(self.act(x)))

    @torch.jit.ignore
    def fuses_gelu(self, x: torch.Tensor) -> bool:
        """Whether the depthwise convolution takes the GELU in, which only a fused backend does in the same pass."""
        if not (isinstance(x, torch.Tensor) and drops_nothing(self.drop1) and self.is_gelu()):
            return False
        return choose("depthwise3x3", x.permute(0, 2, 3, 1), self.dwconv.backend) != "reference"

    @torch.jit.ignore
    def is_gelu(self) -> bool:
        layers = {self.act: nn.GELU, self.dwconv: ResidualDepthwiseConv}
        return untouched(layers) and self.act.approximate == "none"

    @torch.jit.ignore
    def is_untouched(self) -> bool:
        """Whether the layers behind the norm do just what they were built for: no dropout, no hooks, no wrappers."""
        if not (drops_nothing(self.drop1, self.drop2) and self.is_gelu()):
            return False
        return all(is_plain_pointwise(conv) and conv.bias is not None for conv in (self.fc1, self.fc2))

    @torch.no_grad()
    def replacements(self) -> dict[str, nn.Module]:
        if (norm := folding.affine(self, "norm")) is None:
            return {}
        return {"fc1": folding.folded_before(self, "fc1", *norm), "norm": nn.Identity()}

    def fuse(self) -> "ConvFFN":
        folding.replace(self, self.replacements())
        return self


class Stem(nn.Module):
    """Four 3x3 convolutions, each followed by the activation, then BatchNorm (paper: section 3.1).

    Args:
        in_chans: channels of the image.
        dim: channels out; the first two convolutions have half of them.
        stride: 1, 2 or 4 pixels of the image to one of the output. The third convolution halves the map first, then
            the first.
        norm_layer: layer class, or timm's name of one.
        act_layer: the same of the activation.
        backend: of what follows each convolution at inference, as in `SuperTokenAttention`.

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
        device=None,
        dtype=None,
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
        # Channels-last without its name: vmap knows no memory formats, and graphs of torch.fx with one do not pickle.
        x = check_map(x, self.in_chans).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if self.fuses(x):
                return self.forward_fused(x)
        return self.layers(x)

    @torch.jit.ignore
    def fuses(self, x: torch.Tensor) -> bool:
        """Whether `forward_fused` serves x: inference, a backend that has the op, and layers as they were built."""
        if torch.is_grad_enabled() or not isinstance(x, torch.Tensor) or for_other_programs():
            return False
        if not untouched({self.layers: nn.Sequential}) or len(self.layers) != 12:
            return False
        layers = [*self.layers]
        convs, acts, norms = layers[0::3], layers[1::3], layers[2::3]
        if not untouched({**dict.fromkeys(convs, nn.Conv2d), **dict.fromkeys(acts, nn.GELU)}):
            return False
        if any(conv.bias is None for conv in convs) or any(act.approximate != "none" for act in acts):
            return False
        if not is_affine(norms):
            return False
        C = convs[0].out_channels  # half of the channels of the last two, which a backend then serves too
        like = x.new_empty(0, 1, 1, C, dtype=autocast_dtype(x))
        return choose("bias_gelu_affine", like, self.backend, strict=False) != "reference"

    @torch.jit.ignore
    def forward_fused(self, x: torch.Tensor) -> torch.Tensor:
        """The same in two passes a layer: the convolution without its bias, then bias, GELU and BatchNorm."""
        layers = [*self.layers]
        convs, norms = layers[0::3], layers[2::3]
        for conv, scale, shift in zip(convs, *affine(norms), strict=True):
            x = conv._conv_forward(x, conv.weight, None).permute(0, 2, 3, 1)
            x = bias_gelu_affine(x, conv.bias, scale, shift, self.backend).permute(0, 3, 1, 2)
        return x


def is_affine(norms: Sequence[nn.Module]) -> bool:
    """Whether these are BatchNorms that only scale and shift, by running statistics, and share an eps."""
    return untouched(dict.fromkeys(norms, nn.BatchNorm2d)) and all(
        not norm.training and norm.running_var is not None and norm.weight is not None and norm.eps == norms[0].eps
        for norm in norms
    )


def affine(norms: Sequence[nn.BatchNorm2d]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """The factors of each norm and what it adds, float32 at least: in five small kernels for all of them.

    At each call, since weights may change in ways that nothing tells (`.data`, the replay of a CUDA graph).
    """
    names = ("running_mean", "running_var", "weight", "bias")
    vectors = widen(torch.cat([getattr(norm, name) for name in names for norm in norms]))
    mean, var, weight, bias = vectors.view(4, -1)
    scale = weight * (var + norms[0].eps).rsqrt()
    shift = torch.addcmul(bias, mean, scale, value=-1)
    sizes = [norm.num_features for norm in norms]
    return scale.split(sizes), shift.split(sizes)


class Downsample(nn.Module):
    """3x3 convolution of stride 2, then BatchNorm: (B, dim, H, W) to (B, out_dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = get_norm_layer(norm_layer)(out_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    @torch.no_grad()
    def replacements(self) -> dict[str, nn.Module]:
        if (norm := folding.affine(self, "norm")) is None:
            return {}
        return {"conv": folding.folded_after(self, "conv", *norm), "norm": nn.Identity()}

    def fuse(self) -> "Downsample":
        folding.replace(self, self.replacements())
        return self


class FinalConv(nn.Module):
    """1x1 convolution, BatchNorm, SiLU, between the last stage and the head: (B, dim, H, W) to (B, width, H, W).

    With `width` None there is no convolution, and BatchNorm and SiLU act on the last stage's channels.
    """

    def __init__(
        self,
        dim: int,
        width: int | None,
        norm_layer: str | type[nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
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
        return self
