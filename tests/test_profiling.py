"""MACs against hand counts and against the authors' code."""

import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_exportable, set_fused_attn
from torch import nn

from svit.layers import ConvFFN, ResidualDepthwiseConv, SuperTokenAttention
from svit.profiling import HANDLES, UNCOUNTED, analysis, count
from upstream_form import upstream_form


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor):
        return self.function(*inputs)


def macs_of(function, *shapes: tuple[int, ...]) -> dict[str, int]:
    """MACs of each kind of operation in a function of tensors."""
    return dict(analysis(Call(function), tuple(torch.rand(shape) for shape in shapes)).by_operator())


@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=["whole", "padded"])
def test_super_token_attention(size):
    cells = 2 * 3  # of 2 x 2 pixels; a map of 3 x 5 is padded to 4 x 6
    sampling = (
        cells * 9 * 4 * 8  # each pixel with its 9 super tokens, 8 channels: association
        + cells * 9 * 4 * 8  # the weighted sums
        + cells * 9 * 4 * 8  # the sums spread again
    )
    among_tokens = (
        cells * 8 * 24  # q, k and v
        + 2 * 6 * 6 * 4  # q k^T: 2 heads, 6 x 6 tokens, 4 channels
        + 2 * 6 * 6 * 4  # attn v
        + cells * 8 * 8  # the projection
    )
    assert sampling + among_tokens == 7296
    assert count(SuperTokenAttention(8, 2, stoken_size=2), size, in_chans=8).macs == 7296

    another_round = 2 * cells * 9 * 4 * 8  # association and sums once more
    assert count(SuperTokenAttention(8, 2, stoken_size=2, n_iter=2), size, in_chans=8).macs == 7296 + another_round


def test_plain_attention():
    pixels = 4 * 6
    qkv, attn, proj = pixels * 8 * 24, 2 * (2 * 24 * 24 * 4), pixels * 8 * 8
    result = count(SuperTokenAttention(8, 2), (4, 6), in_chans=8)
    assert result.macs == qkv + attn + proj == 15360
    assert result.by_operator == {"conv": qkv + proj, "scaled_dot_product_attention": attn}
    assert result.by_module == {"": 15360, "qkv": qkv, "attn_drop": 0, "proj": proj, "proj_drop": 0}


def test_convolutions():
    pixels = 5 * 7
    # The identity added to the kernel of a depthwise convolution costs nothing, in the model as in the count.
    assert count(ResidualDepthwiseConv(8), (5, 7), in_chans=8).macs == pixels * 8 * 9
    ffn = ConvFFN(8, 32)
    convs = pixels * (8 * 32 + 32 * 9 + 32 * 8)
    assert count(ffn, (5, 7), in_chans=8).macs == convs + pixels * 8 * 2  # BatchNorm: 2 a value
    assert count(ffn.eval().fuse(), (5, 7), in_chans=8).macs == convs


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
        ((5, 4), (7, 4), (7, 6)),
        ((1, 3, 5, 4), (2, 1, 7, 4), (2, 3, 7, 4)),
    ],
    ids=["heads", "no-batch", "broadcast"],
)
def test_attention_is_two_products(q, k, v):
    fused = macs_of(F.scaled_dot_product_attention, q, k, v)
    products = macs_of(lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v, q, k, v)
    assert fused == {"scaled_dot_product_attention": products["matmul"]}


@pytest.mark.parametrize(
    ("a", "b", "macs"),
    [
        ((3, 4), (4, 5), 3 * 4 * 5),
        ((2, 3, 4), (4, 5), 2 * 3 * 4 * 5),
        ((3, 4), (2, 4, 5), 2 * 3 * 4 * 5),
        ((2, 1, 3, 4), (7, 4, 5), 2 * 7 * 3 * 4 * 5),
        ((3, 4), (4,), 3 * 4),
        ((4,), (4, 5), 4 * 5),
        ((4,), (4,), 4),
    ],
    ids=str,
)
def test_matmul(a, b, macs):
    assert macs_of(torch.matmul, a, b) == {"matmul": macs}


@pytest.mark.parametrize(
    ("name", "published"), [("svit_small", 4.367e9), ("svit_base", 9.872e9), ("svit_large", 15.597e9)]
)
def test_published(name, published):
    result = count(timm.create_model(name), 224)
    assert result.macs == pytest.approx(published, rel=0.005)
    assert result.macs < published  # no one-hot convolutions
    assert not result.unsupported


def test_upstream_form_has_the_published_count():
    result = count(upstream_form(timm.create_model("svit_small")), 224)
    assert round(result.macs / 1e9, 3) == 4.367
    assert result.unsupported == {"prim::PythonOp.SiLU": 1}


def test_fused_attention_counts_as_unfused():
    fused = count(timm.create_model("test_svit"), (70, 90))
    set_fused_attn(False)
    try:
        with_maps = count(timm.create_model("test_svit"), (70, 90))
    finally:
        set_fused_attn(True)
    with set_exportable(True):
        exportable = count(timm.create_model("test_svit"), (70, 90))
    assert "scaled_dot_product_attention" in fused.by_operator
    assert "scaled_dot_product_attention" not in with_maps.by_operator
    assert fused.macs == with_maps.macs == exportable.macs
    assert fused.by_module == with_maps.by_module == exportable.by_module


def test_checkpointing_changes_nothing():
    model = timm.create_model("test_svit")
    plain = count(model, 64)
    model.set_grad_checkpointing()
    assert count(model, 64).by_module == plain.by_module


def test_params_are_the_trainable_ones():
    model = timm.create_model("test_svit")
    everything = count(model, 64).params
    assert everything == sum(p.numel() for p in model.parameters())
    model.stem.requires_grad_(False)
    assert count(model, 64).params == everything - sum(p.numel() for p in model.stem.parameters())


def test_peer():
    result = count(timm.create_model("swin_tiny_patch4_window7_224"), 224)
    assert result.macs == pytest.approx(4.51e9, rel=0.005)
    assert not result.unsupported  # rolling and cutting windows is moving data


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x @ x


@torch.jit.script
def scripted(x):
    return x @ x


@pytest.mark.parametrize(
    ("function", "unsupported"),
    [
        (lambda x: torch.fft.fft2(x).abs(), {"aten::fft_fft2": 1}),
        (lambda x: x.cumsum(2).cumsum(3), {"aten::cumsum": 2}),
        (Opaque.apply, {"prim::PythonOp.Opaque": 1}),
        (scripted, {"prim::CallFunction": 1}),
    ],
    ids=["fft2", "cumsum", "autograd-function", "scripted"],
)
def test_unknown_work_is_reported(function, unsupported):
    result = count(Call(function), 8)
    assert result.unsupported == unsupported
    assert result.macs == 0


def test_left_out_on_purpose():
    def function(x):
        x = F.gelu(x).mul_(2) + x.softmax(1)
        return F.pad(F.max_pool2d(x, 2), (1, 1)).mean(1)

    result = count(Call(function), 8)
    assert not result.unsupported
    assert result.macs == 0
    assert not UNCOUNTED & HANDLES.keys()


def test_model_is_left_as_it_was():
    model = timm.create_model("test_svit")
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    count(model, 64)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected"):
        count(model, 64, in_chans=4)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval().fuse()


def test_hooks_of_the_user_stay():
    model = timm.create_model("test_svit")
    seen = []
    model.stem.register_forward_hook(lambda *args: seen.append(1))
    count(model, 64)
    assert len(model.stem._forward_hooks) == 1
    assert seen


def test_dtype_of_the_model():
    assert count(timm.create_model("test_svit").double(), 64) == count(timm.create_model("test_svit"), 64)


@pytest.mark.parametrize("img_size", [0, (8,), (8, -1), (8, 8.0)], ids=str)
def test_bad_size(img_size):
    with pytest.raises(ValueError, match="img_size: expected a positive int or a pair"):
        count(nn.Identity(), img_size)


def test_package_does_not_import_it():
    code = "import sys, svit; sys.exit('fvcore' in sys.modules or 'svit.profiling' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_layers_alone():
    """What the paper counts for detection and segmentation: convolution and linear layers, module by module."""
    model = timm.create_model("test_svit")
    everything, layers = (count(model, 64, attention_products=products) for products in (True, False))
    assert set(layers.by_operator) == {"conv", "linear"}
    assert layers.by_operator == {op: everything.by_operator[op] for op in ("conv", "linear")}
    assert layers.macs == sum(layers.by_operator.values()) < everything.macs
    attention, convs = "stages.0.blocks.0.attn", "stages.0.blocks.0.attn.qkv"
    assert layers.by_module[attention] == everything.by_module[convs] + everything.by_module[f"{attention}.proj"]
    assert everything.by_module[attention] > layers.by_module[attention]
    assert layers.params == everything.params
