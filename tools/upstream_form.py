"""The upstream form: SViT as the authors' code runs it, operation by operation. The baseline of every speed claim.

It has the parameters and key names of `svit.models.SViT` and none of its shortcuts: NCHW throughout, super tokens
gathered and scattered by one-hot 3x3 convolutions, attention maps in memory, every norm and residual a step of its own.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from svit.layers import ConvFFN, FinalConv, ResidualDepthwiseConv, Stem, SuperTokenAttention
from svit.models import SViT


class SiLU(torch.autograd.Function):
    """x * sigmoid(x) with its backward written out."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * gate * (1 + x * (1 - gate))


class UpstreamSiLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SiLU.apply(x)


class UpstreamLayerNorm(LayerNorm2d):
    """LayerNorm over the channels of an NCHW map, with a copy to NHWC and one back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class UpstreamDepthwise(ResidualDepthwiseConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self._conv_forward(x, self.weight, self.bias)


class UpstreamConvFFN(ConvFFN):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop1(self.act(self.fc1(self.norm(x))))
        return self.drop2(self.fc2(self.dwconv(x)))


class UpstreamStem(Stem):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class UpstreamFinalConv(FinalConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x)))


class UpstreamSuperTokenAttention(SuperTokenAttention):
    one_hot: torch.Tensor  # (9, 1, 3, 3)

    def unfold(self, s: torch.Tensor) -> torch.Tensor:
        """(B, C, hh, ww) -> (B * C, 9, hh * ww)."""
        B, C, hh, ww = s.shape
        return F.conv2d(s.reshape(B * C, 1, hh, ww), self.one_hot, padding=1).reshape(B * C, 9, hh * ww)

    def fold(self, s: torch.Tensor, hh: int, ww: int) -> torch.Tensor:
        """(B * C, 9, hh * ww) -> (B * C, 1, hh, ww)."""
        return F.conv_transpose2d(s.reshape(-1, 9, hh, ww), self.one_hot, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cell == (1, 1):
            return self.attend(x)
        B, C, H, W = x.shape
        h, w = self.cell
        pad_h, pad_w = -H % h, -W % w
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        hh, ww = (H + pad_h) // h, (W + pad_w) // w
        N, P = hh * ww, h * w

        s = F.adaptive_avg_pool2d(x, (hh, ww))
        pixels = x.reshape(B, C, hh, h, ww, w).permute(0, 2, 4, 3, 5, 1).reshape(B, N, P, C)
        with torch.no_grad():
            for i in range(self.n_iter):
                near = self.unfold(s).reshape(B, C, 9, N).permute(0, 3, 1, 2).reshape(B, N, C, 9)
                q = (pixels @ near * C**-0.5).softmax(-1)  # (B, N, P, 9)
                mass = self.fold(q.sum(2).transpose(1, 2).reshape(B, 9, N), hh, ww)
                if i < self.n_iter - 1:
                    s = self.weighted_mean(pixels, q, mass, hh, ww)
        s = self.weighted_mean(pixels, q, mass, hh, ww)

        s = self.attend(s)
        near = self.unfold(s).reshape(B, C, 9, N).permute(0, 3, 1, 2).reshape(B, N, C, 9)
        y = near @ q.transpose(-1, -2)  # (B, N, C, P)
        y = y.reshape(B, hh, ww, C, h, w).permute(0, 3, 1, 4, 2, 5).reshape(B, C, hh * h, ww * w)
        return y[:, :, :H, :W].contiguous() if pad_h or pad_w else y

    def weighted_mean(self, pixels, q, mass, hh: int, ww: int) -> torch.Tensor:
        B, N, P, C = pixels.shape
        total = pixels.transpose(-1, -2) @ q  # (B, N, C, 9)
        total = self.fold(total.permute(0, 2, 3, 1).reshape(B * C, 9, N), hh, ww)
        return total.reshape(B, C, hh, ww) / (mass.detach() + 1e-12)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        d = C // self.num_heads
        q, k, v = self.qkv(x).reshape(B, self.num_heads, 3 * d, H * W).chunk(3, dim=2)  # (B, heads, d, N) each
        attn = (k.transpose(-1, -2) @ q * d**-0.5).softmax(-2)  # over the keys
        x = (v @ self.attn_drop(attn)).reshape(B, C, H, W)
        return self.proj_drop(self.proj(x))


UPSTREAM = {
    Stem: UpstreamStem,
    FinalConv: UpstreamFinalConv,
    SuperTokenAttention: UpstreamSuperTokenAttention,
    ResidualDepthwiseConv: UpstreamDepthwise,
    ConvFFN: UpstreamConvFFN,
    LayerNorm2d: UpstreamLayerNorm,
}


def upstream_form(model: SViT) -> SViT:
    """Turns `model`, in place, into its upstream form: the same parameters and key names, other operations."""
    for module in model.modules():
        module.__class__ = UPSTREAM.get(type(module), type(module))
        if isinstance(module, UpstreamSuperTokenAttention):
            one_hot = torch.eye(9).to(module.qkv.weight).reshape(9, 1, 3, 3)
            module.register_buffer("one_hot", one_hot, persistent=False)
    model.final_conv.act = UpstreamSiLU()
    return model
