"""The whole model outside plain eager mode: compiled, exported, scripted, in 16 bit, on several processes."""

import gc
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import set_exportable, set_fused_attn, set_scriptable
from timm.models._features_fx import create_feature_extractor as timm_extractor
from timm.utils import AttentionExtract
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

from helpers import ONE_THREAD, missing
from svit.models import SViT
from svit.ops import _dispatch, _self_check, reference

NAMES = ["test_svit", "svit_nano"]
ARCHITECTURES = timm.list_models(module="svit")

# Batch, height, width. The first is what a model is traced with; no stage's map of the second is a multiple of a cell.
SIZES = [(2, 64, 80), (3, 50, 71)]

# A super-token stage and a global one: every kind of layer, where compiling four stages would take too long.
TWO_STAGES = dict(
    embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), stoken_size=(4, 1), layer_scale_init=(None, 0.1), head_width=32
)


def build(name: str = "test_svit", **kwargs) -> SViT:
    """In eval mode, with BatchNorm statistics of real maps and logits of order 1 that differ from image to image."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    nn.init.normal_(model.get_classifier().weight)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(image(8, 64, 64))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def image(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def unfused() -> Iterator[None]:
    """Models built meanwhile write the attention out instead of calling scaled_dot_product_attention."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # Else the compiler starts with symbolic floats and, on finding none, compiles everything once more.
    with torch._dynamo.config.patch(specialize_float=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    def test_inference(self) -> None:
        model = build()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for size in SIZES:
                x = image(*size)
                assert error(compiled(x), model(x)) < 1e-5
        assert counter.frame_count == 1  # serves every size

    def test_training(self) -> None:
        model = build().double().train()
        eager = deepcopy(model)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for size in SIZES:
            x = image(*size, torch.float64)
            for m in (compiled, eager):
                m(x).square().mean().backward()
        assert counter.frame_count == 1
        torch.testing.assert_close(gradients(model), gradients(eager))
        torch.testing.assert_close(model.state_dict(), eager.state_dict())

    def test_autocast(self) -> None:
        model = build(**TWO_STAGES)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        x = image(*SIZES[1])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = compiled(x)
        assert logits.dtype == torch.bfloat16
        assert error(logits, model(x)) < 3 * torch.finfo(torch.bfloat16).eps

    def test_inductor(self) -> None:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            missing("a C++ compiler")
        model = build(**TWO_STAGES)
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for size in SIZES:
                x = image(*size)
                assert error(compiled(x), model(x)) < 1e-5


# The last stage must have more than one pixel each way, as torch.export takes a size of 1 for a fixed one.
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_export() -> None:
    model = build()
    program = torch.export.export(model, (image(*SIZES[0]),), dynamic_shapes=(DYNAMIC,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for size in [*SIZES, (4, 33, 200)]:
        x = image(*size)
        assert error(exported(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_onnx(tmp_path: Path) -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it
    except ModuleNotFoundError as e:
        missing(e.name)
    with set_exportable(True):
        model = build()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (image(*SIZES[0]),), path, dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = image(*size)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scriptable", [False, True])
def test_script(scriptable: bool, name: str) -> None:
    with set_scriptable(scriptable):
        model = build(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in SIZES:
        x = image(*size)
        assert error(scripted(x), model(x)) < 1e-5


def one_block_a_stage(name: str) -> SViT:
    """A registered model with every kind of layer that it has, in seconds; logits of order 1."""
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
    nn.init.normal_(model.get_classifier().weight)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_legacy_onnx(tmp_path: Path, name: str) -> None:
    """Which other tools still call, on models as they are as well as exportable ones."""
    try:
        import onnxruntime
    except ModuleNotFoundError as e:
        missing(e.name)
    with set_exportable(name in NAMES):
        model = one_block_a_stage(name)
    path = tmp_path / "model.onnx"
    axes = {"image": {0: "batch", 2: "height", 3: "width"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (image(*SIZES[0]),), path, dynamo=False, input_names=["image"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        x = image(*size)
        (found,) = session.run(None, {"image": x.numpy()})
        assert error(torch.from_numpy(found), model(x)) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("create", [timm_extractor, torchvision_extractor], ids=["timm", "torchvision"])
def test_feature_extractors_pickle(create: Callable, name: str) -> None:
    """The graphs that torch.fx makes for feature maps of stages."""
    model = one_block_a_stage(name)
    extractor = create(model, ["stages.0", "stages.3"])
    file = io.BytesIO()
    torch.save(extractor, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = image(*SIZES[1])
    expected = model.forward_intermediates(x, indices=[0, 3], intermediates_only=True)
    for found, maps in zip(loaded(x).values(), expected, strict=True):
        assert error(found, maps) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vmap_of_the_stem(name: str) -> None:
    stem = one_block_a_stage(name).stem
    x = image(*SIZES[1])
    assert error(torch.func.vmap(stem)(x[:, None])[:, 0], stem(x)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace(name: str) -> None:
    model = build(name)
    traced = torch.jit.trace(model, image(*SIZES[0]))
    for size in SIZES:
        x = image(*size)
        assert error(traced(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_fx(training: bool, name: str) -> None:
    model = build(name).double().train(training)
    traced = torch.fx.symbolic_trace(deepcopy(model))
    for size in SIZES:
        x = image(*size, torch.float64)
        torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["autocast", "cast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(dtype: torch.dtype, way: str, name: str) -> None:
    model = build(name)
    x = image(*SIZES[1])
    with torch.no_grad():
        expected = model(x)
        if way == "autocast":
            with torch.autocast("cpu", dtype):
                logits = model(x)
        else:
            logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    # Measured on both models, in both types and ways: 1.3 to 2.1 times the distance from 1 to the next number.
    assert error(logits, expected) < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_under_autocast(dtype: torch.dtype, name: str) -> None:
    model = build(name)
    x, weight = image(*SIZES[1]), torch.randn(3, 10)
    flat = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            logits = model(x)
        (logits.float() * weight).sum().backward()
        flat.append(torch.cat([g.flatten() for g in gradients(model)]))
    # Measured: 1.8 to 2.1 times the distance from 1 to the next number.
    assert error(flat[1], flat[0]) < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
def test_float32_against_float64(name: str) -> None:
    model = build(name)
    x = image(*SIZES[1])
    with torch.no_grad():
        logits = model(x)
        expected = model.double()(x.double())
    assert expected.dtype == torch.float64
    # Measured: 4 and 7 times the distance from 1 to the next number.
    assert error(logits, expected) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", NAMES)
def test_grad_checkpointing_changes_nothing(name: str) -> None:
    plain = build(name, drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1).double().train()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    for step, size in enumerate(SIZES):
        x = image(*size, torch.float64)
        outputs = []
        for model in (plain, checkpointed):
            torch.manual_seed(step)
            outputs.append(model(x))
            outputs[-1].square().mean().backward()
        assert torch.equal(*outputs)
    for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert plain.stem.layers[2].num_batches_tracked == 1 + len(SIZES)  # one of them from `build`
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert all(m.momentum == 0.1 for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d))


def test_grad_checkpointing_with_several_backwards() -> None:
    """As for a gradient of each loss: every backward runs the blocks again, and the statistics count once."""
    plain = build("test_svit").double().train()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    x = image(*SIZES[0], torch.float64)
    for model in (plain, checkpointed):
        logits = model(x)
        for index in range(3):
            logits[:, index].sum().backward(retain_graph=True)
    for a, b in zip(gradients(plain), gradients(checkpointed), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)
    torch.testing.assert_close(checkpointed.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["sample", "sample_backward", "spread", "depthwise3x3"])
def test_grad_checkpointing_survives_a_backend_that_fails(wrong: str, monkeypatch, tmp_path) -> None:
    """The second run of a block takes the steps of the first, whatever was learned about a backend in between."""

    def run(op):
        def scaled(*args):
            results = getattr(reference, op)(*args)
            first = results if torch.is_tensor(results) else results[0]
            first *= 1.2 if op == wrong else 1
            return results

        return scaled

    x = image(*SIZES[0])
    expected = build().train()
    module = SimpleNamespace(OPS=("sample", "sample_backward", "aggregate", "spread", "depthwise3x3"))
    module.OPS += ("depthwise3x3_backward",)
    for op in module.OPS:
        setattr(module, op, run(op))
    module.usable = lambda op, x: (True, "")
    module.fingerprint = lambda device: "other"
    monkeypatch.setenv("SVIT_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("SVIT_SELF_CHECK", raising=False)
    model = deepcopy(expected)
    model.set_grad_checkpointing()
    expected(x).square().mean().backward()
    monkeypatch.setattr(_dispatch, "BACKENDS", {"other": module})
    monkeypatch.setattr(_dispatch, "failures", {})
    monkeypatch.setattr(_self_check, "verdicts", {})
    with pytest.warns(UserWarning, match="the other backend is left out .* self-check"):
        model(x).square().mean().backward()
    for a, b in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_grad_checkpointing_keeps_less() -> None:
    def kept(checkpointing: bool) -> int:
        model = build().train()
        model.set_grad_checkpointing(checkpointing)
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
            model(image(*SIZES[0]))
        return sum(t.nbytes for t in tensors.values())

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.parametrize("name", NAMES)
def test_fused_attention_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    fused = build(name).double()
    request.getfixturevalue("unfused")
    plain = build(name).double()
    plain.load_state_dict(fused.state_dict())
    assert {m.fused_attn for m in fused.modules() if hasattr(m, "fused_attn")} == {True}
    assert {m.fused_attn for m in plain.modules() if hasattr(m, "fused_attn")} == {False}
    x = image(*SIZES[1], torch.float64)
    torch.testing.assert_close(plain(x), fused(x), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("unfused")
@pytest.mark.parametrize("method", ["fx", "hook"])
def test_attention_extract(method: str) -> None:
    """Stages 1 and 2: 16 x 20 and 8 x 10 pixels in cells of 4 and 2. Stages 3 and 4: 4 x 5 and 2 x 3 pixels."""
    maps = AttentionExtract(build(), method=method)(image(*SIZES[0]))
    assert [tuple(m.shape) for m in maps.values()] == [(2, 1, 20, 20), (2, 2, 20, 20), (2, 3, 20, 20), (2, 4, 6, 6)]
    for m in maps.values():
        assert m.min() >= 0
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:-1]))
        assert m.std(-1).min() > 0  # not uniform: of this input


WORLD_SIZE = 2


def freeze_norms(model: nn.Module) -> nn.Module:
    """Training, but with BatchNorm's running statistics, which do not depend on how a batch is split."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Every process gets the gradient of the whole batch, and no parameter goes without one."""
    model = freeze_norms(build().double())
    x = image(4, 50, 71, torch.float64)
    torch.save({"weights": model.state_dict(), "x": x}, tmp_path / "inputs.pt")
    model(x).square().mean().backward()

    env = {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, tmp_path]
    workers = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(WORLD_SIZE)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0] * WORLD_SIZE
    finally:
        for worker in workers:
            worker.kill()
    for rank in range(WORLD_SIZE):
        torch.testing.assert_close(torch.load(tmp_path / f"gradients{rank}.pt"), gradients(model))


def distributed_worker(folder: Path, rank: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    inputs = torch.load(folder / "inputs.pt")
    model = build().double()
    model.load_state_dict(inputs["weights"])
    model = nn.parallel.DistributedDataParallel(freeze_norms(model))
    share = inputs["x"].chunk(WORLD_SIZE)[rank]
    for _ in range(2):  # a parameter without gradient shows in the second step, as an error
        model.zero_grad()
        model(share).square().mean().backward()
    torch.save(gradients(model), folder / f"gradients{rank}.pt")
    del model  # it holds the group, whose threads end when nothing does
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    distributed_worker(Path(sys.argv[1]), int(sys.argv[2]))


@pytest.mark.parametrize("first", ["training", "validation"])
def test_scripted_training_between_validations(first):
    """TorchScript's profile of the one must not spoil the other: no tensor of inference mode reaches autograd."""
    eager = timm.create_model("test_svit", num_classes=3, scriptable=True)
    model, x = torch.jit.script(eager), torch.randn(2, 3, 72, 88)
    for turn in range(6):
        if (turn % 2 == 0) == (first == "training"):
            model.train()(x).sum().backward()
            assert model.stages[0].blocks[0].attn.qkv.weight.grad.abs().max() > 0
        else:
            with torch.inference_mode():
                for _ in range(2):
                    y = model.eval()(x)
                torch.testing.assert_close(y, eager.eval()(x), rtol=1e-4, atol=1e-6)
