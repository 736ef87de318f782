import subprocess
import sys

import gpu_check
import pytest
import torch

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU does")


def test_bytes_of_a_half_block():
    # x 3 times in and once out, q written and read, partial sums in float32 written and read
    x, q, partial = 2 * 56 * 56 * 64, 2 * 9 * 56 * 56, 4 * 9 * 7 * 7 * 64
    assert gpu_check.half_block_bytes(1, 56, 56, 64, (8, 8)) == 4 * x + 2 * q + 2 * partial


@CPU
def test_plain_and_ours_compute_the_same():
    torch.manual_seed(0)
    block = gpu_check.Block(16, 2, 4).double()
    x = torch.randn(2, 16, 12, 10, dtype=torch.float64)
    ours = gpu_check.Half(block)(x)
    torch.testing.assert_close(gpu_check.Plain(block).double()(x), ours)
    conv, plain = gpu_check.ResidualDepthwiseConv(16), gpu_check.plain_depthwise(16)
    plain.load_state_dict(conv.state_dict())
    wide = [gpu_check.GeluDepthwise(c)(x.float()) for c in (conv, plain)]
    torch.testing.assert_close(*wide)


@CPU
def test_parts_that_run_anywhere(tmp_path):
    output = tmp_path / "new" / "results.md"
    command = [sys.executable, gpu_check.__file__, "--parts", "sanitizer", "ops", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout.splitlines()[-1]
    text = output.read_text()
    assert "## sanitizer" in text
    assert "not run, there is no GPU" in text
    for title in ("### Half-block, 1 x 16 x 16 x 16", "### Depthwise, residual", "### GELU, depthwise, residual"):
        assert title in text
    assert text.count("| svit ") == 3
    assert torch.__version__ in text


@CPU
def test_models_are_compared_with_the_plain_form():
    for part in ("inference", "training"):
        text = next(gpu_check.measure_models(part, (), runs=1))
        assert "forward + backward" in text if part == "training" else "inference, float32" in text
        assert text.index("| plain:test_svit") < text.index("| folded:test_svit") < text.index("| resnet10t")


def test_what_a_gpu_would_compare(monkeypatch):
    monkeypatch.setattr(gpu_check, "GPU", True)
    runs = list(gpu_check.model_runs("inference", gpu_check.MODELS))
    assert all(specs[0].startswith("plain:") for specs, _ in runs)
    assert {(s.size, s.batch_size) for _, s in runs} == {((224, 224), 128), ((800, 1280), 2)}
    assert {(s.amp, s.dtype) for _, s in runs} == {("bfloat16", "float32"), (None, "bfloat16"), (None, "float32")}
    assert sum(set(gpu_check.PEERS) < set(specs) for specs, _ in runs) == 2
    assert all(s.train for _, s in gpu_check.model_runs("training", ["svit_small"]))
    specs, _ = next(gpu_check.model_runs("compiled", ["svit_small"]))
    assert {"compiled:svit_small", "compiled:plain:svit_small", "compiled:convnext_tiny"} < set(specs)


def test_lack_of_memory_is_written_down(monkeypatch):
    def compare(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(gpu_check, "compare", compare)
    assert "FAILED: plain:test_svit, folded:test_svit" in next(gpu_check.measure_models("training", (), 1))


def test_failing_tests_are_written_down_and_end_in_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "ROOT", gpu_check.ROOT / "tests" / "data")  # where there are none of them
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--parts", "tests", "--output", str(tmp_path / "out.md")])
    with pytest.raises(SystemExit, match="error: something failed"):
        gpu_check.main()
    assert "FAILED: the tests failed" in (tmp_path / "out.md").read_text()
