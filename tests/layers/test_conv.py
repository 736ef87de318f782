import copy

import pytest
import torch
from torch import nn

from svit.layers import ConvFFN, Downsample, FinalConv, LayerScale, ResidualDepthwiseConv, Stem


def trained(module: nn.Module) -> nn.Module:
    """In float64 and eval mode, with BatchNorm statistics and weights that are not those of the start."""
    torch.manual_seed(0)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return module.double().eval()


@pytest.mark.parametrize(
    ("module", "norms_left"),
    [(ConvFFN(6, 10), 0), (Downsample(6, 10), 0), (FinalConv(6, 10), 0), (FinalConv(6, None), 1)],
)
def test_fuse_is_exact(module, norms_left):
    module = trained(module)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    fused = copy.deepcopy(module).fuse()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules()) == norms_left
    torch.testing.assert_close(fused(x), module(x), rtol=1e-12, atol=1e-12)
    again = copy.deepcopy(fused).fuse()
    assert torch.equal(again(x), fused(x))


def test_fuse_leaves_other_norms():
    module = FinalConv(6, 10, norm_layer="layernorm2d").double().eval()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(module).fuse()(x), module(x))


@pytest.mark.parametrize(("stride", "size"), [(1, (9, 7)), (2, (5, 4)), (4, (3, 2))])
def test_stem_strides(stride, size):
    y = Stem(5, 8, stride)(torch.randn(2, 5, 9, 7))
    assert y.shape == (2, 8, *size)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_stem_order_is_conv_gelu_norm():
    assert [type(m) for m in Stem(3, 8).layers] == [nn.Conv2d, nn.GELU, nn.BatchNorm2d] * 4


def test_stem_rejects():
    with pytest.raises(ValueError, match=r"stem_stride: expected one of \[1, 2, 4\], got 3"):
        Stem(3, 8, 3)
    with pytest.raises(ValueError, match=r"x: expected \(B, 3, H, W\) .* got \[1, 4, 8, 8\]"):
        Stem(3, 8)(torch.zeros(1, 4, 8, 8))


def test_residual_depthwise_is_a_conv_plus_its_input():
    module = ResidualDepthwiseConv(4).double()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    conv = nn.functional.conv2d(x, module.weight, module.bias, padding=1, groups=4)
    torch.testing.assert_close(module(x), x + conv, rtol=1e-13, atol=1e-13)


def wrap(conv: nn.Conv2d) -> None:
    """The field's trick for images without edges."""
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


@pytest.mark.parametrize("grad", [True, False])
def test_residual_depthwise_with_another_padding(grad):
    module, x = ResidualDepthwiseConv(4), torch.randn(1, 4, 5, 6)
    wrap(module)
    with torch.set_grad_enabled(grad):
        padded = nn.functional.pad(x, (1, 1, 1, 1), "circular")
        expected = x + nn.functional.conv2d(padded, module.weight, module.bias, groups=4)
        torch.testing.assert_close(module(x), expected)


def test_conv_ffn_with_another_padding_is_the_same_in_inference():
    module, x = ConvFFN(8, 32).eval(), torch.randn(2, 8, 6, 5)
    plain = module(x)
    wrap(module.dwconv)
    expected = module(x)
    assert (expected - plain).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(copy.deepcopy(module).fuse()(x), expected)


def test_layer_scale():
    scale = LayerScale(3, 0.5)
    assert scale.gamma.shape == (1, 3, 1, 1)
    assert torch.equal(scale(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 0.5))


def test_conv_ffn_dropout_is_after_gelu_and_after_fc2():
    ffn = ConvFFN(4, 8, drop=1.0).train()
    inputs = {}
    ffn.dwconv.register_forward_hook(lambda m, i, o: inputs.setdefault("dwconv", i[0]))
    y = ffn(torch.randn(1, 4, 3, 3))
    assert not inputs["dwconv"].any()
    assert not y.any()
