import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import benchmark as clone  # which adds upstream:
from svit.cli import benchmark, command
from svit.errors import InputError

TOOL = Path(clone.__file__)
SETTING = benchmark.Setting((32, 48), 2, False, None, "cpu")


@pytest.mark.parametrize(
    "spec",
    [
        "test_svit",
        "upstream:test_svit",
        "folded:test_svit",
        "maps:test_svit",
        "maps:upstream:test_svit",
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
    with pytest.raises(InputError, match=r"fast:test_svit: expected upstream, .*, got fast"):
        benchmark.build("fast:test_svit", SETTING)


def test_the_former_name_of_a_prefix(capsys):
    model = benchmark.build("maps:plain:test_svit", SETTING)
    assert type(model.model.stem).__name__ == "UpstreamStem"
    assert "maps:plain:test_svit: plain: is deprecated, it is called upstream: now" in capsys.readouterr().err


def test_folding_is_for_inference():
    with pytest.raises(InputError, match="folded:test_svit: folded: is for inference"):
        benchmark.build("folded:test_svit", replace(SETTING, train=True))


def test_graphs_are_for_gpus():
    with pytest.raises(InputError, match="graph:test_svit: graph: is for inference on a GPU"):
        benchmark.build("graph:test_svit", SETTING)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("svit_smal", "svit_smal: model: no model 'svit_smal' in timm; did you mean svit_small"),
        ("upstream:test_resnet", "upstream:test_resnet: upstream: and folded: are for SViT"),
        ("reference:test_resnet", "reference:test_resnet: model: test_resnet cannot be made with {'backend'"),
    ],
)
def test_models_that_cannot_be_built(spec, message):
    with pytest.raises(InputError) as stopped:
        benchmark.build(spec, SETTING)
    assert message in str(stopped.value)


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
    monkeypatch.setattr(benchmark, "better_format", lambda spec, setting: "NCHW")
    monkeypatch.setattr(benchmark, "peak_memory_elsewhere", lambda spec, *_: 300.0 if spec == "test_svit" else 150.0)
    seconds = iter([1.0, 4.0, 0.2, 0.8, 0.3, 1.2])  # warm-up, then two runs, the models in turn
    monkeypatch.setattr(benchmark.Candidate, "run", lambda self: next(seconds))
    rows = benchmark.compare(["test_svit", "upstream:test_svit"], SETTING, runs=2)
    assert [row["time ratio"] for row in rows] == [1.0, 4.0]
    assert [row["memory ratio"] for row in rows] == [1.0, 0.5]
    assert rows[0]["img/s"] == pytest.approx(2 / 0.25)
    assert rows[0]["max"] == pytest.approx(1e3 * 0.3 / 2)


@pytest.mark.parametrize("runtime", ["compile", "onnxruntime", "openvino", "aotinductor", "executorch"])
def test_runtimes_compute_the_same(runtime):
    if runtime not in ("compile", "aotinductor"):
        pytest.importorskip(runtime)
    setting = benchmark.Setting((32, 48), 2, False, None, "cpu", runtime=runtime)
    torch.manual_seed(0)
    eager = benchmark.build("folded:test_svit", SETTING)
    torch.manual_seed(0)
    model = benchmark.build("folded:test_svit", setting)
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-5)
    assert benchmark.Candidate(model, "NCHW", setting).run() > 0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_runtimes(runtime):
    pytest.importorskip(runtime)
    setting = benchmark.Setting((32, 48), 2, False, None, "cpu", runtime=f"{runtime}-int8")
    torch.manual_seed(0)
    eager = benchmark.build("folded:test_svit", SETTING)
    torch.manual_seed(0)
    model = benchmark.build("folded:test_svit", setting)
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        expected, found = eager(x), model(x)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.4  # noise, as that of the calibration


def test_runtimes_of_exported_programs_get_that_of_the_export_tool(monkeypatch):
    made = []
    monkeypatch.setattr(benchmark, "in_runtime", lambda model, spec, setting: made.append(model))
    for runtime in benchmark.RUNTIMES:
        benchmark.build("test_svit", replace(SETTING, runtime=runtime))
    assert [model.stages[0].blocks[0].attn.fused_attn for model in made] == [True, True, *[False] * 6]


def test_rows_of_runtimes(monkeypatch):
    """A row for each model in each runtime, all in turn; ratios are to the first model in the same runtime."""
    built = []
    monkeypatch.setattr(benchmark, "better_format", lambda spec, setting: "NCHW")
    monkeypatch.setattr(benchmark, "peak_memory_elsewhere", lambda spec, layout, setting: 100.0)
    monkeypatch.setattr(benchmark, "build", lambda spec, setting: built.append((spec, setting.runtime)))
    seconds = iter([9.0] * 4 + [1.0, 2.0, 4.0, 20.0] * 2)
    monkeypatch.setattr(benchmark.Candidate, "run", lambda self: next(seconds))
    rows = benchmark.compare(["a", "b"], SETTING, 2, ["eager", "compile"])
    assert (
        built
        == [("a", "eager"), ("b", "eager"), ("a", "compile"), ("b", "compile")]
        == [(row["model"], row["runtime"]) for row in rows]
    )
    assert [row["time ratio"] for row in rows] == [1, 2, 1, 5]
    assert benchmark.csv_row(rows[3], SETTING, 1, 1)["runtime"] == "compile"


@pytest.mark.parametrize(
    "change", [dict(train=True), dict(amp="bfloat16"), dict(dtype="bfloat16"), dict(device="cuda")]
)
def test_other_runtimes_are_for_inference_in_float32_on_a_cpu(change):
    setting = replace(SETTING, runtime="onnxruntime", **change)
    with pytest.raises(InputError, match="--runtime onnxruntime is for inference in float32 on a CPU"):
        benchmark.in_runtime(torch.nn.Identity(), "x", setting)


def test_runtime_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match="--runtime openvino: pip install openvino"):
        benchmark.in_runtime(torch.nn.Identity(), "x", replace(SETTING, runtime="openvino"))


def test_command_line(tmp_path):
    report, picture = tmp_path / "report.md", tmp_path / "picture.png"
    command = [sys.executable, TOOL, "test_svit", "upstream:test_svit", "--sweep", "32", "64", "--runs", "2"]
    done = subprocess.run([*command, "--report", report, "--plot", picture], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| upstream:test_svit") == 2
    text = report.read_text()
    assert "inference, float32, 64 x 64, batch 4, median of 2 runs" in text
    assert f"torch {torch.__version__}" in text
    assert picture.stat().st_size > 1000
    memory = float(done.stdout.split("| test_svit")[1].split("|")[6])
    assert 1 < memory < 2000


# of timm's benchmark.py, and ours at the end
INFERENCE = [
    *["model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs"],
    *["infer_macts", "param_count", "infer_peak_mib"],
]
TRAINING = [
    *["model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count"],
    "train_peak_mib",
]


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def printed_rows(text: str) -> list[dict]:
    """Of all tables of the tool's output."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines if line[0] != "model"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the tool in an empty folder, and in this process, whose memory counts for nothing; returns its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "peak_memory_elsewhere", lambda spec, *_: 12.345 if ":" in spec else float("nan"))

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *args, "--runs", "2", "--device", "cpu"])
        command("benchmark")()
        return capsys.readouterr().out

    return run


def test_csv_row():
    row = {"model": "upstream:test_svit", "img/s": 123.4567, "ms/img": 8.1000049, "peak MiB": 45.678}
    found = benchmark.csv_row(row, SETTING, 1_234_567, 89_012_345)
    assert list(found) == INFERENCE
    assert list(found.values()) == ["upstream:test_svit", 123.46, 16.2, 2, "32x48", 0.089012345, None, 1.234567, 45.68]
    found = benchmark.csv_row(row, replace(SETTING, train=True, size=(64, 64)), 1_234_567, None)
    assert list(found) == TRAINING
    assert list(found.values()) == ["upstream:test_svit", 123.46, 16.2, 2, 64, 1.234567, 45.68]


def test_csv_of_a_sweep(run):
    """A row for each size and model, in the order of the tables, with their figures and those of tools/flops.py."""
    out = run("test_svit", "upstream:test_svit", "--batch-size", "2", "--sweep", "32", "64", "--csv", "speed.csv")
    rows = read_csv(Path("speed.csv"))
    assert list(rows[0]) == INFERENCE
    models = ["test_svit", "upstream:test_svit"]
    assert [(row["model"], row["infer_img_size"]) for row in rows] == [(m, n) for n in ("32", "64") for m in models]
    for row, printed in zip(rows, printed_rows(out), strict=True):
        assert row["model"] == printed["model"]
        assert float(row["infer_samples_per_sec"]) == float(printed["img/s"]) > 0
        step = float(row["infer_step_time"])
        assert step == pytest.approx(2 * float(printed["ms/img"]), abs=0.011)
        assert float(row["infer_samples_per_sec"]) == pytest.approx(2e3 / step, rel=1e-3)
        assert (row["infer_batch_size"], row["infer_macts"]) == ("2", "")
        assert row["infer_peak_mib"] == ("12.35" if ":" in row["model"] else "")  # unknown, so empty
    assert command("flops")(["test_svit", "--img-size", "64", "--json", "flops.json"]) == 0
    (counted,) = json.loads(Path("flops.json").read_text())
    assert round(float(rows[2]["infer_gmacs"]) * 1e9) == counted["macs"]
    assert round(float(rows[2]["param_count"]) * 1e6) == counted["params"]
    assert float(rows[0]["infer_gmacs"]) < float(rows[2]["infer_gmacs"])
    assert float(rows[1]["infer_gmacs"]) > float(rows[0]["infer_gmacs"])  # the upstream form does more


def test_csv_of_training(run):
    out = run("test_svit", "--train", "--img-size", "32", "48", "--csv", "speed.csv")
    (row,) = read_csv(Path("speed.csv"))
    (printed,) = printed_rows(out)
    assert list(row) == TRAINING
    assert float(row["train_samples_per_sec"]) == float(printed["img/s"]) > 0
    assert float(row["train_step_time"]) == pytest.approx(4 * float(printed["ms/img"]), abs=0.021)
    assert (row["train_batch_size"], row["train_img_size"], row["train_peak_mib"]) == ("4", "32x48", "")
    params = sum(p.numel() for p in timm.create_model("test_svit").parameters())
    assert round(float(row["param_count"]) * 1e6) == params


def test_counts_of_what_a_trace_cannot_look_into():
    gpu = replace(SETTING, device="cuda", dtype="bfloat16", amp="bfloat16")
    expected = benchmark.count(timm.create_model("test_svit"), (32, 48))
    assert benchmark.sizes_of("compiled:graph:test_svit", gpu) == (expected.params, expected.macs)


def test_counts_of_a_form():
    """Of the model that runs, not of the one that its name says."""
    whole, maps, folded = (benchmark.sizes_of(f"{p}test_svit", SETTING) for p in ("", "maps:", "folded:"))
    for fewer in (maps, folded):
        assert fewer[0] < whole[0]
        assert 0.8 * whole[1] < fewer[1] < whole[1]


def test_model_that_cannot_be_counted(run, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no trace\nmore")

    monkeypatch.setattr(benchmark, "count", fail)
    assert benchmark.sizes_of("test_svit", SETTING)[1] is None
    assert capsys.readouterr().err == "warning: test_svit: its MACs cannot be counted: no trace\n"
    run("test_svit", "--img-size", "32", "--csv", "speed.csv")
    (row,) = read_csv(Path("speed.csv"))
    assert row["infer_gmacs"] == ""
    assert float(row["param_count"]) > 0


def test_what_counts_as_0_is_said(capsys, monkeypatch):
    monkeypatch.setattr("svit.profiling.UNCOUNTED", frozenset())
    benchmark.sizes_of("test_svit", SETTING)
    assert "warning: test_svit: aten::gelu counts as 0 (runs 8 times)\n" in capsys.readouterr().err


def test_csv_is_whole_or_not_there(run, monkeypatch):
    Path("speed.csv").write_text("the last one")
    compare = benchmark.compare

    def fail_at_64(specs, setting, *args):
        if setting.size == (64, 64):
            raise RuntimeError("out of memory")
        return compare(specs, setting, *args)

    monkeypatch.setattr(benchmark, "sizes_of", lambda *_: (1, 1))
    monkeypatch.setattr(benchmark, "compare", fail_at_64)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("test_svit", "--sweep", "32", "64", "--csv", "speed.csv")
    monkeypatch.setattr(csv.DictWriter, "writerows", lambda self, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("test_svit", "--sweep", "32", "--csv", "speed.csv")
    assert Path("speed.csv").read_text() == "the last one"
    assert os.listdir() == ["speed.csv"]


def test_csv_needs_its_folder(run, capsys):
    for path in ("none/speed.csv", "."):
        with pytest.raises(SystemExit) as stop:
            run("test_svit", "--csv", path)
        assert stop.value.code == 2
        assert f"--csv: expected a file in a folder that exists, got {path}\n" in capsys.readouterr().err


def test_places_of_results_are_checked_before_the_work(run, capsys):
    for option in (["--report"], ["--sweep", "32", "--plot"]):
        with pytest.raises(SystemExit, match="2"):
            run("test_svit", *option, "none/a.png")
        assert "expected a file in a folder that exists, got none/a.png\n" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--plot: expected a name that ends in .*png.*, got a.foo"):
        benchmark.main(["test_svit", "--sweep", "32", "--plot", "a.foo"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(InputError, match="--device: cuda cannot be used: "):
        benchmark.main(["test_svit", "--device", "cuda"])


def test_exported_programs_are_folded_as_by_export(monkeypatch):
    made = []
    monkeypatch.setattr(benchmark, "Exported", lambda model, shape, form: made.append(model))
    for spec in ("test_svit", "folded:test_svit", "maps:test_svit", "repvgg_a0"):
        benchmark.build(spec, replace(SETTING, runtime="onnxruntime"))
    norms = (torch.nn.BatchNorm2d,)
    assert not any(isinstance(module, norms) for model in made[:2] for module in model.stages.modules())
    assert not any(isinstance(module, norms) for module in made[3].stages.modules())


@pytest.mark.parametrize(
    "arguments",
    [[], ["test_svit", "--img-size", "0"], ["test_svit", "--plot", "x.png"], ["test_svit", "--runs", "0"]],
    ids=" ".join,
)
def test_bad_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command("benchmark")(arguments)
    assert stop.value.code == 2
    assert "svit benchmark: error: " in capsys.readouterr().err
