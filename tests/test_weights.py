"""The weights that come with the package."""

import json
import os
from pathlib import Path

import timm
import torch
from safetensors import safe_open

import svit
from svit.checkpoints import create_model
from svit.cli import command

FILE = Path(svit.__file__).parent / "weights" / "svit_nano_32.cifar10.safetensors"
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


def test_the_file_is_small_and_in_half_precision():
    assert os.path.getsize(FILE) <= 8 * 2**20
    with safe_open(FILE, "pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float16, torch.int64}  # int64: BatchNorm's counters


def test_hits_among_200_test_images(tmp_path):
    """Exactly as many as when the weights were made, of each class."""
    arguments = ["svit_nano_32.cifar10", "--pretrained", "--data-dir", str(IMAGES), "--workers", "0", "--device", "cpu"]
    assert command("validate")([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["images"] == 200
    hits = {name: round(found["top1"] * found["images"] / 100) for name, found in result["classes"].items()}
    assert hits == HITS
    assert result["hits"] == sum(HITS.values())


def test_offline_through_timm():
    model = timm.create_model("svit_nano_32.cifar10", pretrained=True)
    assert model.num_classes == 10
    assert next(model.parameters()).dtype == torch.float32
    assert model.pretrained_cfg["label_names"][3] == "cat"
    same = create_model("svit_nano_32", FILE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    backbone = timm.create_model("svit_nano_32.cifar10", pretrained=True, features_only=True)
    assert torch.equal(backbone.state_dict()["stem.layers.0.weight"], model.state_dict()["stem.layers.0.weight"])
    other = timm.create_model("svit_nano_32.cifar10", pretrained=True, num_classes=3)
    assert other.head.fc.weight.shape[0] == 3
