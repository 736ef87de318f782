"""The examples of docs/clients.md, each as it stands there; `make clients` has all the libraries they need."""

import importlib.util
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from svit.checkpoints import create_model
from svit.cli import command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SHIPPED = ROOT / "svit" / "weights" / "svit_nano_32.cifar10.safetensors"


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"missing: {package}, which make clients installs")


def blocks(section: str, language: str = "python") -> list[str]:
    (text,) = (part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if part.startswith(f"{section}\n"))
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example of a section in an empty folder; what its names are bound to."""

    def run(section: str, number: int = 0, changes: dict[str, str] | None = None) -> dict:
        text = blocks(section)[number]
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "example.py").write_text(text)
        torch.manual_seed(0)
        return runpy.run_path(str(tmp_path / "example.py"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return run


@pytest.fixture
def hub_folder(tmp_path):
    arguments = [SHIPPED, "me/svit_nano_cifar10", "--local", tmp_path / "svit_nano_cifar10"]
    assert command("push")([*map(str, arguments)]) == 0
    return tmp_path / "svit_nano_cifar10"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The ONNX file of the shipped model, and the model's logits of a black image."""
    needs("onnx", "onnxscript", "onnxruntime")
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert command("export")(["svit_nano_32.cifar10", "--out", str(out)]) == 0
    with torch.no_grad():
        return out, create_model("svit_nano_32.cifar10", pretrained=True)(torch.zeros(1, 3, 32, 32)).numpy()


@pytest.fixture
def onnx_file(exported, tmp_path):
    shutil.copy(exported[0], tmp_path)
    return exported[1]


def photo(path: Path, seed: int = 0, light: int = 0) -> Path:
    """A noisy image, with `light` rows of white in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    pixels[12 : 12 + light] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_every_section_is_here():
    tested = set(re.findall(r'(?:run|blocks)\("([\w .-]+)"', Path(__file__).read_text()))
    sections = set(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
    assert sections - tested == {"timm's scripts", "ONNX Runtime Web", "Versions"}


def test_torchvision(run):
    found = run("torchvision")
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} == found["losses"].keys()
    assert all(torch.isfinite(loss) for loss in found["losses"].values())
    gradients = [p.grad for p in found["model"].backbone.body.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0


def test_segmentation_models_pytorch(run):
    needs("segmentation_models_pytorch")
    found = run("segmentation_models_pytorch")
    assert found["masks"].shape == (2, 3, 128, 128)
    encoder = found["model"].encoder
    x = torch.rand(2, 3, 128, 128)
    assert [m.shape[-1] for m in encoder(x)] == [128, 64, 32, 16, 8, 8]  # stride 16 at the end
    found["masks"].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    for decoder in (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "UPerNet",
        "Segformer",
    ):
        model = getattr(found["smp"], decoder)("tu-svit_nano", encoder_weights=None, classes=2)
        assert model(torch.rand(2, 3, 128, 128)).shape == (2, 2, 128, 128), decoder


def test_transformers_pipeline(run, hub_folder):
    needs("transformers")
    image = Image.open(photo(hub_folder.parent / "photo.png"))
    found = run("transformers")["found"]
    model = create_model("svit_nano_32.cifar10", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        best = model(transform(image)[None]).softmax(1)[0].topk(5)
    names = json.loads((hub_folder / "config.json").read_text())["label_names"]
    expected = [(names[i], pytest.approx(p, abs=1e-4)) for p, i in zip(*(t.tolist() for t in best), strict=True)]
    assert [(one["label"], one["score"]) for one in found] == expected


def test_transformers_trainer(run, hub_folder):
    needs("transformers", "accelerate")
    losses = [row["loss"] for row in run("transformers", 1)["trainer"].state.log_history if "loss" in row]
    losses = [float(loss) for loss in losses]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_transformers_detr(run):
    needs("transformers")
    found = run("transformers", 2)
    assert found["outputs"].logits.shape == (1, 100, 4)
    assert found["outputs"].pred_boxes.shape == (1, 100, 4)
    found["outputs"].pred_boxes.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in found["model"].model.backbone.parameters())


def test_lightning(run):
    needs("lightning")
    losses = run("Lightning")["module"].losses
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_fastai(run, tmp_path):
    needs("fastai")
    for number in range(16):
        photo(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", number)
    learner = run("fastai")["learner"]
    assert len(learner.recorder.values) == 1
    assert np.isfinite(learner.recorder.values[0]).all()
    body, x = learner.model[0].eval(), torch.rand(2, 3, 32, 32)
    weights = {key.removeprefix("model."): value for key, value in body.state_dict().items()}
    model = timm.create_model("svit_nano_32", num_classes=0)
    model.load_state_dict(weights)
    torch.testing.assert_close(body(x), model.eval().forward_features(x))


@pytest.mark.parametrize("model", ["Padim", "Patchcore"])
def test_anomalib(run, tmp_path, model):
    needs("anomalib", "openvino")
    import onnxruntime
    import openvino

    for number in range(8):
        photo(tmp_path / "parts" / "good" / f"{number}.png", number, light=number % 2)
        photo(tmp_path / "parts" / "bad" / f"{number}.png", number, light=8)
    found = run("anomalib", changes={"Padim": model, "n_features=40, ": "n_features=40, " if model == "Padim" else ""})
    model, backbone = found["model"].eval(), found["backbone"].eval()
    x = torch.rand(1, 3, 64, 64)
    features = model.model.feature_extractor(x)
    for name, expected in zip(("stages_1", "stages_2"), backbone(x), strict=True):
        torch.testing.assert_close(features[name], expected)
    x = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        expected = model(x)
    in_onnxruntime = onnxruntime.InferenceSession(found["files"][0])
    outputs = [output.name for output in in_onnxruntime.get_outputs()]
    in_openvino = openvino.compile_model(found["files"][1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for values in (in_onnxruntime.run(None, {"input": x.numpy()}), in_openvino(x.numpy()).to_tuple()):
        values = dict(zip(outputs, values, strict=True))
        # In float32 PatchCore's distances, small differences of large squares, are known to a few 1e-3.
        np.testing.assert_allclose(values["anomaly_map"], expected.anomaly_map, atol=1e-2)
        np.testing.assert_allclose(values["pred_score"].ravel(), expected.pred_score.ravel(), atol=1e-2)


def test_ultralytics(run, tmp_path, monkeypatch):
    needs("ultralytics")
    import onnxruntime

    monkeypatch.setenv("YOLO_OFFLINE", "1")
    (tmp_path / "svit_nano.yaml").write_text(blocks("Ultralytics", "yaml")[0])
    (tmp_path / "cells.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [a, b, c]\n")
    for number in range(4):
        photo(tmp_path / "images" / f"{number}.png", number)
        label = tmp_path / "labels" / f"{number}.txt"
        label.parent.mkdir(exist_ok=True)
        label.write_text(f"{number % 3} 0.5 0.5 0.4 0.6\n")
    found = run("Ultralytics")
    model = found["model"].model.eval()
    assert len(found["results"]) == 1
    assert found["metrics"].box.map50 >= 0
    assert model.stride.tolist() == [8, 16, 32]
    assert isinstance(model.model[0].m, timm.models.FeatureListNet)
    x = torch.rand(1, 3, 160, 160)
    (boxes,) = onnxruntime.InferenceSession(found["file"]).run(None, {"images": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(boxes, model(x)[0], atol=1e-2)


def test_openvino(run, onnx_file):
    needs("openvino")
    np.testing.assert_allclose(run("OpenVINO")["logits"], onnx_file, atol=1e-4)


def test_onnxruntime(run, onnx_file):
    found = run("ONNX Runtime")
    np.testing.assert_allclose(found["logits"], onnx_file, atol=1e-4)
    assert found["names"][3] == "cat"


def test_grad_cam(run):
    needs("pytorch_grad_cam")
    heat = run("Grad-CAM")["heat"]
    assert heat.shape == (1, 32, 32)
    assert (heat.min(), heat.max()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))


def test_captum(run):
    needs("captum")
    found = run("Captum")
    assert found["attributions"].shape == (1, 3, 32, 32)
    model, image = found["model"], found["image"]
    with torch.no_grad():
        change = (model(image) - model(torch.zeros_like(image)))[0, 3]
    assert found["attributions"].sum().item() == pytest.approx(change.item(), abs=0.05 * abs(change.item()) + 0.05)


def test_peft(run):
    needs("peft")
    found = run("PEFT")
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = found["model"].eval()(x)
        assert torch.equal(found["again"](x), expected)
        assert not torch.allclose(found["create"]().eval()(x), expected, atol=1e-2)  # it learned something
        merged = found["model"].merge_and_unload()
        torch.testing.assert_close(merged(x), expected, atol=1e-4, rtol=1e-4)
    example = Path("example.py")
    example.write_text(example.read_text().replace('["head.fc", *norms]', '["head.fc"]'))
    found = runpy.run_path(str(example))
    with torch.no_grad():  # without the norms it is another model, which is why the page has them
        assert (found["again"](x) - found["model"].eval()(x)).abs().max() > 0.05


def test_torchao(run):
    needs("torchao")
    found = run("torchao")
    assert type(found["model"].head.fc.weight).__module__.startswith("torchao")
    assert found["logits"].shape == (1, 10)
