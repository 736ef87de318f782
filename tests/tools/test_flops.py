import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import flops
import pytest
import timm

import svit.profiling

ROOT = Path(__file__).parents[2]
KEYS = ["model", "img_size", "params", "macs", "published_macs"]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs the tool in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        status = flops.main(list(args))
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


SIZES = "error: --img-size: expected one or two positive whole numbers, got"
BAD = {
    "svit_smal": "error: svit_smal: no such model; did you mean svit_small, ",
    "test_svit qqqqqqqq": "error: qqqqqqqq: no such model\n",
    "svit_small.nowhere": "error: svit_small.nowhere at its own size: Invalid pretrained tag",
    "test_svit --img-size 0": f"{SIZES} 0\n",
    "test_svit --img-size -8": f"{SIZES} -8\n",
    "test_svit --img-size 8.5": f"{SIZES} 8.5\n",
    "test_svit --img-size 8 8 8": f"{SIZES} 8 8 8\n",
    "test_vit --img-size 5": "error: test_vit at 5x5: ",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments(run, line):
    status, out, err = run(*line.split(), "--json", "flops.json")
    assert (status, out) == (1, "")
    assert err.startswith(BAD[line])
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_no_folder(run):
    status, out, err = run("test_svit", "--csv", "none/flops.csv")
    assert (status, out) == (1, "")
    assert err == "error: none/flops.csv: there is no folder none\n"


def test_target_cannot_be_written(run):
    Path("folder").mkdir()
    status, _, err = run("test_svit", "--json", "folder")
    assert status == 1
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
