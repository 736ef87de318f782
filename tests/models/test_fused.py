"""The models on the fused ops: what they run on a GPU, told by tensors that claim to be on one."""

from contextlib import contextmanager

import pytest
import timm
import torch
from timm.layers import set_exportable, set_fused_attn, set_scriptable
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import svit  # noqa: F401
from svit.ops import triton

pytestmark = pytest.mark.skipif(not triton.available, reason="needs Triton")


class Recorder(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **kwargs or {})

    @property
    def ours(self) -> list[str]:
        return [name.removeprefix("svit.") for name in self.names if name.startswith("svit.")]


@contextmanager
def on_a_gpu(name: str, **kwargs):
    """A model on a GPU that is not there, while it lasts. (Autograd and autocast want a real one.)"""
    model = timm.create_model(name, **kwargs).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to("cuda")


def run(name: str, size=(64, 96), **kwargs):
    """Output and operations of such a model."""
    with on_a_gpu(name, **kwargs) as model, torch.no_grad():
        x = torch.randn(2, 3, *size, device="cuda", dtype=kwargs.get("dtype"))
        with Recorder() as recorder:
            y = model(x)
    return y, recorder


# Of test_svit: two blocks with super tokens, two with plain attention; two depthwise convolutions in each.
FORWARD = ["depthwise3x3", "sample", "spread", "depthwise3x3"] * 2 + ["depthwise3x3"] * 4


def test_inference():
    y, recorder = run("test_svit")
    assert recorder.ours == FORWARD
    assert y.shape == (2, 1000)
    assert not {"aten.gelu", "aten.native_layer_norm"} & set(
        recorder.names[recorder.names.index("svit.sample") - 1 :][:2]
    )


def test_feature_maps_have_the_shapes_and_strides_of_the_reference():
    maps, recorder = run("svit_small", features_only=True, size=(100, 130))
    assert recorder.ours[:4] == ["bias_gelu_affine"] * 4
    assert recorder.ours.count("sample") == 8
    model = timm.create_model("svit_small", features_only=True, device="meta")
    for actual, expected in zip(maps, model(torch.empty(2, 3, 100, 130, device="meta")), strict=True):
        assert actual.shape == expected.shape
        assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_1x1_convolutions_are_products_in_16_bit(dtype):
    _, recorder = run("test_svit", dtype=dtype)
    pointwise = 4 * 4 + 1  # of the blocks, and the final one
    products = pointwise if dtype == torch.bfloat16 else 0
    assert recorder.names.count("aten.addmm") == products + 1  # the classifier
    assert recorder.names.count("aten.convolution") == 4 + 3 + pointwise - products


@pytest.mark.parametrize("switch", ["fused_attn", "exportable", "scriptable", "backend", "differentiable"])
def test_switches_take_the_reference(switch):
    arguments = {"backend": {"backend": "reference"}, "differentiable": {"differentiable_association": True}}
    set_fused_attn(switch != "fused_attn")
    try:
        with set_exportable(switch == "exportable"), set_scriptable(switch == "scriptable"):
            _, recorder = run("test_svit", **arguments.get(switch, {}))
    finally:
        set_fused_attn(True)
    assert recorder.ours == (["depthwise3x3"] * 8 if switch == "differentiable" else [])


def test_float64_takes_the_reference():
    _, recorder = run("test_svit", dtype=torch.float64)
    assert not recorder.ours


def test_names_a_backend_that_does_not_serve():
    with pytest.raises(ValueError, match=r"backend: 'triton' cannot run depthwise3x3 here: x is on cpu"):
        timm.create_model("test_svit", backend="triton")(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_ops(strict):
    with on_a_gpu("test_svit") as model:
        x = torch.randn(2, 3, 64, 64, device="cuda")
        dim = torch.export.Dim.DYNAMIC
        program = torch.export.export(model, (x,), dynamic_shapes=({2: dim, 3: dim},), strict=strict)
    assert program.graph_module.code.count("torch.ops.svit.sample") == 2
    assert program.graph_module.code.count("torch.ops.svit.depthwise3x3") == 8
