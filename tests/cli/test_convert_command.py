import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from svit.cli import command
from svit.models.original import to_original

main = command("convert")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture
def source(tmp_path) -> Path:
    weights = timm.create_model("test_svit", num_classes=10).state_dict()
    averaged = {k: v + 1 for k, v in weights.items()}
    torch.save({"model": to_original(weights), "model_ema": to_original(averaged)}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def bias(path: Path) -> float:
    return load_file(path)["stem.layers.2.bias"].unique().item()


def test_says_what_it_did(source, capsys):
    target = source.with_name("ours.safetensors")
    assert main([str(source), str(target), "--num-classes", "10"]) == 0
    assert capsys.readouterr() == (f"read {source} (weights of test_svit), wrote {target}\n", "")
    assert bias(target) == 0


def test_ema_and_back(source, capsys):
    target, back = source.with_name("ours.safetensors"), source.with_name("back.pth")
    options = ["--model", "test_svit", "--num-classes", "10"]
    assert main([str(source), str(target), "--ema", *options]) == 0
    assert capsys.readouterr().out == f"read {source} (moving average of the weights of test_svit), wrote {target}\n"
    assert bias(target) == 1
    assert main([str(target), str(back), *options]) == 0
    theirs = torch.load(source, weights_only=True)["model_ema"]
    written = torch.load(back, weights_only=True)["model"]
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[k], theirs[k]) for k in theirs)


def test_unknown_model(source, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(source), "out.safetensors", "--model", "svit_huge"])
    assert stop.value.code == 2
    assert "svit_huge" in capsys.readouterr().err


def test_error_is_one_line_and_status_1(source):
    target = source.with_name("ours.safetensors")
    done = subprocess.run(
        [sys.executable, SCRIPT, source, target, "--model", "test_svit"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: {source}: test_svit with 10 classes, expected 1000; --num-classes 10 takes it\n"
    assert not target.exists()
