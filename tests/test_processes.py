"""How a tool ends: where nobody reads what it prints, where that cannot be written, when it is interrupted."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def tool(body: str) -> list[str]:
    """A command that runs `body` as the main function of a tool."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"import sys\nfrom svit import processes\ndef main():\n{lines}processes.run(main)"
    return [sys.executable, "-c", code]


def run(body: str, **options) -> tuple[int, str, str]:
    done = subprocess.run(tool(body), capture_output="stdout" not in options, text=True, timeout=60, **options)
    return done.returncode, done.stdout, done.stderr


def run_into_closed_pipe(body: str, stderr=subprocess.PIPE) -> tuple[int, str]:
    """What a tool ends with, and says on stderr, whose stdout nobody reads any more."""
    process = subprocess.Popen(tool(body), stdout=subprocess.PIPE, stderr=stderr, text=True)
    process.stdout.close()
    told = process.stderr.read() if process.stderr else ""
    return process.wait(60), told


@pytest.mark.parametrize(("body", "status"), [("return 0", 0), ("pass", 0), ("return 3", 3), ("sys.exit('no')", 1)])
def test_the_status_and_the_output_are_the_tools(body, status):
    found = run(f"print('out')\nprint('err', file=sys.stderr)\n{body}")
    assert found == (status, "out\n", "err\nno\n" if "no" in body else "err\n")


@pytest.mark.parametrize(
    "body",
    [
        "print('little')",
        "for _ in range(9999): print('much' * 99)",
        "print('at once', flush=True)",
        "try:\n    print('at once', flush=True)\nexcept Exception:\n    print('no', file=sys.stderr)",
        "import argparse\nargparse.ArgumentParser().parse_args(['--help'])",
        "sys.stdout.write('x')\nreturn 1",
    ],
)
def test_a_closed_pipe_ends_a_tool_in_silence(body):
    assert run_into_closed_pipe(body) == (141, "")


def test_a_closed_pipe_of_errors_too():
    """As in `2>&1 | head`."""
    assert run_into_closed_pipe("print('error', file=sys.stderr)\nprint('out')", stderr=subprocess.STDOUT) == (141, "")


def test_a_pipe_that_is_read_to_its_end_is_no_closed_one():
    assert run("for i in range(20000): print(i)")[:2] == (0, "".join(f"{i}\n" for i in range(20000)))


def test_other_closed_pipes_are_errors():
    status, _, told = run("raise BrokenPipeError(32, 'of a download')")
    assert status == 1
    assert "of a download" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only on Linux")
def test_a_full_disk_is_said_in_a_line():
    with open("/dev/full", "w") as full:
        status, _, told = run("print('out')", stdout=full, stderr=subprocess.PIPE)
    assert (status, told) == (1, "error: the output cannot be written (No space left on device)\n")


def test_ctrl_c_is_said_in_a_line():
    assert run("print('out')\nraise KeyboardInterrupt") == (130, "out\n", "interrupted\n")


def test_ctrl_c_at_the_very_end_ends_at_once_and_says_nothing():
    late = "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\nprint('out')"
    assert run(late) == (-signal.SIGINT, "out\n", "")


def test_names_that_the_output_cannot_encode():
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    assert run(r"print('\udcff caf\xe9')", env=ascii_only) == (0, "\\udcff caf\\xe9\n", "")
    assert run(r"print('\udcff')") == (0, "\\udcff\n", "")


CLOSED = "print('out')\nprint('err', file=sys.stderr)\nsys.stderr.write('err')\nsys.stdout.flush()\nreturn 3"


def test_an_output_that_was_closed_from_the_start():
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *tool(CLOSED)]
    assert subprocess.run(command, timeout=60).returncode == 3


def test_all_tools_end_so():
    tools = [path for path in TOOLS.glob("*.py") if "__main__" in path.read_text()]
    assert len(tools) > 10
    for path in tools:
        assert path.read_text().endswith('\n\nif __name__ == "__main__":\n    processes.run(main)\n'), path
