"""Images of one, two and four channels through all tools of classification."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from helpers import missing
from svit.checkpoints import create_model, save_model
from svit.cli import command
from svit.images import MODES

RECIPE = """
model: test_svit
model_args: {{in_chans: {channels}}}
data_dir: {data}
epochs: 1
batch_size: 4
img_size: 16
crop_pct: 1.0
mean: [0.2, 0.4, 0.9]
std: [0.1, 0.2, 0.3]
color_jitter: 0.4
auto_augment: rand-m9-n3-mstd0.5-inc1
random_erasing: 0.3
mixup: 0.8
workers: 0
"""
MEAN = {1: [0.5], 2: [0.5, 0.5], 4: [0.2, 0.4, 0.9, 0.5]}
STD = {1: [0.2], 2: [0.2, 0.5], 4: [0.1, 0.2, 0.3, 0.5]}


@pytest.fixture(autouse=True)
def one_process():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=[1, 2, 4])
def channels(request) -> int:
    return request.param


@pytest.fixture
def data(tmp_path, channels) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, channels), np.uint8).squeeze())
                image.save(tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def pixels(file: Path, channels: int) -> torch.Tensor:
    """What a model of these means and deviations shall see (1, C, 16, 16)."""
    with Image.open(file) as image:
        values = np.asarray(image).reshape(16, 16, channels) / 255
    values = (values - MEAN[channels]) / STD[channels]
    return torch.tensor(values).permute(2, 0, 1)[None].float()


def test_from_training_to_the_hub(data, channels, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(channels=channels, data=data))
    assert command("train")([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--cpu"]) == 0
    checkpoint = tmp_path / "out" / "best.safetensors"
    weights = ["--checkpoint", str(checkpoint)]
    model = create_model("test_svit", checkpoint)
    cfg = model.pretrained_cfg
    assert tuple(cfg["input_size"]) == (channels, 16, 16)
    assert (cfg["mean"], cfg["std"]) == (pytest.approx(MEAN[channels]), pytest.approx(STD[channels]))
    files = [data / "val" / name / f"{i}.png" for name in "ab" for i in range(4)]
    logits = model(torch.cat([pixels(file, channels) for file in files])).detach()

    options = ["--data-dir", str(data), "--workers", "0", "--json", str(tmp_path / "result.json")]
    assert command("validate")(["test_svit", *weights, *options]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0] * 4 + [1] * 4))
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-4)

    capsys.readouterr()
    assert command("infer")([*map(str, files), "--model", "test_svit", *weights, "--format", "json"]) == 0
    for found, shares in zip(json.loads(capsys.readouterr().out), logits.softmax(1).tolist(), strict=True):
        assert {top["class"]: top["probability"] for top in found["classes"]} == pytest.approx(
            dict(zip("ab", shares, strict=True)), abs=1e-4
        )

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing("matplotlib")
    options = ["--img-size", "16", "16", "--out", str(tmp_path / "page")]
    assert command("visualize")([str(files[0]), "--model", "test_svit", *weights, *options]) == 0
    share = logits[0].softmax(0).max().item()
    assert f"({share:.1%})" in capsys.readouterr().out

    options = ["--format", "torch", "--static", "--out", str(tmp_path / "model.pt2")]
    assert command("export")(["test_svit", *weights, *options]) == 0
    told = {"input_size": "", "mean": "", "std": ""}
    run = torch.export.load(tmp_path / "model.pt2", extra_files=told).module()
    told = {key: json.loads(told[key]) for key in ("input_size", "mean", "std")}
    assert told == {"input_size": [channels, 16, 16], "mean": cfg["mean"], "std": cfg["std"]}
    torch.testing.assert_close(run(pixels(files[0], channels)), logits[:1], atol=1e-4, rtol=1e-4)

    assert command("push")([str(checkpoint), "me/small", "--local", str(tmp_path / "hub")]) == 0
    usage = re.search(r"```python\n(.*?)```", (tmp_path / "hub" / "README.md").read_text(), re.DOTALL)[1]
    assert f'read_image("photo.jpg", "{MODES[channels]}")' in usage
    usage = usage.replace("hf-hub:me/small", f"local-dir:{tmp_path / 'hub'}").replace("photo.jpg", str(files[0]))
    names: dict = {}
    exec(usage, names)
    torch.testing.assert_close(names["logits"], logits[:1], atol=1e-4, rtol=1e-4)
    assert names["names"] == ["a", "b"]


def test_a_checkpoint_that_tells_nothing_of_its_channels(data, channels, tmp_path, capsys):
    """timm's means for three channels, and a state dict alone."""
    model = timm.create_model("test_svit", in_chans=channels, num_classes=2).eval()
    save_model(tmp_path / "told.safetensors", model, "test_svit", recipe={"model_args": {"in_chans": channels}})
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    found = []
    for options in (["told.safetensors"], ["bare.pth", "--in-chans", str(channels), "--num-classes", "2"]):
        line = [str(data / "val" / "a" / "0.png"), "--model", "test_svit", "--format", "json", "--checkpoint"]
        assert command("infer")([*line, str(tmp_path / options[0]), *options[1:]]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["classes"])
    assert found[0] == found[1]


def test_channels_that_no_image_has_are_refused_before_work(tmp_path, data, capsys):
    recipe = RECIPE.format(channels=5, data=data).replace("mean", "#").replace("std", "#")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert command("train")([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--cpu"]) == 1
    assert "in_chans: expected the channels of an image, one of 1 (L), 2 (LA), " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_channels_is_refused(tmp_path, data, capsys):
    save_model(tmp_path / "rgb.safetensors", timm.create_model("test_svit", num_classes=2), "test_svit", ["a", "b"])
    teacher = f"teacher: test_svit\nteacher_checkpoint: {tmp_path / 'rgb.safetensors'}\n"
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(channels=1, data=data) + teacher)
    assert command("train")([str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--cpu"]) == 1
    assert "error: teacher: expected one for images of 1 channels, as the model, got 3" in capsys.readouterr().err
