import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmark

TOOL = Path(benchmark.__file__)
SETTING = benchmark.Setting((32, 48), 2, False, None, "cpu")


@pytest.mark.parametrize(
    "spec",
    [
        "test_svit",
        "plain:test_svit",
        "folded:test_svit",
        "maps:test_svit",
        "maps:plain:test_svit",
        "maps:resnet10t",
        "reference:test_svit",
        "resnet10t",
        "vit_tiny_patch16_224",
    ],
)
def test_build_and_run(spec):
    model = benchmark.build(spec, SETTING)
    assert not model.training
    assert benchmark.Candidate(model, "channels-last", SETTING).run() > 0


@pytest.mark.parametrize("amp", [None, "bfloat16"])
def test_training_step_leaves_no_gradient(amp):
    setting = benchmark.Setting((32, 32), 2, True, amp, "cpu")
    model = benchmark.build("test_svit", setting)
    seen = []
    model.head.fc.weight.register_hook(lambda g: seen.append(g.abs().sum().item()))
    benchmark.Candidate(model, "NCHW", setting).run()
    assert seen
    assert seen[0] > 0
    assert all(p.grad is None for p in model.parameters())


def test_unknown_prefix():
    with pytest.raises(SystemExit, match=r"fast:test_svit: expected plain, .*, got fast"):
        benchmark.build("fast:test_svit", SETTING)


def test_graphs_are_for_gpus():
    with pytest.raises(SystemExit, match="graph:test_svit: graph: is for inference on a GPU"):
        benchmark.build("graph:test_svit", SETTING)


def test_maps():
    """The feature maps, and nothing behind them."""
    torch.manual_seed(0)
    model = benchmark.build("maps:test_svit", SETTING)
    x = torch.randn(1, 3, 64, 64)
    maps = model.model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(model(x), torch.stack([m.mean() for m in maps]))
    names = {name.split(".")[1] for name, _ in model.named_parameters()}
    assert names == {"stem", "stages"}


def test_reference_prefix_and_dtype():
    model = benchmark.build("reference:test_svit", benchmark.Setting((32, 32), 2, False, None, "cpu", "bfloat16"))
    assert model.stages[0].blocks[0].attn.backend == "reference"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_compare_relates_rows_to_the_first(monkeypatch):
    monkeypatch.setattr(benchmark.Candidate, "run", lambda self: 0.5 if "plain_form" in str(self.model.stem) else 0.2)
    monkeypatch.setattr(benchmark, "better_format", lambda spec, setting: "NCHW")
    monkeypatch.setattr(benchmark, "peak_memory_elsewhere", lambda spec, *_: 300.0 if spec == "test_svit" else 150.0)
    seconds = iter([1.0, 4.0, 0.2, 0.8, 0.3, 1.2])  # warm-up, then two runs, the models in turn
    monkeypatch.setattr(benchmark.Candidate, "run", lambda self: next(seconds))
    rows = benchmark.compare(["test_svit", "plain:test_svit"], SETTING, runs=2)
    assert [row["time ratio"] for row in rows] == [1.0, 4.0]
    assert [row["memory ratio"] for row in rows] == [1.0, 0.5]
    assert rows[0]["img/s"] == pytest.approx(2 / 0.25)
    assert rows[0]["max"] == pytest.approx(1e3 * 0.3 / 2)


def test_command_line(tmp_path):
    report, picture = tmp_path / "report.md", tmp_path / "picture.png"
    command = [sys.executable, TOOL, "test_svit", "plain:test_svit", "--sweep", "32", "64", "--runs", "2"]
    done = subprocess.run([*command, "--report", report, "--plot", picture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| plain:test_svit") == 2
    text = report.read_text()
    assert "inference, float32, 64 x 64, batch 4, median of 2 runs" in text
    assert f"torch {torch.__version__}" in text
    assert picture.stat().st_size > 1000
    memory = float(done.stdout.split("| test_svit")[1].split("|")[6])
    assert 1 < memory < 2000


def test_bad_command_lines():
    for arguments in ([], ["test_svit", "--img-size", "0"], ["test_svit", "--plot", "x.png"]):
        done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert "error:" in done.stderr
