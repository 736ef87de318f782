"""timm's own tests/test_models.py, unmodified, on every architecture of ours, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import timm

import svit  # noqa: F401  registers the architectures

# timm's tests that take an architecture by name, a tag by name, or a tag with weights.
PER_ARCHITECTURE = {
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_torchscript",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}
PER_TAG = {"test_model_default_cfgs"}
PER_WEIGHTS = {"test_model_load_pretrained", "test_model_features_pretrained"}


def run_timm_tests(sdist: Path, report: Path) -> subprocess.CompletedProcess:
    # On GitHub's runners timm leaves tests out.
    env = {k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "PYTEST_ADDOPTS")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH")]))
    env["OMP_NUM_THREADS"] = "1"  # tracing takes most of the time; waiting threads would disturb other test workers
    options = ["-p", "plugin", "-p", "no:timeout", "-p", "no:cacheprovider", "-q", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", sdist / "tests" / "test_models.py", "-c", sdist / "pyproject.toml"]
    return subprocess.run([*command, *options], env=env, capture_output=True, text=True)


def test_timm_suite(timm_sdist: Path, tmp_path: Path) -> None:
    run = run_timm_tests(timm_sdist, tmp_path / "report.xml")
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr

    passed, skipped = set(), set()
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        function, name = re.fullmatch(r"(\w+)\[(?:\d+-)?([\w.]+)\]", case.get("name")).groups()
        (passed if case.find("skipped") is None else skipped).add((function, name))
    architectures = timm.list_models(module="svit")
    tags = timm.list_models(module="svit", include_tags=True)
    weights = timm.list_pretrained("svit_*")
    assert weights == ["svit_nano.photos20", "svit_nano_32.cifar10"]
    expected = [(PER_ARCHITECTURE, architectures), (PER_TAG, tags), (PER_WEIGHTS, weights)]
    assert passed == {(function, name) for functions, names in expected for function in functions for name in names}
    assert not skipped
