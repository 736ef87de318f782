"""Dilated models: `output_stride`, as timm's convolutional networks take it."""

import copy

import pytest
import timm
import torch
from torch import nn

import svit

NAMES = ["test_svit", "svit_nano_32", "svit_nano"]


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean, -1, 1)
    return model.double()


def dilate(model: nn.Module, output_stride: int) -> nn.Module:
    """The same by hand: from convolutions of a usual model."""
    reduction, dilation = model.feature_info[0]["reduction"], 1
    for stage in model.stages[1:]:
        dilated = [m for m in stage.blocks.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        if reduction < output_stride:
            reduction *= 2
        else:
            conv = stage.downsample.conv
            conv.stride, conv.dilation, conv.padding = (1, 1), (dilation, dilation), (dilation, dilation)
            dilation *= 2
        for conv in dilated:
            conv.dilation = conv.padding = (dilation, dilation)
    return model


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_equals_a_model_dilated_by_hand(name, output_stride):
    usual = build(name)
    model = build(name, output_stride=output_stride)
    model.load_state_dict(usual.state_dict())
    expected = dilate(copy.deepcopy(usual), output_stride)
    x = torch.randn(2, 3, 72, 88, dtype=torch.float64)
    y, maps = model.forward_intermediates(x)
    torch.testing.assert_close(y, expected.forward_features(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(model).fuse()(x), expected(x), rtol=1e-9, atol=1e-9)
    first = usual.feature_info[0]["reduction"]
    assert [info["reduction"] for info in model.feature_info] == [min(first * 2**i, output_stride) for i in range(4)]
    for info, features in zip(model.feature_info, maps, strict=True):
        assert features.shape[2:] == (-(-72 // info["reduction"]), -(-88 // info["reduction"]))
    changes = first * 8 > output_stride
    assert changes == (not torch.equal(model(x), usual(x)))


def test_in_float32_too():
    model = build("test_svit", output_stride=8).float()
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    y.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.stages[3].blocks[0].mlp.dwconv.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(model(x), y.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(copy.deepcopy(model).fuse()(x), y.detach(), rtol=1e-4, atol=1e-6)
        scripted = torch.jit.script(copy.deepcopy(model))
        torch.testing.assert_close(scripted(x), y.detach(), rtol=1e-4, atol=1e-6)
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x), y.detach(), rtol=1e-4, atol=1e-6)


def test_features_only():
    model = timm.create_model("test_svit", features_only=True, output_stride=16, out_indices=(1, 3))
    assert model.feature_info.reduction() == [8, 16]
    assert [tuple(m.shape[2:]) for m in model(torch.randn(1, 3, 64, 96))] == [(8, 12), (4, 6)]


@pytest.mark.parametrize("value", [4, 64, 12, "16", None])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="output_stride: expected 8, 16 or 32, got"):
        svit.models.SViT(output_stride=value)
