"""Models by name with the weights of a checkpoint: what is saved comes back, and what is wrong is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.data import resolve_data_config
from timm.models import save_for_hf

from svit.checkpoints import (
    class_names,
    create_model,
    read_metadata,
    read_weights,
    save_model,
    size_argument,
)
from svit.convert import CheckpointError
from svit.errors import InputError
from svit.models.original import to_original

NAMES = ["cat", "dog", "coffee cup"]
PREPROCESSING = {
    "input_size": (3, 48, 40),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bilinear",
    "crop_pct": 0.8,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_svit", num_classes=3, pretrained_cfg_overlay=PREPROCESSING).eval()


@pytest.fixture
def checkpoint(tmp_path, model):
    save_model(tmp_path / "small.safetensors", model, "test_svit", NAMES, top1=12.5)
    return tmp_path / "small.safetensors"


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_saved_comes_back(model, checkpoint):
    loaded = create_model("test_svit", checkpoint)
    assert not loaded.training
    assert same(loaded, model)
    assert same(create_model("test_svit", checkpoint, pretrained_cfg_overlay={"crop_pct": 0.5}), model)
    assert class_names(loaded) == NAMES
    config = resolve_data_config({}, model=loaded)
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()} == {
        **PREPROCESSING,
        "crop_mode": "center",
    }
    told = read_metadata(checkpoint)
    assert told["facts"] == {"top1": 12.5}
    assert told["pretrained_cfg"]["architecture"] == "test_svit"
    # timm reads the file, too.
    assert same(timm.create_model("test_svit", num_classes=3, checkpoint_path=str(checkpoint)), model)


def test_other_weights_of_the_model_may_be_saved_and_strided_ones(tmp_path, model):
    doubled = {k: 2 * v for k, v in model.state_dict().items()}
    doubled = {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in doubled.items()}
    save_model(tmp_path / "a.safetensors", model, "test_svit", weights=doubled)
    loaded = create_model("test_svit", tmp_path / "a.safetensors").state_dict()
    assert all(torch.equal(loaded[k], doubled[k]) for k in loaded)
    assert class_names(create_model("test_svit", tmp_path / "a.safetensors")) == ["0", "1", "2"]


def test_model_arguments_of_the_recipe_come_back(tmp_path):
    model = timm.create_model("test_svit", num_classes=3, stem_stride=2)
    recipe = {"model_args": {"stem_stride": 2, "drop_path_rate": 0.1}}
    save_model(tmp_path / "a.safetensors", model, "test_svit", recipe=recipe)
    loaded = create_model("test_svit", tmp_path / "a.safetensors", drop_path_rate=0)
    assert same(loaded, model)
    assert loaded.feature_info[0]["reduction"] == 2


def test_rounds_of_each_stage_come_back(tmp_path):
    model = timm.create_model("test_svit", num_classes=3, n_iter=(2, 3, 1, 1)).eval()
    save_model(tmp_path / "a.safetensors", model, "test_svit", recipe={"model_args": {"n_iter": [2, 3, 1, 1]}})
    loaded = create_model("test_svit", tmp_path / "a.safetensors")
    assert [stage.blocks[0].attn.n_iter for stage in loaded.stages] == [2, 3, 1, 1]
    with pytest.raises(InputError, match=r"n_iter: expected one value for each of the 4 stages, got \[2, 3\]"):
        create_model("test_svit", n_iter=[2, 3])


def test_a_model_of_a_fixed_size_gets_its_checkpoints(tmp_path):
    model = timm.create_model(
        "test_vit", img_size=96, num_classes=3, pretrained_cfg_overlay={"input_size": (3, 96, 96)}
    )
    save_model(tmp_path / "a.safetensors", model, "test_vit")
    assert same(create_model("test_vit", tmp_path / "a.safetensors"), model)


def test_a_failed_save_leaves_the_old_file(checkpoint, model, monkeypatch):
    before = checkpoint.read_bytes()

    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(checkpoint, model, "test_svit")
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_files_without_metadata(tmp_path, model):
    weights = model.state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, tmp_path / "a.pth")
    torch.save({"model": to_original(weights)}, tmp_path / "authors.pth")
    safetensors.torch.save_file(to_original(weights), tmp_path / "authors.safetensors")
    for name in ("a.pth", "authors.pth", "authors.safetensors"):
        loaded = create_model("test_svit", tmp_path / name, num_classes=3)
        assert same(loaded, model)
        assert read_metadata(tmp_path / name) == {"pretrained_cfg": {}, "facts": {}}
    with pytest.raises(CheckpointError, match=r"fit the model; other shapes: 2 \(head.fc.weight: "):
        create_model("test_svit", tmp_path / "authors.pth", num_classes=7)


def test_the_moving_average_of_a_file_that_holds_both(tmp_path, model, checkpoint):
    average = {k: v + 1 for k, v in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": average}, tmp_path / "both.pth")
    loaded = create_model("test_svit", tmp_path / "both.pth", ema=True, num_classes=3)
    assert torch.equal(loaded.state_dict()["head.fc.bias"], average["head.fc.bias"])
    assert same(create_model("test_svit", tmp_path / "both.pth", num_classes=3), model)
    with pytest.raises(CheckpointError, match="no entry 'model_ema'"):
        create_model("test_svit", checkpoint, ema=True)
    with pytest.raises(InputError, match="ema: expected a checkpoint"):
        create_model("test_svit", ema=True)


def test_a_checkpoint_that_does_not_fit(checkpoint):
    with pytest.raises(CheckpointError, match=r"other shapes: 2 \(head.fc.weight: \[3, 64\], expected \[7, 64\]"):
        create_model("test_svit", checkpoint, num_classes=7)
    with pytest.raises(CheckpointError, match="small.safetensors: does not fit the model; missing keys"):
        create_model("svit_nano_32", checkpoint)
    with pytest.raises(InputError, match="pretrained: expected False together with a checkpoint"):
        create_model("test_svit", checkpoint, pretrained=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_weights_that_are_not_finite(tmp_path, model, dtype):
    """They would give some class for each image."""
    weights = {key: value.to(dtype) if "head" in key else value for key, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "a.pth")
    create_model("test_svit", tmp_path / "a.pth", num_classes=3)
    weights["head.fc.bias"] = torch.tensor([0, torch.nan, 0]).to(dtype)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth holds numbers that are not finite, in head.fc.bias$"):
        create_model("test_svit", tmp_path / "a.pth", num_classes=3)


def test_a_damaged_checkpoint(checkpoint):
    whole = checkpoint.read_bytes()
    garbage = safetensors.torch.save({"a": torch.zeros(1)}, {"pretrained_cfg": "{no json"})
    for content in (b"", whole[:4], whole[:2000], whole[:-1], b"\xff" * len(whole), garbage):
        checkpoint.write_bytes(content)
        with pytest.raises(CheckpointError, match="small.safetensors: cannot be read"):
            create_model("test_svit", checkpoint)
    pth = checkpoint.with_suffix(".pth")
    pth.write_bytes(whole)
    with pytest.raises(CheckpointError, match="small.pth: cannot be read"):
        create_model("test_svit", pth)
    for missing in (checkpoint.parent, checkpoint.parent / "none.safetensors", checkpoint.parent / "none.pth"):
        with pytest.raises(CheckpointError, match="no such file"):
            create_model("test_svit", missing)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("svit_smal", {}, "no model 'svit_smal' in timm; did you mean svit_small"),
        ("svit_small.nothing", {}, "svit_small.nothing cannot be made: Invalid pretrained tag"),
        ("me/model", {}, "hf-hub:me/model"),
        ("ftp:model", {}, "Unknown model source 'ftp'"),
        ("local-dir:nowhere", {}, "Config file not found: nowhere/config.json"),
        ("test_svit", {"nothing": 1}, "test_svit cannot be made with {'nothing': 1}: .*unexpected keyword"),
        ("test_svit", {"num_heads": (3, 3, 3, 3)}, "expected a divisor of dim 8, got 3"),
        ("svit_small", {"pretrained": True}, "the weights cannot be downloaded automatically"),
    ],
)
def test_a_model_that_cannot_be_made(name, arguments, message):
    with pytest.raises(InputError, match=message):
        create_model(name, **arguments)


def test_weights_of_the_hub_that_cannot_be_had(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nor no host")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    with pytest.raises(InputError, match="hf-hub:me/model cannot be made: no route to host or no host"):
        create_model("hf-hub:me/model", pretrained=True)


def test_models_of_a_folder_in_the_hubs_layout(tmp_path, model):
    save_for_hf(model, str(tmp_path / "hub"), model_config={"label_names": NAMES, "pretrained_cfg": {"tag": None}})
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architecture"] == "test_svit"
    loaded = create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert same(loaded, model)
    assert class_names(loaded) == NAMES
    shutil.rmtree(tmp_path / "hub")


def test_what_started_from_a_folder_is_saved_under_timms_name(tmp_path, model):
    """`svit push` and timm know no folder of ours."""
    save_for_hf(model, str(tmp_path / "hub"), model_config={"pretrained_cfg": {"tag": None}})
    loaded = create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    save_model(tmp_path / "a.safetensors", loaded, f"local-dir:{tmp_path / 'hub'}")
    assert read_metadata(tmp_path / "a.safetensors")["pretrained_cfg"]["architecture"] == "test_svit"


def test_size_argument(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_for_hf(vit, str(tmp_path / "hub"), model_config={"pretrained_cfg": {"tag": None}})
    for name in ("test_vit", "test_vit.r160_in1k", f"local-dir:{tmp_path / 'hub'}"):
        assert size_argument(name, (96, 96)) == {"img_size": (96, 96)}
        assert size_argument(name, None) == {}
    assert size_argument("test_svit", (96, 96)) == {}


def test_names_of_classes():
    names = class_names(timm.create_model("test_svit"))
    assert len(set(names)) == 1000
    assert len(names) == 1000
    assert names[0].startswith("tench")
    told = {"pretrained_cfg_overlay": {"label_names": NAMES}}
    assert class_names(timm.create_model("test_svit", num_classes=3, **told)) == NAMES
    assert class_names(timm.create_model("test_svit", num_classes=2, **told)) == ["0", "1"]
    for folders, names in (
        (["n01440764", "n02123045"], ["tench, Tinca tinca", "tabby, tabby cat"]),
        (["n01440764", "n1"], ["n01440764", "n1"]),
    ):
        told = {"pretrained_cfg_overlay": {"label_names": folders}}
        assert class_names(timm.create_model("test_svit", num_classes=2, **told)) == names


def test_a_file_whose_name_is_no_text(tmp_path, checkpoint):
    """safetensors opens none, and would say that it is damaged."""
    file = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.safetensors"))
    file.write_bytes(checkpoint.read_bytes())
    with pytest.raises(InputError, match="expected UTF-8"):
        create_model("test_svit", file, num_classes=3)
    with pytest.raises(InputError, match="expected UTF-8"):
        read_weights(file)
    torch.save(safetensors.torch.load(checkpoint.read_bytes()), file.with_suffix(".pth"))  # which torch.load opens
    create_model("test_svit", file.with_suffix(".pth"), num_classes=3)


def test_a_folder_with_weights_that_are_not_finite(tmp_path):
    model = timm.create_model("test_svit", num_classes=3)
    with torch.no_grad():
        model.head.fc.bias[0] = torch.nan
    save_for_hf(model, tmp_path / "folder", model_config=dict(num_classes=3))
    with pytest.raises(CheckpointError, match="numbers that are not finite, in head.fc.bias"):
        create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
