import csv
import json

import pytest
import timm
import torch

import demo
from svit.checkpoints import read_metadata
from svit.training.digits import NAMES


def test_demo_from_end_to_end(tmp_path, monkeypatch, capfd):
    some = dict(list(demo.digits().items())[:250])
    monkeypatch.setattr(demo, "digits", lambda: some)
    monkeypatch.chdir(tmp_path)
    out = demo.OUT
    (out / "training").mkdir(parents=True)
    (out / "training" / "state.pt").write_text("of an earlier demo")
    demo.main(["--epochs", "2"])

    printed = capfd.readouterr().out
    commands = [line.split()[2] for line in printed.splitlines() if line.startswith("$ ")]
    assert commands == [f"tools/{name}.py" for name in ("train", "validate", "infer", "visualize", "flops")]
    assert all(name in printed for name in demo.ZOO)
    assert {file.name for file in out.iterdir()} == {"digits", "training", "accuracy.json", "super_tokens"}
    assert len(list((out / "digits").rglob("*.png"))) == 250
    assert len(list((out / "super_tokens").glob("*.png"))) == 6
    for name in ("training/best.safetensors", "training/log.csv", "super_tokens/index.html"):
        assert (out / name).exists()
        assert f"\n{out / name}: " in printed

    # What is printed is the accuracy of the best weights, and timm reads them.
    found = json.loads((out / "accuracy.json").read_text())
    with open(out / "training" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert found["images"] == 50
    assert abs(found["top1"] - max(float(row["top1"]) for row in rows)) < 1e-6
    assert f"{found['top1']:.2f}" in printed
    checkpoint = out / "training" / "best.safetensors"
    assert read_metadata(checkpoint)["pretrained_cfg"]["label_names"] == sorted(NAMES)
    model = timm.create_model(demo.MODEL, num_classes=10, checkpoint_path=str(checkpoint))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_demo_stops_where_a_tool_fails(tmp_path, monkeypatch, capfd):
    images = demo.digits()
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(demo, "TOOLS", tmp_path)
    monkeypatch.setattr(demo, "digits", lambda: dict(list(images.items())[:20]))
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--out", str(tmp_path / "new" / "out")])
    assert stopped.value.code == 3
    assert capfd.readouterr().out.count("\n$ ") == 1


def test_the_demo_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "training").mkdir()
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"--out: expected a new folder, got {tmp_path}, which exists" in capsys.readouterr().err
    assert (tmp_path / "training").exists()
