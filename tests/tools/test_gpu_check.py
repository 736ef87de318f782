"""The check of a GPU: what it does without one, and what becomes of items that fail, crash, hang or are cut."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu_check
from gpu import kernels, machine, models, ops, sanitizer, smoke, sweep, tests, worker
from gpu.items import Batch, Item, Setup, chunks
from gpu.report import Report, ReportError, tables

TOOL = gpu_check.__file__
ABOUT = {"GPU": "H100", "torch": "2.11.0", "triton": "3.6.0", "timm": "1.0.31", "sources": "abc", "commit": "1234"}
GPU = Setup(rehearsal=False, report="report", cores=16)

# A step whose items do what their names say. Each call leaves a line in calls.txt beside it.
STEP = """
import os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from gpu.items import Batch, Item, Stage

DESCRIPTION = "does what it is told"
BATCHES = {batches!r}

def stages(setup):
    if not BATCHES:
        return "there is nothing to do"
    return [Stage([Batch([Item(name, {{"what": name}}, **options) for name, options in items]) for items in BATCHES])]

def run(setup, what):
    here = Path(__file__).parent
    with (here / "calls.txt").open("a") as calls:
        print(what, file=calls)
    print("about to", what)
    yield {{"what": what, "ok": not what.startswith("wrong")}}
    if what.startswith("raise"):
        raise RuntimeError("it raised")
    if what.startswith("crash"):
        os.abort()
    if what.startswith("hang"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / "pids.txt").write_text(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)
"""

# gpu_check.py with that step in the place of smoke, and without what depends on the machine.
MAIN = "import sys, gpu_check; gpu_check.STEPS = {'smoke': 'told', 'tests': 'told_next'}; sys.exit(gpu_check.main())"


@pytest.fixture
def told(tmp_path, monkeypatch):
    """A function: batches of (name, options of the item) -> the step of these, in the place of smoke; then of tests."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "STEPS", {"smoke": "told", "tests": "told_next"})

    def write(*batches, following=()):
        for name, each in (("told", batches), ("told_next", following)):
            (tmp_path / f"{name}.py").write_text(STEP.format(batches=list(each)))
            sys.modules.pop(name, None)

    write()
    return write


def main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--rehearse", *map(str, arguments)])
    return gpu_check.main()


def items(folder: Path, step: str = "smoke") -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())["steps"][step]["items"]


def calls(folder: Path) -> list[str]:
    path = folder / "calls.txt"
    return path.read_text().split() if path.exists() else []


def is_alive(pid: int) -> bool:
    """A zombie, which nobody has waited for, is none."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def test_what_fails_crashes_or_hangs_ends_nothing_else(told, tmp_path, monkeypatch, capfd):
    names = [[("fine", {}), ("wrong", {}), ("raise", {}), ("crash", {}), ("hang", {"limit": 3}), ("finally", {})]]
    told(*names, following=[[("next", {})]])
    monkeypatch.setattr(gpu_check, "START_LIMIT", 3.0)
    assert main(monkeypatch, "--out", tmp_path / "out") == 1
    found = items(tmp_path / "out")
    expected = {"fine": "ok", "wrong": "failed", "raise": "failed", "crash": "crashed", "hang": "hung", "finally": "ok"}
    assert {name: item["status"] for name, item in found.items()} == expected
    assert all(item["findings"][0]["what"] == name for name, item in found.items())  # what came before is kept
    assert found["raise"]["reason"] == "RuntimeError: it raised"
    assert "about to raise" in found["raise"]["output"]
    assert found["crash"]["reason"] == "by SIGABRT"
    assert "about to crash" in found["crash"]["output"]
    assert "no end within" in found["hang"]["reason"]
    assert items(tmp_path / "out", "tests")["next"]["status"] == "ok"
    assert not any(is_alive(int(pid)) for pid in (tmp_path / "pids.txt").read_text().split())
    (page,) = (tmp_path / "out").glob("*.md")
    text = page.read_text()
    assert text.startswith("# Rehearsal without a GPU: no figure counts\n")
    assert "## smoke: 2 ok, 2 failed, 1 crashed, 1 hung" in text
    assert "**crash: crashed** by SIGABRT" in text
    assert "| wrong | WRONG |" in text
    assert "error: not all went well: smoke: wrong; smoke: raise; smoke: crash; smoke: hang" in capfd.readouterr().err


def test_all_well(told, tmp_path, monkeypatch):
    told([("fine", {})], [("well", {})])
    assert main(monkeypatch, "--out", tmp_path / "out") == 0
    (page,) = (tmp_path / "out").glob("*.md")
    assert "Left out: there is nothing to do." in page.read_text()  # the step behind it


def test_killed_and_resumed(told, tmp_path, monkeypatch):
    told([("fine", {}), ("wrong", {}), ("hang", {})])
    out = tmp_path / "out"
    command = [sys.executable, "-c", MAIN, "--rehearse", "--out", out]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(TOOL).parent}"})
    wait_until((tmp_path / "pids.txt").exists)
    wait_until(lambda: items(out)["hang"]["findings"])
    process.kill()  # SIGKILL: it gets no chance to clean up
    process.wait()
    found = items(out)
    assert {name: item["status"] for name, item in found.items()} == {"fine": "ok", "wrong": "failed", "hang": "cut"}
    assert found["wrong"]["findings"] == [{"what": "wrong", "ok": False}]
    pids = [int(pid) for pid in (tmp_path / "pids.txt").read_text().split()]
    wait_until(lambda: not any(map(is_alive, pids)))  # nothing is left to hold the GPU

    told([("fine", {}), ("wrong", {}), ("hang", {"limit": 1}), ("more", {})])
    monkeypatch.setattr(gpu_check, "START_LIMIT", 3.0)
    (report,) = out.glob("*.json")
    assert main(monkeypatch, "--out", out, "--resume", report) == 1
    assert calls(tmp_path) == ["fine", "wrong", "hang", "hang", "more"]
    assert [item["status"] for item in items(out).values()] == ["ok", "failed", "hung", "ok"]
    assert len(json.loads(report.read_text())["runs"]) == 2


def test_terminated(told, tmp_path):
    told([("fine", {}), ("hang", {})], following=[[("next", {})]])
    command = [sys.executable, "-c", MAIN, "--rehearse", "--out", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(TOOL).parent}"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until((tmp_path / "pids.txt").exists)
    process.send_signal(signal.SIGTERM)
    assert "error: stopped; --resume goes on" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert items(tmp_path / "out")["hang"]["status"] == "cut"
    assert "next" not in calls(tmp_path)


def test_what_does_not_fit_into_the_time_is_left_out(told, tmp_path, monkeypatch, capsys):
    told([("long", {"estimate": 100}), ("short", {})], following=[[("hang", {}), ("after", {})]])
    out = tmp_path / "out"
    monkeypatch.setattr(gpu_check, "START", 1.0)
    assert main(monkeypatch, "--out", out, "--minutes", 0.1) == 0
    assert {name: item["status"] for name, item in items(out).items()} == {"long": "left out", "short": "ok"}
    assert items(out)["long"]["reason"].startswith("for lack of time, with ")
    # It was to end in time, and did not.
    statuses = {name: item["status"] for name, item in items(out, "tests").items()}
    assert statuses == {"hang": "cut", "after": "left out"}
    assert calls(tmp_path) == ["short", "hang"]
    assert re.search("^smoke: left out for lack of time, with . s left: long$", capsys.readouterr().out, re.MULTILINE)
    (page,) = out.glob("*.md")
    assert re.search("^Left out for lack of time, with . s left: long.$", page.read_text(), re.MULTILINE)


def test_only_some_items(told, tmp_path, monkeypatch, capsys):
    told([("one", {}), ("two", {}), ("three", {})], following=[[("next", {})]])
    out = tmp_path / "out"
    assert main(monkeypatch, "--out", out, "--only", "t*e", "one") == 0
    assert calls(tmp_path) == ["one", "three"]
    (report,) = out.glob("*.json")
    # What is done is named too, and not done again; a name of no item is no silent success.
    assert main(monkeypatch, "--resume", report, "--out", out, "--only", "one", "two", "four") == 1
    assert calls(tmp_path) == ["one", "three", "two"]
    assert "error: --only: expected names of items in smoke tests, got 'four'\n" in capsys.readouterr().err


def test_a_process_that_ends_badly_after_its_last_item(told, tmp_path, monkeypatch):
    """As compute-sanitizer does, which reports at the end."""
    told([("fine", {}), ("well", {})])
    script = tmp_path / "checker.sh"
    script.write_text('#!/bin/sh\n"$@"\necho "===== 3 errors"\nexit 9\n')
    script.chmod(0o755)
    step = (tmp_path / "told.py").read_text()
    (tmp_path / "told.py").write_text(
        step.replace("for name, options in items])", f"for name, options in items], ['{script}'])")
    )
    assert main(monkeypatch, "--out", tmp_path / "out") == 1
    found = items(tmp_path / "out")
    assert [item["status"] for item in found.values()] == ["ok", "failed"]
    assert found["well"]["reason"] == "its process ended with exit status 9"
    assert "===== 3 errors" in found["well"]["output"]


def test_a_step_that_cannot_be_planned(told, tmp_path, monkeypatch):
    told(following=[[("next", {})]])
    (tmp_path / "told.py").write_text("raise ImportError('no such thing')")
    assert main(monkeypatch, "--out", tmp_path / "out") == 1
    assert items(tmp_path / "out")["plan"]["reason"] == "ImportError: no such thing"
    assert items(tmp_path / "out", "tests")["next"]["status"] == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")
def test_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, TOOL, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: no NVIDIA GPU that PyTorch can use; --rehearse runs the check without one\n"
    assert not list(tmp_path.iterdir())


def test_where_the_report_goes(told, tmp_path, monkeypatch):
    told([("fine", {})])
    monkeypatch.setenv("OUT", str(tmp_path / "from-environment"))
    assert main(monkeypatch) == 0
    assert main(monkeypatch) == 0  # a second one of the day replaces nothing
    names = sorted(path.name for path in (tmp_path / "from-environment").iterdir())
    assert [name.partition("rehearsal")[2] for name in names] == ["-2.json", "-2.md", ".json", ".md"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rehearsal": True}, "report of a rehearsal, none of whose figures counts; this is a run on a GPU"),
        ({"about": ABOUT | {"GPU": "H200"}}, "its GPU was H200, here it is H100"),
        ({"about": ABOUT | {"triton": "3.8.0"}}, "its triton was 3.8.0, here it is 3.6.0"),
        (
            {"about": ABOUT | {"sources": "xyz", "commit": "5678"}},
            "its sources was xyz, here it is abc (commits 5678 and 1234)",
        ),
        ({"format": 0}, "expected the .json of a report of format 1"),
        ({"steps": None}, "expected the .json of a report of format 1"),
    ],
)
def test_reports_that_cannot_be_resumed(tmp_path, change, message):
    Report(tmp_path / "report", ABOUT, rehearsal=False, missing={}).start_run("python", None)
    path = tmp_path / "report.json"
    resumed = Report.resume(path, tmp_path, ABOUT, False, {})
    assert len(resumed.data["runs"]) == 1
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReportError) as refused:
        Report.resume(path, tmp_path, ABOUT, False, {})
    assert message in str(refused.value)


def test_a_resumed_report_replaces_no_other(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        Report(folder / "report", ABOUT, rehearsal=False, missing={}).start_run("python", None)
    with pytest.raises(ReportError, match="there is another report of this name"):
        Report.resume(first / "report.json", second, ABOUT, False, {})
    Report.resume(first / "report.json", first, ABOUT, False, {})


def test_two_runs_that_begin_together_have_a_report_each(tmp_path):
    paths = [gpu_check.path_of_report(tmp_path, ABOUT, False) for _ in range(3)]
    assert len(set(paths)) == 3


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_minutes_that_are_none(monkeypatch, minutes, capsys):
    with pytest.raises(SystemExit):
        main(monkeypatch, "--minutes", minutes)
    assert "--minutes" in capsys.readouterr().err


def test_no_report_at_all(told, tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json"
    path.write_text("{")
    assert main(monkeypatch, "--out", tmp_path, "--resume", path) == 2
    assert f"error: {path}: cannot be read" in capsys.readouterr().err


def test_tables():
    rows = [{"op": "spread", "us": 12.3456, "ok": True}, {"op": "a|b", "us": 123456.7, "ok": False}, {"n": None}]
    assert tables(rows) == (
        "| op | us | ok |\n| --- | --- | --- |\n| spread | 12.35 | ok |\n| a\\|b | 123,457 | WRONG |\n\n"
        "| n |\n| --- |\n|  |"
    )


def test_a_text_is_one_short_line_of_a_table():
    assert tables([{"reason": "at 10:4:\n  x | y\n"}]) == "| reason |\n| --- |\n| at 10:4: x \\| y |"
    assert len(tables([{"reason": "x" * 9000}])) < 400


def test_sources_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "svit").mkdir()
    (tmp_path / "svit" / "a.py").write_text("x = 1")
    first = machine.sources()
    (tmp_path / "svit" / "a.txt").write_text("no source")
    assert machine.sources() == first
    (tmp_path / "svit" / "a.py").write_text("x = 2")
    assert machine.sources() != first


def test_chunks():
    batches = chunks([Item(str(n)) for n in range(5)], 2)
    assert [[item.name for item in batch.items] for batch in batches] == [["0", "2", "4"], ["1", "3"]]
    assert len(chunks([Item("a")], 16)) == 1


def test_what_is_printed_between_records_is_kept_apart(tmp_path, monkeypatch):
    """Whatever libraries print, in the middle of a line too."""
    code = "def run(setup):\n    print('half a line', end='')\n    yield {'n': 1}\n    print('the rest')\n"
    (tmp_path / "talks.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = worker.Worker("talks", Setup(True, "", 1), Batch([]), {})
    process.send(vars(Item("item")))
    records = []
    for record in process.records(time.monotonic() + 60):
        records.append(record)
        if "done" in record:
            break
    assert records == [{"finding": {"n": 1}}, {"done": True}]
    assert process.finish(30) == 0
    assert process.output() == "half a line\nthe rest"


@pytest.mark.parametrize("garbage", ["\x1e", "\x1e{", "\x1e3", "\x1e{}", "a \x1e b"])
def test_what_only_looks_like_a_record_is_printed(garbage):
    assert worker.parse(garbage) == (garbage, None)


def test_records():
    assert worker.parse('words\x1e{"done": true}') == ("words", {"done": True})


def test_a_process_that_prints_without_end_leaves_a_short_report(tmp_path, monkeypatch):
    code = "import os\ndef run(setup):\n    os.write(1, b'x' * 9**7)\n    raise ValueError('y' * 9**7)\n    yield"
    (tmp_path / "talks.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = worker.Worker("talks", Setup(True, "", 1), Batch([]), {})
    process.send(vars(Item("item")))
    record = next(process.records(time.monotonic() + 60))
    process.kill()
    assert record["error"].startswith("ValueError: yyy")
    assert len(record["error"]) + len(process.output()) < 30_000


def test_a_checker_that_cannot_be_run(told, tmp_path, monkeypatch):
    told([("fine", {})], following=[[("next", {})]])
    step = (tmp_path / "told.py").read_text()
    (tmp_path / "told.py").write_text(
        step.replace("for name, options in items])", "for name, options in items], ['/no/such/checker'])")
    )
    assert main(monkeypatch, "--out", tmp_path / "out") == 1
    assert "/no/such/checker" in items(tmp_path / "out")["fine"]["reason"]
    assert items(tmp_path / "out", "tests")["next"]["status"] == "ok"


# What the steps would do on a GPU.


@pytest.mark.parametrize("step", [smoke, kernels, models, sweep, sanitizer], ids=lambda step: step.__name__)
@pytest.mark.parametrize("built", [False, True])
def test_plans(step, built, monkeypatch, tmp_path):
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr(smoke, "LIBRARY", library)
    monkeypatch.setattr(models, "LIBRARY", library)
    monkeypatch.setattr(sanitizer, "find_tool", lambda name: "/usr/bin/compute-sanitizer")
    if built:
        library.touch()
    stages = step.stages(GPU)
    names = [item.name for stage in stages for batch in stage.batches for item in batch.items]
    assert len(set(names)) == len(names)  # the report knows them by their names
    assert all(json.dumps(item.arguments) for stage in stages for batch in stage.batches for item in batch.items)
    has_cuda_kernels = any("cuda" in str(batch) for stage in stages for batch in stage.batches)
    assert has_cuda_kernels == (built and step in (smoke, models, sanitizer))


def test_smoke_has_every_kernel_in_every_dtype():
    cases = smoke.triton_cases()
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    forward = {op for op in smoke.triton.BACKEND.OPS if not op.endswith("_backward")}
    assert {case.op for case in cases if case.channels == 24} == forward
    for C, cell in ((64, (8, 8)), (96, (8, 8)), (128, (4, 4)), (192, (4, 4)), (24, (3, 5)), (40, (5, 1))):
        assert {case.op for case in cases if (case.channels, case.cell) == (C, cell)} >= {"sample", "spread"}


def test_each_cuda_kernel_has_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(smoke, "LIBRARY", tmp_path)
    first, clusters, alone = smoke.stages(GPU)
    assert len(first.batches) == first.parallel == 16
    assert clusters.batches[0].items[0].name == "clusters"  # asked before one is launched
    kernels = [{(item.arguments["case"][1], item.arguments["case"][2]) for item in b.items} for b in alone.batches]
    assert len(kernels) == 8
    assert all(len(kernel) == 1 for kernel in kernels)


def test_what_is_timed_has_the_gpu_to_itself():
    assert [stage.parallel for stage in kernels.stages(GPU)] == [16, 1]
    assert [stage.parallel for stage in sweep.stages(GPU)] == [16, 1]
    assert [stage.parallel for stage in models.stages(GPU)] == [1]


def test_models_are_compared_with_their_upstream_form_and_the_peers():
    (stage,) = models.stages(GPU)
    found = {item.name: item.arguments for item in stage.batches[0].items}
    for batch in (1, 64, 128):
        for mode in ("forward", "training"):
            for way in ("as they are", "compiled"):
                specs = found[f"svit_small {mode} 224x224 batch {batch}, {way}"]["specs"]
                assert specs[:2] == ["upstream:svit_small", "svit_small"]
                assert set(models.PEERS) < set(specs)
    assert found["svit_small forward 800x1280 batch 2, as they are"]["ways"] == ("eager", "graph")
    assert found["svit_large training 224x224 batch 128, compiled"]["ways"] == ("compiled",)


def test_least_traffic():
    """x and s in, x's size out, and q: each once."""
    shape = ops.Shape(2, 8, 8, 16, (4, 4), 1)
    call = ops.call_of("spread", shape, torch.float32, "cpu")
    x, s, q = 2 * 8 * 8 * 16, 2 * 2 * 2 * 16, 2 * 2 * 2 * 9 * 16
    assert call.bytes() == 4 * (2 * x + s + q)


@pytest.mark.parametrize("name", [*ops.SUPER_TOKEN_OPS, *ops.OTHER_OPS])
def test_calls_have_the_arguments_of_their_op(name):
    """Both forms take them, and compute the same."""
    call = ops.call_of(name, ops.Shape(1, 8, 8, 16, (4, 4), 2), torch.float32, "cpu")
    expected = call.reference()()
    actual = getattr(torch.ops.svit, call.op)(*call.args, "reference")
    assert ops.largest_error(actual, expected) < 1e-6


def test_largest_error():
    a = torch.tensor([1.0, 2.0, -4.0])
    assert ops.largest_error(a + torch.tensor([0, 0.5, 0]), a) == 0.125
    assert ops.largest_error((a, a * float("nan")), (a, a)) == float("inf")


@pytest.fixture
def swept(monkeypatch):
    """A function: the error and the time of each setting of `spread` -> what a sweep of them finds."""
    monkeypatch.setattr(sweep.super_token, "SETTINGS", {})
    monkeypatch.setattr(sweep, "ratios", {})
    shape = ops.Shape(1, 8, 8, 64, (8, 8), 1)
    call = ops.call_of("spread", shape, torch.float32, "cpu")
    table = sweep.Table("spread", call, shape)

    def run(errors: dict, seconds: dict, banned: tuple = ()) -> dict:
        now = lambda: sweep.super_token.SETTINGS.get(table.key, "now")  # noqa: E731
        monkeypatch.setattr(call, "fused", lambda backend: lambda: call.reference()() * (1 + errors.get(now(), 0)))
        monkeypatch.setattr(sweep, "launches", lambda call: [SimpleNamespace(name="spread", run=now)])
        monkeypatch.setattr(sweep, "is_banned", lambda launch: now() in banned)
        monkeypatch.setattr(sweep, "microseconds", lambda call, *_: seconds[call()])
        return sweep.best(table, list(seconds)[1:], call, shape, "cpu")

    return run


def test_the_fastest_right_setting_is_found(swept):
    seconds = {"now": 10.0, (16, 1): 8.0, (16, 2): 5.0, (64, 4): 3.0, (64, 8): 2.0}
    found = swept({(64, 8): 0.5}, seconds, banned=((64, 4),))
    assert found["fastest"] == "(16, 2)"
    assert (found["us"], found["now us"], found["right"], found["wgmma"]) == (5.0, 10.0, 2, 1)
    assert found["wrong"] == "(64, 8)"
    assert found["ok"] is False
    assert list(sweep.entries()) == [
        {"table": "SETTINGS", "entry": '("spread", 64, 8, 8, 4): (16, 2),', "x now": 0.5, "sweeps": 1}
    ]


def test_an_entry_is_right_in_every_sweep_that_it_serves(swept):
    swept({}, {"now": 10.0, (16, 1): 8.0, (16, 2): 5.0})
    swept({(16, 2): 0.5}, {"now": 10.0, (16, 1): 2.0, (16, 2): 1.0})
    (entry,) = sweep.entries()
    assert entry["entry"] == '("spread", 64, 8, 8, 4): (16, 1),'
    assert entry["x now"] == pytest.approx(0.4)  # the geometric mean of 0.8 and 0.2
    assert entry["sweeps"] == 2


def test_tables_have_the_keys_of_launch(monkeypatch):
    shape = ops.Shape(128, 56, 56, 96, (8, 8), 2)
    call = ops.Call("depthwise3x3_backward", (None, torch.empty(1, 1, 1, 384, dtype=torch.bfloat16), None, True))
    table = sweep.Table("depthwise_taps", call, shape)
    assert (table.name, table.key) == ("STRIP_SETTINGS", ("depthwise_taps", 384, 2))
    assert (8, 4, 32) in table.settings()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tests/ops/test_a.py::test_b[1-x] FAILED   [ 50%]", ("tests/ops/test_a.py::test_b[1-x]", "FAILED")),
        (
            "[gw3] [  7%] PASSED tests/ops/test_a.py::test_b[f (1, 2)] ",
            ("tests/ops/test_a.py::test_b[f (1, 2)]", "PASSED"),
        ),
        ("FAILED tests/ops/test_a.py::test_b - assert 1 == 2", ("tests/ops/test_a.py::test_b", "FAILED")),
        ("ERROR tests/ops/test_a.py - ImportError: x", ("tests/ops/test_a.py", "ERROR")),
        ("tests/ops/test_a.py::test_b", None),
        ("E   assert 1 == 2", None),
    ],
)
def test_outcomes_of_tests(line, expected):
    assert tests.outcome(line) == expected


def test_a_model_that_cannot_be_built_ends_no_other(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{gpu_check.ROOT}:{gpu_check.ROOT / 'tools'}")
    setup = Setup(True, "", 2)
    found = list(models.run(setup, ["test_svit", "no_such_model"], [16, 16], 2, False, ["eager"]))
    assert {(row["model"], row["ok"]) for row in found} == {("test_svit", True), ("no_such_model", False)}
    assert all(row["img/s"] > 0 for row in found if row["ok"])


def test_ratios_are_to_the_first_model_or_none(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{gpu_check.ROOT}:{gpu_check.ROOT / 'tools'}")
    setup = Setup(True, "", 2)
    for names, expected in ((["no_such_model", "test_svit"], [None, None]), (["test_svit"], [1.0])):
        found = list(models.run(setup, names, [16, 16], 2, False, ["eager"]))
        assert [row["x first"] for row in found] == expected


def test_rehearsal(tmp_path):
    """All of it, from start to end, by the command that a GPU gets."""
    command = [sys.executable, TOOL, "--rehearse", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    (report,), (page,) = tmp_path.glob("*-rehearsal.json"), tmp_path.glob("*-rehearsal.md")
    data = json.loads(report.read_text())
    assert data["rehearsal"] is True
    assert list(data["steps"]) == list(gpu_check.STEPS)
    for step, entry in data["steps"].items():
        if entry["skipped"] is None:
            assert {item["status"] for item in entry["items"].values()} == {"ok"}, step
    assert "no figure counts" in page.read_text().splitlines()[0]
    assert (tmp_path / f"{report.stem}-tests.log").read_text().count("PASSED") > 5
