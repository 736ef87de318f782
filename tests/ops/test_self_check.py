"""The first-use self-check, with a stand-in for a backend. tests/ops/triton/test_self_check.py has the real kernels."""

import json
import os
import socket
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from svit.ops import _dispatch, _self_check, depthwise3x3, reference, sample, self_check

X = torch.randn(1, 6, 6, 8, generator=torch.Generator().manual_seed(0))
CASE = _self_check.Case("other", "sample", 8, (2, 3), torch.float32)


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """A backend that computes by the reference, unless told to be wrong."""
    module = SimpleNamespace(calls=[], wrong=set(), error=None)

    def implementation(op):
        def run(*args):
            module.calls.append(op)
            if module.error:
                raise module.error
            results = getattr(reference, op)(*args)
            if op in module.wrong:
                results = results * 1.2 if torch.is_tensor(results) else (results[0] * 1.2, *results[1:])
            return results

        return run

    module.OPS = ("sample", "sample_backward", "depthwise3x3", "depthwise3x3_backward")
    for op in module.OPS:
        setattr(module, op, implementation(op))
    module.usable = lambda op, x: (True, "")
    module.fingerprint = lambda device: "other 1.0"
    monkeypatch.setattr(_dispatch, "BACKENDS", {"other": module})
    monkeypatch.setattr(_dispatch, "failures", {})
    monkeypatch.setattr(_self_check, "verdicts", {})
    monkeypatch.setenv("SVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("SVIT_SELF_CHECK", raising=False)
    return module


def forget(monkeypatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(_self_check, "verdicts", {})
    monkeypatch.setattr(_dispatch, "failures", {})


def value_and_gradient(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    s, _ = sample(x, (2, 3))
    return s, torch.autograd.grad(s.square().sum(), x)[0]


def file_of(case: _self_check.Case = CASE):
    return _self_check.verdict_file(case, "other 1.0")


def test_a_right_backend_is_checked_once_and_kept_on_disk(backend, monkeypatch):
    for _ in range(2):
        assert torch.equal(sample(X, (2, 3))[0], reference.sample(X, (2, 3))[0])
    assert backend.calls == ["sample", "sample_backward", "sample", "sample"]  # the check, then two calls
    kept = json.loads(file_of().read_text())
    assert kept["ok"]
    assert kept["error"] < 1e-6
    assert kept["of"] == "other 1.0"
    forget(monkeypatch)
    backend.calls.clear()
    sample(X, (2, 3))
    assert backend.calls == ["sample"]


@pytest.mark.parametrize("wrong", ["sample", "sample_backward"])
def test_a_wrong_backend_is_left_out_with_one_warning(backend, wrong, monkeypatch):
    backend.wrong = {wrong}
    x = X.clone().requires_grad_()
    message = (
        r"the other backend is left out for sample of 8 channels in torch.float32 from now on, it failed its "
        r"self-check: (s|dx) is off by 0.2 of its largest value; at most 1e-04 is rounding"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        s, grad = value_and_gradient(x)
    assert len(caught) == 1
    expected = sample(x, (2, 3), backend="reference")[0]
    assert torch.equal(s, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(X, (2, 3))
        depthwise3x3(X, torch.ones(8, 1, 3, 3), torch.ones(8))  # another op is not concerned
    assert backend.calls[-1] == "depthwise3x3"
    forget(monkeypatch)
    backend.calls.clear()
    with pytest.warns(UserWarning, match="self-check"):  # the verdict of another process
        sample(X, (2, 3))
    assert not backend.calls


@pytest.mark.parametrize("wrong", [(), ("sample",)])
def test_threads_share_a_check(backend, wrong):
    """As those of nn.DataParallel, which meet a backend all at once."""
    backend.wrong = set(wrong)
    together = threading.Barrier(4)

    def first_call(_):
        together.wait(60)
        return sample(X, (2, 3))[0]

    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("always")
        results = [*threads.map(first_call, range(4))]
    assert all(torch.equal(s, reference.sample(X, (2, 3))[0]) for s in results)
    assert len([w for w in caught if "self-check" in str(w.message)]) == len(wrong)
    assert backend.calls.count("sample_backward") == 1


def test_an_exception_is_a_verdict(backend):
    backend.error = RuntimeError("ptxas said no")
    with pytest.warns(UserWarning, match="self-check: RuntimeError: ptxas said no"):
        assert torch.equal(sample(X, (2, 3))[0], reference.sample(X, (2, 3))[0])
    assert not json.loads(file_of().read_text())["ok"]


def test_lack_of_memory_is_no_verdict(backend):
    backend.error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        sample(X, (2, 3))
    assert not file_of().exists()
    assert not _self_check.verdicts


def test_not_a_number_and_a_wrong_shape_or_dtype_are_wrong(backend):
    backend.sample = lambda *args: tuple(t * float("nan") for t in reference.sample(*args))
    assert not _self_check.check(CASE, backend, "cpu").ok
    backend.sample = lambda *args: tuple(t[..., :1] for t in reference.sample(*args))
    assert "instead of" in _self_check.check(CASE, backend, "cpu").reason
    backend.sample = lambda *args: tuple(t.double() for t in reference.sample(*args))
    assert "s is float64 instead of float32" in _self_check.check(CASE, backend, "cpu").reason
    half = CASE._replace(dtype=torch.float16)
    backend.sample = reference.sample
    assert _self_check.check(half, backend, "cpu").ok
    backend.sample = lambda *args: tuple(t.half() for t in reference.sample(*args))
    assert _self_check.check(half, backend, "cpu").reason.startswith("mass is float16 instead of float32")


def test_the_first_image_is_not_all(backend):
    def scaled(op):
        def run(*args):
            results = getattr(reference, op)(*args)
            first = results if torch.is_tensor(results) else results[0]
            first[1:] *= 1.2
            return results

        return run

    ops = ("associate", "aggregate", "spread", "sample", "bias_gelu_affine")
    cases = [CASE._replace(op=op, cell=None if op == "bias_gelu_affine" else (2, 3)) for op in ops]
    for case in cases:
        setattr(backend, case.op, scaled(case.op))
        assert not _self_check.check(case, backend, "cpu").ok, case
    backend.sample, backend.sample_backward = reference.sample, scaled("sample_backward")
    assert _self_check.check(CASE, backend, "cpu").reason.startswith("dx is off")


def test_a_backend_asked_for_by_name_raises(backend):
    backend.wrong = {"sample"}
    for _ in range(2):
        with pytest.raises(ValueError, match="backend: 'other' cannot run sample here: it failed its self-check"):
            sample(X, (2, 3), backend="other")
    assert not _dispatch.failures


def test_it_can_be_switched_off(backend, monkeypatch):
    monkeypatch.setenv("SVIT_SELF_CHECK", "0")
    sample(X, (2, 3))
    assert backend.calls == ["sample"]
    assert not file_of().exists()


DAMAGED = ["", "{", "[]", '{"ok": 1}', "\udcff", "[" * 100_000]
DAMAGED_NOTES = [{"pid": "1"}, {"pid": None}, {"pid": 10**30}, {"pid": float("nan")}, {"pid": 10**30, "begun": "2"}]


@pytest.mark.parametrize(
    "content",
    [*DAMAGED, *(json.dumps({"ok": False, "host": socket.gethostname(), **note}) for note in DAMAGED_NOTES)],
    ids=range(len(DAMAGED) + len(DAMAGED_NOTES)),
)
def test_a_damaged_verdict_is_checked_again(backend, content):
    file_of().parent.mkdir(parents=True)
    file_of().write_bytes(content.encode("utf-8", "surrogateescape"))
    sample(X, (2, 3))
    assert len(backend.calls) == 3
    assert json.loads(file_of().read_text())["ok"]


def test_a_cache_that_cannot_be_written_to_is_done_without(backend, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SVIT_CACHE_DIR", str(tmp_path / "file" / "below"))
    for _ in range(2):
        sample(X, (2, 3))
    assert len(backend.calls) == 4  # once a process
    forget(monkeypatch)
    sample(X, (2, 3))
    assert len(backend.calls) == 7


def test_a_user_without_a_home_is_served(backend, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("SVIT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_self_check.Path, "home", home)
    for _ in range(2):
        sample(X, (2, 3))
    assert len(backend.calls) == 4


def test_a_cache_folder_that_cannot_be_looked_into_is_done_without(backend, monkeypatch, tmp_path, capturing):
    monkeypatch.setenv("SVIT_CACHE_DIR", str(tmp_path / ("a" * 300)))  # as where a right is missing
    assert capturing(CASE, backend) is None
    assert _self_check.summary("other", backend, torch.device("cpu")) == "none has run yet"


def ended_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_check_that_took_the_process_with_it_is_tried_twice(backend, monkeypatch):
    for begun in (1, 2):
        _self_check.write(
            file_of(), {"ok": False, "pid": ended_process(), "host": socket.gethostname(), "begun": begun}
        )
        forget(monkeypatch)
        backend.calls.clear()
        if begun == 1:
            sample(X, (2, 3))
            assert len(backend.calls) == 3
    with pytest.warns(UserWarning, match=f"2 processes ended while they checked it; delete {file_of()}"):
        sample(X, (2, 3))
    assert not backend.calls


def test_a_check_that_another_process_runs_now_is_run_here_too(backend):
    _self_check.write(file_of(), {"ok": False, "pid": os.getpid(), "host": socket.gethostname(), "begun": 9})
    sample(X, (2, 3))
    assert len(backend.calls) == 3


def test_an_interrupted_check_leaves_nothing(backend):
    backend.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sample(X, (2, 3))
    assert not file_of().exists()


def test_a_new_build_is_checked_again(backend, monkeypatch):
    sample(X, (2, 3))
    forget(monkeypatch)
    backend.fingerprint = lambda device: "other 1.1"
    backend.calls.clear()
    sample(X, (2, 3))
    assert len(backend.calls) == 3


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return lambda case, module: _self_check.problem(case, module, torch.device("cuda", 0))


def test_nothing_runs_while_a_graph_is_captured(backend, capturing, monkeypatch):
    assert capturing(CASE, backend) is None  # the reference is captured then
    _self_check.write(file_of(CASE._replace(channels=16)), {"ok": True})
    assert capturing(CASE, backend) == ""  # the device has been checked, this case has not
    _self_check.write(file_of(), {"ok": False, "reason": "it was wrong"})
    assert capturing(CASE, backend) == "it was wrong"
    _self_check.write(file_of(), {"ok": True})
    assert capturing(CASE, backend) == ""
    assert not backend.calls
    assert not _self_check.verdicts


def test_without_a_verdict_the_reference_runs(backend, monkeypatch):
    monkeypatch.setattr(_self_check, "problem", lambda *_: None)
    assert torch.equal(sample(X, (2, 3))[0], reference.sample(X, (2, 3))[0])
    assert not backend.calls
    monkeypatch.undo()
    assert not _dispatch.failures


def test_the_surroundings_neither_change_nor_are_changed(backend):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as counter:
        row = _self_check.check(CASE, backend, "cpu")
    assert row.ok
    assert row.error < 1e-6
    assert torch.equal(state, torch.get_rng_state())
    assert counter.get_total_flops() == 0
    torch.set_default_dtype(torch.float64)
    try:
        assert _self_check.check(CASE, backend, "cpu").ok
        with torch.device("meta"):
            assert _self_check.check(CASE, backend, "cpu").ok
    finally:
        torch.set_default_dtype(torch.float32)


def test_self_check_gives_a_row_for_every_published_shape(backend, monkeypatch):
    few = (8, None, ""), (16, None, ""), (32, None, "gelu"), (64, None, "gelu")
    rule = _self_check.RULES["depthwise3x3"]._replace(published=few)
    monkeypatch.setitem(_self_check.RULES, "depthwise3x3", rule)
    backend.wrong = {"depthwise3x3"}
    rows = self_check("cpu")
    assert {r.op for r in rows} == {"sample", "depthwise3x3"}
    assert {(r.channels, r.cell) for r in rows if r.op == "sample"} == {
        (64, (8, 8)), (96, (8, 8)), (128, (4, 4)), (192, (4, 4)),
    }  # fmt: skip
    assert {(r.channels, r.form) for r in rows if r.op == "depthwise3x3"} == {
        (8, ""), (16, ""), (32, "gelu"), (64, "gelu"),
    }  # fmt: skip
    assert {r.dtype for r in rows} == {torch.float32, torch.bfloat16, torch.float16}
    assert all(r.ok == (r.op == "sample") and r.backend == "other" for r in rows)
    wrong = [r for r in rows if not r.ok]
    assert all(0.15 < r.error < 0.25 for r in wrong)
    # What it found holds for later calls.
    with pytest.warns(UserWarning, match="self-check"):
        depthwise3x3(torch.ones(1, 4, 4, 8), torch.ones(8, 1, 3, 3), torch.ones(8))


def test_self_check_where_no_fused_backend_runs():
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        assert self_check() == []


def test_info_tells_the_verdicts(backend, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _dispatch.info()
    assert "self-check of other: none has run yet" in capsys.readouterr().out
    sample(X, (2, 3))
    _self_check.write(file_of(CASE._replace(channels=16)), {"ok": False, "reason": "s is off"})
    _dispatch.info()
    assert "self-check of other: 1 cases right, wrong: sample-16-2x3-float32 (s is off)" in capsys.readouterr().out
