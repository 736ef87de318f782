"""A script that knows nothing of svit, and what it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ONE_THREAD, TWO_PROCESSES
from svit.cli import command

FOREIGN = """
import multiprocessing, subprocess, sys
import timm

KNOWN = "import sys, timm; print(timm.is_model('svit_small'), any('startup' in path for path in sys.path))"


def child(queue):
    queue.put(timm.is_model("svit_small"))


if __name__ == "__main__":
    print(sys.argv[1:], sys.path[0], timm.is_model("svit_small"))
    print(subprocess.run([sys.executable, "-c", KNOWN], capture_output=True, text=True).stdout, end="")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
    sys.exit(3)
"""


def run(*arguments: object, start: tuple[str, ...] = (sys.executable,), **env: str) -> subprocess.CompletedProcess:
    command = [*start, "-m", "svit", "exec", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**ONE_THREAD, **env})


def test_a_script_and_its_children_know_the_models(tmp_path):
    script = tmp_path / "foreign.py"
    script.write_text(FOREIGN)
    done = run(script, "a", "--b")
    expected = [f"['a', '--b'] {tmp_path} True", "True False", "True"]
    assert (done.returncode, done.stdout.splitlines()) == (3, expected), done.stderr


def test_a_module_and_the_sitecustomize_of_others(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; print('another one', file=sys.stderr)")
    (tmp_path / "foreign.py").write_text(
        "import sys, timm; print(sys.argv[1:], sys.path[0], timm.is_model('svit_small'))"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("-m", "foreign", "c", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (0, f"['c'] {Path.cwd()} True\n"), done.stderr
    assert done.stderr.count("another one") == 2  # in this Python and in that which it becomes


def test_under_torchrun():
    # In one write: two processes may otherwise print into each other's line.
    code = 'import os, timm; os.write(1, f\'{os.environ["RANK"]} {timm.is_model("svit_small")}\\n\'.encode())'
    done = run("-c", code, start=TWO_PROCESSES)
    assert sorted(done.stdout.splitlines()) == ["0 True", "1 True"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "expected SCRIPT or -m MODULE"), (["-I", "train.py"], "expected SCRIPT or -m MODULE, got -I")],
)
def test_what_cannot_be_run(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command("exec")(arguments)
    assert stop.value.code == 2
    assert f"svit exec: error: {message}" in capsys.readouterr().err
