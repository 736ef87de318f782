"""What the commands share: options, the model that they name, and how errors are told."""

import argparse
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

from svit.checkpoints import save_model
from svit.cli.base import (
    add_amp,
    add_device,
    add_img_size,
    add_model_arguments,
    at_least,
    check_file,
    check_folder,
    named,
    open_model,
    out_of_memory_as_error,
    share,
)
from svit.errors import InputError

PREPROCESSING = {"input_size": (3, 48, 40), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = timm.create_model("test_svit", num_classes=3, pretrained_cfg_overlay=PREPROCESSING)
    path = tmp_path_factory.mktemp("base") / "small.safetensors"
    save_model(path, model, "test_svit", ["cat", "dog", "cup"])
    return path


def opened(*arguments, **preprocessing):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_img_size(parser)
    add_device(parser)
    return open_model(parser.parse_args(list(arguments)), **preprocessing)


def test_options_of_a_model(checkpoint, capsys):
    model, device, config = opened("test_svit", "--checkpoint", str(checkpoint), "--device", "cpu", crop_pct=None)
    assert device == torch.device("cpu")
    assert (tuple(config["input_size"]), config["crop_pct"]) == ((3, 48, 40), 0.8)
    assert model.num_classes == 3
    assert not capsys.readouterr().err
    _, _, config = opened("test_svit", "--checkpoint", str(checkpoint), "--img-size", "64", "32", crop_pct=0.5)
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((3, 64, 32), 0.5, [0.1, 0.2, 0.3])
    model, _, config = opened("test_vit", "--img-size", "96", "--num-classes", "4")
    assert config["input_size"] == (3, 96, 96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 4)
    assert "the weights are random" in capsys.readouterr().err


def test_a_tag_brings_its_weights_but_for_a_checkpoint(checkpoint, capsys):
    pretrained = timm.create_model("svit_nano.photos20", pretrained=True).state_dict()
    for arguments in (["svit_nano.photos20"], ["svit_nano.photos20", "--pretrained"], ["svit_nano_32.cifar10"]):
        model, _, config = opened(*arguments, "--device", "cpu")
        if arguments[0] == "svit_nano.photos20":
            assert all(torch.equal(value, pretrained[key]) for key, value in model.state_dict().items())
    assert config["input_size"] == (3, 32, 32)
    assert not capsys.readouterr().err
    for name in ("svit_nano", "svit_nano.untrained", "test_svit.untrained"):
        opened(name, "--device", "cpu")
        assert "the weights are random" in capsys.readouterr().err
    model, _, _ = opened("test_svit.untrained", "--checkpoint", str(checkpoint), "--device", "cpu")
    assert model.num_classes == 3
    opened("svit_nano.photos20", "--num-classes", "5", "--device", "cpu")
    err = capsys.readouterr().err
    what = "of 20 classes, --num-classes asks for 5: those of the classifier are random"
    assert err == f"warning: the weights are {what}\n"
    with pytest.raises(InputError, match="model: Invalid pretrained tag .nothing. for svit_nano"):
        opened("svit_nano.nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--img-size", "0"], "argument --img-size: expected one or two positive whole numbers, got 0"),
        (["--img-size", "1", "2", "3"], "argument --img-size: expected one or two positive whole numbers, got 1 2 3"),
        (["--img-size", "1.5"], "argument --img-size: expected one or two positive whole numbers, got 1.5"),
        (["--num-classes", "0"], "argument --num-classes: expected at least 1, got 0"),
        (["--in-chans", "5"], "argument --in-chans: expected 1, 2, 3, 4, got 5"),
    ],
)
def test_options_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        opened("test_svit", *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_of_one_size_in_a_folder_takes_another_size(tmp_path):
    save_for_hf(
        timm.create_model("vit_tiny_patch16_224", num_classes=3), str(tmp_path), model_config={"pretrained_cfg": {}}
    )
    model, _, config = opened(f"local-dir:{tmp_path}", "--img-size", "96", "--device", "cpu")
    assert config["input_size"] == (3, 96, 96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_a_device_or_weights_that_are_not_there():
    with pytest.raises(InputError, match="--device: toaster cannot be used: "):
        opened("test_svit", "--device", "toaster")
    with pytest.raises(InputError, match="model: Invalid pretrained tag"):
        opened("test_svit.nothing", "--img-size", "64")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (at_least(0), {"0": 0, "7": 7}, ["-1", "1.5", "one"]),
        (at_least(1), {"1": 1}, ["0", ""]),
        (share, {"1": 1.0, "0.25": 0.25}, ["0", "1.01", "nan", "half"]),
    ],
    ids=["at least 0", "at least 1", "share"],
)
def test_numbers(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected .* got {text}$"):
            kind(text)


def test_amp_by_either_name(capsys):
    parser = argparse.ArgumentParser()
    add_amp(parser)
    names = ["bf16", "bfloat16", "fp16", "float16"]
    assert [parser.parse_args(["--amp", name]).amp for name in names] == ["bfloat16"] * 2 + ["float16"] * 2
    assert parser.parse_args([]).amp is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--amp", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_out_of_memory():
    with pytest.raises(InputError, match="^out of memory: lower it$"), out_of_memory_as_error("lower it"):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="other"), out_of_memory_as_error("lower it"):
        raise RuntimeError("other")


def test_a_path_that_is_empty():
    """As of a variable of the shell that is not set; it would be the current folder."""
    assert named("a/b") == Path("a/b")
    with pytest.raises(argparse.ArgumentTypeError, match="expected a path, got an empty name"):
        named("")


def test_a_folder_that_is_not_there(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "none" / "a.json")
    for file in (link, tmp_path / "none" / "a.json"):
        with pytest.raises(InputError, match=f"{file}: there is no folder {tmp_path / 'none'}$"):
            check_folder(file)
    check_folder(tmp_path / "a.json")


def test_a_link_that_leads_to_itself(tmp_path):
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    check_file(argparse.ArgumentParser(), "--out", loop)
