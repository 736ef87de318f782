import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import svit.profiling
from helpers import needs_mm
from svit.cli import command, install

ROOT = Path(__file__).parents[2]
KEYS = ["model", "img_size", "params", "macs", "published_macs"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the tool in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        status = command("flops")(list(args))
        return status, *capsys.readouterr()

    return run


def test_json(run):
    status, out, err = run("test_svit", "svit_nano_32", "--img-size", "40", "56", "--json", "flops.json")
    assert (status, err) == (0, "")
    assert os.listdir() == ["flops.json"]
    rows = json.loads(Path("flops.json").read_text())
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["model"] for row in rows] == ["test_svit", "svit_nano_32"]
    for row in rows:
        assert row["img_size"] == [40, 56]
        assert row["published_macs"] is None
        assert row["params"] == sum(p.numel() for p in timm.create_model(row["model"]).parameters())
        assert isinstance(row["macs"], int)
    assert "40x56" in out


def test_published(run):
    assert run("svit_small.in1k", "--img-size", "224", "--json", "a.json")[0] == 0
    (row,) = json.loads(Path("a.json").read_text())
    assert (row["params"], row["published_macs"]) == (25_495_624, 4_367_000_000)
    assert row["macs"] == pytest.approx(row["published_macs"], rel=0.005)


def test_csv(run):
    assert run("test_svit", "--csv", "flops.csv", "--img-size", "48")[0] == 0
    with open("flops.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == KEYS
    assert (row["model"], row["img_size"], row["published_macs"]) == ("test_svit", "48x48", "")
    assert int(row["macs"]) > int(row["params"]) > 0
    assert os.listdir() == ["flops.csv"]


def test_table(run):
    status, out, _ = run("test_svit", "svit_nano_32")
    assert status == 0
    header, rule, *rows = out.splitlines()
    assert header.split("  ")[0] == "model"
    assert [row.split()[:2] for row in rows] == [["test_svit", "64x64"], ["svit_nano_32", "32x32"]]
    assert {len(line) for line in (header, rule, *rows)} == {len(header)}  # aligned
    assert os.listdir() == []


def test_per_module(run):
    status, out, _ = run("test_svit", "--per-module")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["test_svit", "at", "64x64"]
    shares = {line[0]: line[2] for line in lines if len(line) == 3}
    assert shares["(all)"] == "100.0%"
    assert {"stem", "stages.0.blocks.0", "final_conv", "head.fc"} <= shares.keys()
    assert not any(name.count(".") > 3 for name in shares)


def test_other_size_of_a_model_that_is_built_for_one(run):
    assert run("test_vit", "--img-size", "224", "--json", "a.json")[0] == 0
    assert json.loads(Path("a.json").read_text())[0]["img_size"] == [224, 224]


def test_what_counts_as_0_is_said(run, monkeypatch):
    monkeypatch.setattr(svit.profiling, "UNCOUNTED", svit.profiling.UNCOUNTED - {"aten::gelu"})
    status, _, err = run("test_svit")
    assert status == 0
    assert err == "warning: test_svit: aten::gelu counts as 0 (runs 8 times)\n"


DETECTOR = "mask-rcnn_svit-nano_fpn_1x_coco"


def test_layers_alone(run):
    assert run("svit_nano", "--no-attention-products", "--json", "a.json")[0] == 0
    assert run("svit_nano", "--json", "b.json")[0] == 0
    layers, everything = (json.loads(Path(f).read_text())[0]["macs"] for f in ("a.json", "b.json"))
    products = svit.profiling.count(timm.create_model("svit_nano"), 224).by_operator
    assert layers == products["conv"] + products["linear"]
    assert everything == sum(products.values()) > layers


def test_config(run):
    """A detector by the name or the file of its config: the JSON rows of models."""
    needs_mm()
    from svit.adapters import find_config

    copy = Path("copy.py")
    copy.write_text(f"_base_ = {str(find_config(DETECTOR))!r}")
    status, out, err = run(DETECTOR, "copy.py", "svit_nano", "--shape", "64", "96", "--json", "flops.json")
    assert (status, err) == (0, "")
    detector, same, backbone = json.loads(Path("flops.json").read_text())
    assert list(detector) == KEYS
    assert [detector["model"], same["model"]] == [DETECTOR, "copy"]
    assert detector["img_size"] == [64, 96]
    assert detector["published_macs"] is None
    assert detector["params"] == same["params"] > 2_000_000
    assert detector["macs"] == same["macs"] > backbone["macs"] + 1000 * 64 * 7 * 7 * 256


PAPER = {
    "mask-rcnn_svit-s_fpn_1x_coco": ((800, 1280), 252e9, 252.8e9),
    "mask-rcnn_svit-b_fpn_1x_coco": ((800, 1280), 359e9, 360.8e9),
    "mask-rcnn_svit-l_fpn_1x_coco": ((800, 1280), 470e9, 472.2e9),
    "cascade-mask-rcnn_svit-b_fpn_ms-3x_coco": ((800, 1280), 837e9, 839.1e9),
    "svit-s_upernet_8xb2-160k_ade20k-512x512": ((512, 2048), 926e9, 927.1e9),
    "svit-b_upernet_8xb2-160k_ade20k-512x512": ((512, 2048), 1036e9, 1038.6e9),
    "svit-l_upernet_8xb2-160k_ade20k-512x512": ((512, 2048), 1151e9, 1153.4e9),
}


@pytest.mark.parametrize("name", PAPER)
def test_papers_count(run, name):
    """The published figure, and what the paper's way of counting gives to four digits."""
    needs_mm()
    size, published, exact = PAPER[name]
    assert run(name, "--shape", *map(str, size), "--no-attention-products", "--json", "flops.json")[0] == 0
    (row,) = json.loads(Path("flops.json").read_text())
    assert row["published_macs"] == published
    assert row["macs"] == pytest.approx(published, rel=0.02)
    assert row["macs"] == pytest.approx(exact, rel=0.0005)


def test_bad_configs(run):
    needs_mm()
    status, _, err = run(DETECTOR)
    assert (status, err) == (1, f"error: {DETECTOR}: a config has no image size of its own; give --shape H W\n")
    status, _, err = run("mask-rcnn_svit-nano_fpn_cpu_coc", "--shape", "64")
    assert err.startswith(f"error: mask-rcnn_svit-nano_fpn_cpu_coc: no such model; did you mean {DETECTOR}, ")
    status, _, err = run("none.py", "--shape", "64")
    assert (status, err) == (1, "error: config: no such file or name: none.py\n")


def test_configs_need_mmengine(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "svit.adapters", None)
    status, _, err = run("some.py", "--shape", "64")
    assert status == 1
    assert err.startswith("error: some.py: a config needs svit.adapters: pip install 'svit[mm]'")
    status, _, err = run(DETECTOR, "--shape", "64")
    assert status == 1
    assert err.endswith(f"; names of configs are known with svit.adapters ({install('mm')})\n")


BAD = {
    "svit_smal": "error: svit_smal: no such model; did you mean svit_small, ",
    "test_svit qqqqqqqq": "error: qqqqqqqq: no such model\n",
    "svit_small.nowhere": "error: svit_small.nowhere at its own size: Invalid pretrained tag",
    "test_vit --img-size 5": "error: test_vit at 5x5: ",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments(run, line):
    status, out, err = run(*line.split(), "--json", "flops.json")
    assert (status, out) == (1, "")
    assert err.startswith(BAD[line])
    assert err.count("\n") == 1
    assert os.listdir() == []


@pytest.mark.parametrize("size", ["0", "-8", "8.5", "8 8 8"])
@pytest.mark.parametrize("option", ["--img-size", "--shape"])
def test_bad_sizes(run, capsys, option, size):
    with pytest.raises(SystemExit) as stop:
        run("test_svit", option, *size.split())
    assert stop.value.code == 2
    message = f"argument --img-size/--shape: expected one or two positive whole numbers, got {size}\n"
    assert capsys.readouterr().err.endswith(f"svit flops: error: {message}")


def test_no_folder(run):
    status, out, err = run("test_svit", "--csv", "none/flops.csv")
    assert (status, out) == (1, "")
    assert err == "error: none/flops.csv: there is no folder none\n"


def test_target_cannot_be_written(run):
    Path("folder").mkdir()
    status, out, err = run("test_svit", "--json", "folder")
    assert (status, out) == (1, "")  # said before the work
    assert err.startswith("error: folder: cannot be written")
    assert os.listdir() == ["folder"]


def test_one_file_only(run):
    with pytest.raises(SystemExit) as stop:
        run("test_svit", "--json", "a", "--csv", "b")
    assert stop.value.code == 2


def test_as_a_script(tmp_path):
    command = [sys.executable, "tools/flops.py", "test_svit", "--json", str(tmp_path / "flops.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("model")
    assert json.loads((tmp_path / "flops.json").read_text())[0]["model"] == "test_svit"

    failed = subprocess.run([sys.executable, "tools/flops.py", "no_such_model_at_all"], cwd=ROOT, capture_output=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith(b"error: no_such_model_at_all: no such model")
