"""What a CUDA graph asks of a model: nothing waits for the device or takes data to it. Told by tensors without data."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from svit.layers import fusing
from svit.ops import _registration, triton

WAITS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2")


class NothingWaits(TorchDispatchMode):
    """Refuses operations that wait for the device or mix devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).split(".")[1])
        assert self.names[-1] not in WAITS, f"{func} waits for the device"
        result = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{func} has a tensor on {tensor.device}"
        return result


class NothingComesFromTheHost(TorchFunctionMode):
    """Refuses tensors that are made of the host's data."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func} takes data of the host"
        return func(*args, **kwargs or {})


@contextmanager
def on_the_device() -> Iterator[list[str]]:
    """Names of the operations that run."""
    with NothingComesFromTheHost(), NothingWaits() as seen:
        yield seen.names


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch) -> str:
    """Maps without data count as those of a GPU, in the choice of the backend and of products."""
    if request.param == "triton":
        if not triton.available:
            pytest.skip("needs Triton")
        monkeypatch.setattr(triton.BACKEND, "usable", lambda op, x: (True, ""))
    monkeypatch.setattr(fusing, "runs_as_product", lambda conv, x: fusing.is_plain_pointwise(conv))
    return request.param


@pytest.mark.parametrize("way", ["inference", "folded", "training"])
def test_the_model_does_not_wait(way, backend):
    rates = dict(drop_path_rate=0.5, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_rate=0.1) if way == "training" else {}
    model = timm.create_model("test_svit", backend=backend, device="meta", **rates).train(way == "training")
    if way == "folded":
        model.fuse()
    x = torch.empty(2, 3, 52, 68, device="meta")
    with torch.set_grad_enabled(way == "training"), on_the_device() as names:
        y = model(x)
        if way == "training":
            y.sum().backward()
    assert ("sample" in names) == (backend == "triton")
    assert ("bias_gelu_affine" in names) == (backend == "triton" and way != "training")
    assert ("sample_backward" in names) == (backend == "triton" and way == "training")


@pytest.mark.skipif(not triton.available, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_do_not_wait(dtype, monkeypatch):
    from svit.ops import _kernels

    kernels = []
    monkeypatch.setattr(_kernels, "launch", lambda kernel, *args, **constants: kernels.append(kernel.__name__))
    x = torch.empty(2, 20, 13, 64, device="meta", dtype=dtype)
    s, vector = x.new_empty(2, 3, 2, 64), x.new_empty(64, dtype=torch.float32)
    q, mass = x.new_empty(2, 3, 2, 9, 64), x.new_empty(2, 3, 2, dtype=torch.float32)
    taps, cell = x.new_empty(64, 1, 3, 3), [8, 8]
    calls = {
        "associate": (x, s, cell),
        "aggregate": (x, q, cell),
        "spread": (s, q, cell, [20, 13], x),
        "sample": (x, cell, 2, vector, vector, 1e-6),
        "sample_backward": (s, x, q, mass, cell, vector, 1e-6),
        "depthwise3x3": (x, taps, vector, True),
        "depthwise3x3_backward": (x, x, taps, True),
        "bias_gelu_affine": (x, vector, vector, vector),
    }
    assert calls.keys() == set(triton.BACKEND.OPS)
    for op, args in calls.items():
        with on_the_device():
            results = getattr(triton.BACKEND, op)(*args)
            expected = getattr(_registration.ops, op)(*args)
        assert kernels, op
        kernels.clear()
        for result, fake in zip(*map(torch.utils._pytree.tree_leaves, (results, expected)), strict=True):
            assert (result.shape, result.dtype) == (fake.shape, fake.dtype), op


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0], device="meta"),
        lambda x: torch.ones(3).to("meta"),
    ],
)
def test_what_waits_is_seen(step):
    with pytest.raises((AssertionError, RuntimeError)), on_the_device():
        step(torch.empty(3, device="meta"))


def test_a_model_that_waits_is_seen():
    model = timm.create_model("test_svit", device="meta").train()
    model.stem.layers[2].momentum = None  # BatchNorm then counts its calls on the host
    with pytest.raises(AssertionError, match="_local_scalar_dense.default waits for the device"), on_the_device():
        model(torch.empty(2, 3, 32, 32, device="meta"))
