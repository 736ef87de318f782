"""The weights that come with the package."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from skimage.data import chelsea
from timm.data import create_transform, resolve_model_data_config

from svit.checkpoints import create_model, read_metadata
from svit.cli import command
from svit.models.svit import WEIGHTS

FILES = {file.stem: file for file in WEIGHTS.glob("*.safetensors")}
CLASSES = {"svit_nano_32.cifar10": 10, "svit_nano.photos20": 20}
IMAGES = Path(__file__).parent / "data" / "cifar10_200.tar"  # the first 20 test images of each class, in file order

HITS = {
    "airplane": 19,
    "automobile": 20,
    "bird": 15,
    "cat": 18,
    "deer": 16,
    "dog": 15,
    "frog": 19,
    "horse": 20,
    "ship": 20,
    "truck": 18,
}  # of 20


def test_the_files():
    assert set(FILES) == {*CLASSES, "retinanet_svit-nano_fpn_bccd"}
    assert sum(file.stat().st_size for file in FILES.values()) <= 25e6


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_small_and_in_half_precision(name):
    assert FILES[name].stat().st_size <= 9e6
    with safe_open(FILES[name], "pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float16, torch.int64}  # int64: BatchNorm's counters


@pytest.mark.parametrize("name", CLASSES)
def test_metadata(name):
    """A model made by its tag and one made of the file as any checkpoint agree, and no folder of ours is named."""
    metadata = read_metadata(FILES[name])
    config = json.loads(json.dumps(timm.get_pretrained_cfg(name).to_dict()))
    written = metadata["pretrained_cfg"]
    assert written.pop("architecture") == name.split(".")[0]
    assert written == {key: config[key] for key in written}
    assert not metadata["facts"]["recipe"]["data_dir"].startswith("/")


def test_hits_among_200_test_images(tmp_path):
    """Exactly as many as when the weights were made, of each class."""
    arguments = ["svit_nano_32.cifar10", "--data-dir", str(IMAGES), "--workers", "0", "--device", "cpu"]
    assert command("validate")([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 200
    hits = {name: round(found["top1"] * found["images"] / 100) for name, found in result["classes"].items()}
    assert hits == HITS
    assert result["hits"] == sum(HITS.values())


def test_logits_of_a_photograph():
    """Those of when the weights were made: a cat, which is none of the classes, looks like a dog."""
    model = timm.create_model("svit_nano.photos20", pretrained=True).eval()
    image = create_transform(**resolve_model_data_config(model))(Image.fromarray(chelsea()))
    with torch.no_grad():
        probabilities = model(image[None])[0].softmax(0)
    assert image.shape == (3, 128, 128)
    found = {model.pretrained_cfg["label_names"][i]: p for p, i in zip(*map(list, probabilities.topk(3)), strict=True)}
    expected = {"dingo": 0.7789, "golden_retriever": 0.0393, "border_terrier": 0.0354}
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_offline_through_timm(name):
    model = timm.create_model(name, pretrained=True)
    assert model.num_classes == CLASSES[name]
    assert len(model.pretrained_cfg["label_names"]) == CLASSES[name]
    assert next(model.parameters()).dtype == torch.float32
    same = create_model(name.split(".")[0], FILES[name])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    backbone = timm.create_model(name, pretrained=True, features_only=True)
    assert torch.equal(backbone.state_dict()["stem.layers.0.weight"], model.state_dict()["stem.layers.0.weight"])
    other = timm.create_model(name, pretrained=True, num_classes=3)
    assert other.head.fc.weight.shape[0] == 3
