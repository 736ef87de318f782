import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.utils.prune
from PIL import Image
from torch._inductor import cpp_builder

import image_data
from helpers import missing
from svit.checkpoints import save_model
from svit.cli import command, export
from svit.errors import InputError
from svit.ops.super_token.reference import from_cells
from svit.visualize import attention_weights, last_of_stages, watch

CLASSES = [f"class {i}" for i in range(10)]
PREPROCESSING = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), crop_pct=0.9, interpolation="nearest")
TOLD = dict(
    PREPROCESSING,
    mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.2, 0.2],
    crop_mode="center",
    input_size=[3, 64, 64],
    architecture="test_svit",
    class_names=CLASSES,
)
# A super-token stage and a global one: every kind of layer, where four stages would take too long.
TWO_STAGES = dict(
    embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), stoken_size=(4, 1), layer_scale_init=(None, 0.1), head_width=32
)


def needs_onnx() -> None:
    try:
        export.check_onnx()
    except InputError as error:
        missing(str(error))


def needs_compiler() -> None:
    try:
        export.check_compiler()
    except InputError as error:
        missing(str(error))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the tool in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        status = command("export")(list(args))
        return status, *capsys.readouterr()

    return run


def checkpoint(**arguments) -> torch.nn.Module:
    """Writes c.safetensors; returns its model, whose logits are of order 1 and differ from image to image."""
    torch.manual_seed(0)
    cfg = dict(PREPROCESSING, label_names=CLASSES)
    model = timm.create_model("test_svit", num_classes=10, pretrained_cfg_overlay=cfg, **arguments).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=10)
    save_model(Path("c.safetensors"), model, "test_svit", CLASSES)
    return model


@pytest.fixture
def two_stages(run, monkeypatch) -> torch.nn.Module:
    """The model of c.safetensors, and what `test_svit` means to the tool."""
    monkeypatch.setattr(export, "make_model", partial(export.make_model, **TWO_STAGES))
    return checkpoint(**TWO_STAGES)


def check(model: torch.nn.Module, run: Callable, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        expected = model(x)
        assert expected.std(1).min() > 0.3
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)


def differences(out: str) -> dict[str, float]:
    """The printed difference for each shape."""
    lines = [line.split(": max difference from PyTorch ") for line in out.splitlines() if "difference" in line]
    return {shape: float(rest.split(",")[0]) for shape, rest in lines}


def test_onnx(run, two_stages):
    needs_onnx()
    import onnx
    import onnxruntime

    status, out, err = run("test_svit", "--checkpoint", "c.safetensors")
    assert (status, err) == (0, "")
    assert sorted(os.listdir()) == ["c.safetensors", "test_svit.onnx"]  # one file, the weights in it
    found = differences(out)
    assert list(found) == ["2x3x64x64", "1x3x96x128", "3x3x71x85"]
    assert max(found.values()) < 1e-4
    assert "test_svit, image batch x 3 x height x width (height from 17, width from 17)\n" in out

    onnx.checker.check_model("test_svit.onnx", full_check=True)
    session = onnxruntime.InferenceSession("test_svit.onnx", providers=["CPUExecutionProvider"])
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape) == ("image", ["batch", 3, "height", "width"])
    assert (logits.name, logits.shape) == ("logits", ["batch", 10])
    props = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in props.items()} == TOLD
    check(two_stages, export.load_onnx(Path("test_svit.onnx")), (1, 3, 64, 64), (4, 3, 50, 131))


def test_onnx_of_one_size(run, two_stages, monkeypatch):
    needs_onnx()
    options = ["--checkpoint", "c.safetensors", "--static", "--img-size", "40", "56", "--batch-size", "3"]
    status, out, err = run("test_svit", *options, "--out", "one.onnx")
    assert (status, err) == (0, "")
    assert list(differences(out)) == ["3x3x40x56"]
    assert out.endswith("test_svit, image 3 x 3 x 40 x 56\n")
    check(two_stages, export.load_onnx(Path("one.onnx")), (3, 3, 40, 56))

    # Weights that would be a second file.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    status, out, err = run("test_svit", *options, "--out", "two.onnx")
    assert (status, out) == (1, "")
    assert err == "error: the weights do not fit in one ONNX file; --format torch takes them\n"
    assert sorted(os.listdir()) == ["c.safetensors", "one.onnx"]


def test_onnx_has_few_nodes(run):
    """Each costs a runtime something, and caformer_s18 has 508."""
    needs_onnx()
    import onnx

    status, _, _ = run("svit_small", "--static", "--img-size", "64")
    assert status == 0
    graph = onnx.load("svit_small.onnx").graph
    assert len(graph.node) < 600
    assert not {node.op_type for node in graph.node} & {"Slice", "Squeeze", "Unsqueeze"}
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    sums = [values[node.input[2]] for node in graph.node if node.op_type == "ConvTranspose"]
    assert len(sums) == 8
    assert all(bias[-1] > 0 and not bias[:-1].any() for bias in sums)  # 1e-12, without which a mass may be 0


def test_onnx_quantizes(run, two_stages):
    """As it is, by both quantizers of onnxruntime; the outputs stay near."""
    needs_onnx()
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(torch.randn(8, 2, 3, 64, 64).numpy())

        def get_next(self) -> dict | None:
            return next(({"image": x} for x in self.images), None)

    options = ["--checkpoint", "c.safetensors", "--static", "--batch-size", "2"]
    assert run("test_svit", *options)[0] == 0
    quantize_dynamic("test_svit.onnx", "dynamic.onnx", weight_type=QuantType.QUInt8)
    quantize_static("test_svit.onnx", "static.onnx", Images())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = two_stages(x)
    for file in ("dynamic.onnx", "static.onnx"):
        found = export.load_onnx(Path(file))(x)
        difference = (found - expected).norm() / expected.norm()
        assert 1e-5 < difference < 0.1, (file, difference)


@pytest.fixture
def two_blocks(run, monkeypatch) -> torch.nn.Module:
    """As `two_stages`; the last of two blocks in a stage counts, with cells that are not square and two rounds."""
    arguments = dict(TWO_STAGES, depths=(2, 1), stoken_size=((4, 2), 1), n_iter=(2, 1), num_heads=(2, 2))
    monkeypatch.setattr(export, "make_model", partial(export.make_model, **arguments))
    return checkpoint(**arguments)


def test_super_tokens(run, two_blocks):
    """Association and attention are those that svit.visualize shows, at any size."""
    needs_onnx()
    import onnxruntime

    status, out, err = run("test_svit", "--checkpoint", "c.safetensors", "--outputs", "super-tokens")
    assert (status, err) == (0, "")
    assert list(differences(out)) == [
        f"{shape} {name}"
        for shape in ("2x3x64x64", "1x3x96x128", "3x3x71x85")
        for name in ("logits", "stage1_association", "stage1_attention")
    ]
    session = onnxruntime.InferenceSession("test_svit.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "stage1_association", "stage1_attention"]
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata == {**TOLD, "cells": {"stage1": [4, 2]}}

    for shape in ((1, 3, 64, 64), (3, 3, 50, 131)):
        images = torch.randn(shape)
        logits, association, attention = (torch.from_numpy(o) for o in session.run(None, {"image": images.numpy()}))
        torch.testing.assert_close(logits, two_blocks(images), rtol=1e-4, atol=1e-4)
        assert len(association) == len(attention) == len(images)
        for image, q, weights in zip(images, association, attention, strict=True):
            with watch(two_blocks) as layers:
                two_blocks(image[None])
            layer = last_of_stages(layers)["stage 1"]
            assert layer.name == "stages.0.blocks.1.attn"
            tokens, found = layer.sample()
            hh, ww = found.q.shape[:2]
            assert q.shape == (9, 4 * hh, 2 * ww)
            whole = from_cells(found.q.permute(0, 1, 3, 2)[None], (4, 2), (4 * hh, 2 * ww))[0]
            torch.testing.assert_close(q, whole.permute(2, 0, 1), rtol=0, atol=1e-5)
            assert q.std() > 1e-3
            torch.testing.assert_close(weights, attention_weights(layer.layer, tokens), rtol=0, atol=1e-5)
            assert weights.shape == (2, hh * ww, hh * ww)


def test_model_without_super_tokens(run):
    needs_onnx()
    status, out, err = run("test_convnext", "--outputs", "super-tokens")
    assert (status, out) == (1, "")
    assert err.endswith("error: --outputs super-tokens: expected a model with super tokens, got test_convnext\n")
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--format torch", "writes ONNX, got --format torch"),
        ("--format aoti", "writes ONNX, got --format aoti"),
        ("--int8 .", "writes float32, got --int8 too"),
    ],
)
def test_super_tokens_are_onnx_in_float32(run, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run("test_svit", "--outputs", "super-tokens", *options.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --outputs super-tokens: {message}\n")


def test_a_file_with_a_wrong_association_is_not_kept(run, two_blocks, monkeypatch):
    needs_onnx()
    form = export.FORMATS["onnx"]

    def load(path: Path) -> Callable:
        def run(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, association, attention = form.load(path)(x)
            return logits, association + 0.01, attention

        return run

    monkeypatch.setitem(export.FORMATS, "onnx", form._replace(load=load))
    options = ["--checkpoint", "c.safetensors", "--static", "--outputs", "super-tokens"]
    status, out, err = run("test_svit", *options)
    assert status == 1
    assert out.startswith("1x3x64x64 logits: max difference")
    wrong = (
        "error: the file is wrong, and is not kept; 1x3x64x64 stage1_association: max difference from PyTorch 1.0e-02"
    )
    assert err.startswith(wrong)
    assert os.listdir() == ["c.safetensors"]


WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose")


def nodes_in_int8(model) -> set[str]:
    """The names of nodes whose weight is in int8, with a scale for each channel."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in values and len(values[node.input[1]].dims) == 1
    }
    return {node.name for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in weights}


def test_int8(run, digits, see):
    """Dense convolutions and the last linear layer; the scales are those of the images as the model sees them."""
    needs_onnx()
    import onnx

    options = ["--checkpoint", str(digits.checkpoint), "--static", "--batch-size", "3"]
    status, out, err = run("test_svit", *options, "--int8", str(digits.root / "val"))
    assert (status, err) == (0, "")
    assert os.listdir() == ["test_svit_int8.onnx"]
    line = re.search(r"^int8: the class of float32 on (\d+) of (\d+) images, .* outputs (\S+)$", out, re.MULTILINE)
    assert int(line[2]) == len(digits.files)

    model = onnx.load("test_svit_int8.onnx")
    told = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert told.keys() == TOLD.keys()
    assert (told["input_size"], told["class_names"]) == ([3, 16, 16], list(image_data.CLASSES))
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTED]
    dense = {node.name for node in nodes if not any(a.name == "group" and a.i > 1 for a in node.attribute)}
    expected = {node.name for node in nodes if node.op_type in ("Conv", "Gemm")} & dense
    assert nodes_in_int8(model) == expected
    assert 20 < len(expected) < len(nodes) - 10

    (first,) = (node for node in model.graph.node if "image" in node.input)
    assert first.op_type == "QuantizeLinear"
    (scale,) = (onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == first.input[1])
    images = see(digits.files)
    assert scale.item() == pytest.approx((images.max() - images.min()).item() / 255, rel=1e-3)

    quantized = export.load_onnx(Path("test_svit_int8.onnx"))
    with torch.no_grad():
        expected = digits.model(images[:39])
    found = torch.cat([quantized(batch) for batch in images[:39].split(3)])
    error = ((found - expected).norm() / expected.norm()).item()
    assert 1e-3 < error < 0.2
    assert float(line[3]) == pytest.approx(error, rel=0.1)  # printed for one image more
    same = (found.argmax(1) == expected.argmax(1)).sum().item()
    assert int(line[1]) - 1 <= same <= int(line[1])


def test_int8_that_finds_other_classes_is_not_kept(run, digits, monkeypatch):
    needs_onnx()
    quantize = export.quantize

    def with_zeros(path: Path, batches: list[torch.Tensor]) -> None:
        import onnx

        quantize(path, batches)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8:
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values * 0, tensor.name))
        onnx.save(model, path)

    monkeypatch.setattr(export, "quantize", with_zeros)
    options = ["--checkpoint", str(digits.checkpoint), "--static", "--int8", str(digits.root / "val")]
    status, out, err = run("test_svit", *options)
    assert (status, "wrote" in out) == (1, False)
    found = re.match(r"error: the file is not kept; int8: the class of float32 on (\d+) of (\d+) images, relative", err)
    assert int(found[1]) < 0.8 * int(found[2])
    assert err.endswith("; expected 80% of the images\n")
    assert os.listdir() == []


def test_int8_takes_images_of_all_parts_of_a_folder(tmp_path, monkeypatch):
    for i in range(10):
        Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(export, "CALIBRATION_IMAGES", 4)
    assert [path.stem for path in export.calibration_images(tmp_path)] == ["0", "2", "5", "7"]
    monkeypatch.setattr(export, "CALIBRATION_IMAGES", 40)
    assert len(export.calibration_images(tmp_path)) == 10


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("empty", "--int8: empty: no images in this folder"),
        ("text", "--int8: text: no images in this folder; left out 1 .txt"),
        ("none", "--int8: expected a folder of images, got none"),
        ("damaged", "damaged/x.png: cannot be read (not an image of a format that Pillow reads)"),
    ],
)
def test_int8_without_images(run, two_stages, folder, message):
    needs_onnx()
    for name, file in (("empty", None), ("text", "x.txt"), ("damaged", "x.png")):
        Path(name).mkdir()
        if file:
            Path(name, file).write_text("no image")
    before = sorted(os.listdir())
    status, out, err = run("test_svit", "--checkpoint", "c.safetensors", "--int8", folder)
    assert (status, out, err) == (1, "", f"error: {message}\n")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("form", ["torch", "aoti"])
def test_int8_is_onnx(run, form, capsys):
    with pytest.raises(SystemExit) as stop:
        run("test_svit", "--format", form, "--int8", ".")
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: --int8: writes ONNX, got --format {form}\n")


def test_model_that_does_not_fuse(run, two_stages, monkeypatch):
    """Its norms stay in the file, which is said."""
    create = export.make_model

    def create_pruned(*args, **kwargs) -> torch.nn.Module:
        model = create(*args, **kwargs)
        torch.nn.utils.prune.l1_unstructured(model.stages[0].blocks[0].mlp.fc1, "weight", 0.5)
        return model

    monkeypatch.setattr(export, "make_model", create_pruned)
    options = ["--format", "torch", "--static", "--img-size", "32", "--checkpoint", "c.safetensors"]
    status, out, err = run("test_svit", *options)
    assert status == 0
    assert err.startswith("warning: norms and layer scales are not folded: ")
    assert "fc1: expected a plain Conv2d" in err
    assert "wrote test_svit.pt2" in out


def test_torch(run, two_stages):
    status, out, err = run("test_svit", "--checkpoint", "c.safetensors", "--format", "torch")
    assert (status, err) == (0, "")
    assert sorted(os.listdir()) == ["c.safetensors", "test_svit.pt2"]
    assert list(differences(out)) == ["2x3x64x64", "1x3x96x128", "3x3x71x85"]
    told = dict.fromkeys(TOLD, "")
    program = torch.export.load("test_svit.pt2", extra_files=told)
    assert {key: json.loads(value) for key, value in told.items()} == TOLD
    check(two_stages, program.module(), (1, 3, 64, 64), (4, 3, 50, 131))
    # Plain operations: whoever loads it does not need svit.
    assert not any("svit" in str(node.target) for node in program.graph.nodes if node.op == "call_function")


def test_aoti(run, two_stages):
    needs_compiler()
    options = ["--format", "aoti", "--static", "--img-size", "32", "--batch-size", "2"]  # the least to compile
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        status, out, err = run("test_svit", "--checkpoint", "c.safetensors", *options)
    assert (status, err) == (0, "")
    assert sorted(os.listdir()) == ["c.safetensors", "test_svit.pt2"]
    assert list(differences(out)) == ["2x3x32x32"]
    compiled = torch._inductor.aoti_load_package("test_svit.pt2")
    told = {key: json.loads(value) for key, value in compiled.get_metadata().items() if key in TOLD}
    assert told == {**TOLD, "input_size": [3, 32, 32]}
    check(two_stages, compiled, (2, 3, 32, 32))


def test_model_of_one_size(run):
    status, out, err = run("test_vit", "--format", "torch", "--img-size", "64")
    assert (status, err) == (0, "warning: neither --checkpoint nor --pretrained: the weights are random\n")
    assert list(differences(out)) == ["2x3x64x64", "1x3x64x64", "3x3x64x64"]
    assert out.endswith("test_vit, image batch x 3 x 64 x 64\n")


def test_sizes_that_do_not_work_are_said(run):
    """A ResNet whose stem pools is exported for one parity of sizes."""
    status, out, err = run("test_resnet", "--format", "torch", "--img-size", "64")
    assert status == 0
    assert list(differences(out)) == ["2x3x64x64", "1x3x96x128"]
    assert err.splitlines()[1].startswith("warning: images of 3x3x71x85 do not work: Guard failed")


def test_weights_of_a_folder(run):
    """What push_to_hub.py writes."""
    model = checkpoint()
    timm.models.save_for_hf(model, "folder", safe_serialization=True)
    options = ["--format", "torch", "--static", "--img-size", "32"]
    status, _, err = run("local-dir:folder", *options)
    assert (status, err) == (0, "")
    check(model, export.load_torch(Path("folder.pt2")), (1, 3, 32, 32))


@pytest.mark.parametrize("wrong", [lambda x: x + 0.1, lambda x: x * torch.nan])
def test_a_wrong_file_is_not_kept(run, two_stages, monkeypatch, wrong):
    form = export.FORMATS["torch"]
    broken = form._replace(load=lambda path: lambda x: wrong(form.load(path)(x)))
    monkeypatch.setitem(export.FORMATS, "torch", broken)
    Path("out.pt2").write_text("old")
    options = ["--format", "torch", "--static", "--img-size", "32", "--out", "out.pt2"]
    status, out, err = run("test_svit", "--checkpoint", "c.safetensors", *options)
    assert (status, out) == (1, "")
    assert err.startswith("error: the file is wrong, and is not kept; 1x3x32x32: max difference from PyTorch")
    assert sorted(os.listdir()) == ["c.safetensors", "out.pt2"]
    assert Path("out.pt2").read_text() == "old"


BAD = {
    "svit_smal": "model: no model 'svit_smal' in timm; did you mean svit_small",
    "foo/bar": "model: foo/bar cannot be made with {'exportable': True}: Model name 'foo/bar' has no source",
    "local-dir:none": "model: local-dir:none cannot be made with {'exportable': True}: Config file not found",
    "test_svit --checkpoint none.pth": "none.pth: no such file\n",
    "test_svit --checkpoint bad.safetensors": "bad.safetensors: cannot be read; it is damaged",
    "test_resnet --checkpoint c.safetensors": "c.safetensors: does not fit the model; ",
    "test_svit --out out.onnx": "out.onnx: expected a name that ends in .pt2\n",
    "test_svit --out none/out.pt2": "none/out.pt2: there is no folder none\n",
    "test_svit --out folder.pt2": "folder.pt2: is a folder\n",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments(run, line):
    checkpoint()
    Path("bad.safetensors").write_bytes(b"nothing")
    Path("folder.pt2").mkdir()
    before = sorted(os.listdir())
    status, out, err = run("--format", "torch", *line.split())
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"error: {BAD[line]}".rstrip("\n"))
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("options", ["--img-size 0", "--img-size 8 8 8", "--img-size a", "--batch-size -1"])
def test_bad_numbers(run, options):
    with pytest.raises(SystemExit) as stop:
        run("test_svit", *options.split())
    assert stop.value.code == 2
    assert os.listdir() == []


def test_cannot_be_written(run, two_stages, monkeypatch):
    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.export, "save", full_disk)
    options = ["--checkpoint", "c.safetensors", "--format", "torch", "--static", "--img-size", "32"]
    status, out, err = run("test_svit", *options)
    assert (status, out) == (1, "")
    assert err == "error: test_svit.pt2: cannot be written (No space left on device)\n"
    assert os.listdir() == ["c.safetensors"]


def test_cannot_be_exported(run, two_stages, monkeypatch):
    def refuse(*_, **__):
        raise KeyError("no such operator\nand so on")

    monkeypatch.setattr(torch.export, "export", refuse)
    status, out, err = run("test_svit", "--checkpoint", "c.safetensors", "--format", "torch")
    assert (status, out) == (1, "")
    assert err.startswith("error: test_svit: cannot be exported: KeyError: 'no such operator")
    assert err.count("\n") == 1
    assert os.listdir() == ["c.safetensors"]


def test_missing_package(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, out, err = run("test_svit")
    assert (status, out) == (1, "")
    assert err == "error: --format onnx: needs onnxruntime; pip install 'svit[export]'\n"


def test_no_compiler(run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    cpp_builder.cpp_compiler_search.cache_clear()
    status, out, err = run("test_svit", "--format", "aoti")
    assert (status, out) == (1, "")
    assert err.startswith("error: --format aoti: needs a C++ compiler, such as g++")
