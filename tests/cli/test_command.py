"""The command `svit`: its help, how fast it starts, and how what is wrong is told."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from svit import __version__, cli
from svit.cli import COMMANDS, command, info
from svit.errors import InputError

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_starts_without_what_is_heavy(option):
    """No clock: what takes the time is imports."""
    code = f"""
import sys
from svit import cli
try:
    cli.main([{option!r}])
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "timm", "numpy", "PIL", "yaml", "svit.models"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert (f"svit {__version__}\n" if option == "--version" else "usage: svit COMMAND") in done.stdout


def test_help_has_every_command_and_examples_that_work(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for name, (summary, _) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100
    first = re.search(r"^  svit infer photo.jpg (.*)$", text, re.MULTILINE)[1]
    args = importlib.import_module("svit.cli.infer").parser().parse_args(["photo.jpg", *first.split()])
    assert timm.is_model(args.model.partition(".")[0])
    recipe = re.search(r"^  svit train (\w+) ", text, re.MULTILINE)[1]
    assert (ROOT / "svit" / "recipes" / f"{recipe}.yaml").is_file()


def test_every_module_is_a_command():
    modules = {path.stem for path in (ROOT / "svit" / "cli").glob("*.py")} - {"__init__", "base"}
    assert modules == {name.replace("-", "_") for name in COMMANDS}


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if entry.extra != "mm"])
def test_the_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: svit {name} ")
    assert f"\n    svit {name}" in text  # an example


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a COMMAND; --help lists them"),
        (["trian"], "there is no command 'trian'; did you mean train"),
        (["--verbose"], "unrecognized arguments: --verbose"),
    ],
)
def test_what_is_no_command(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert f"svit: error: {message}" in capsys.readouterr().err


def test_wrong_input_is_a_line(monkeypatch, capsys):
    for error in (InputError("no such thing"), OSError(28, "No space left on device")):

        def main(argv, error=error):
            raise error

        monkeypatch.setattr(info, "main", main)
        assert command("info")([]) == 1
        assert capsys.readouterr() == ("", f"error: {error}\n")


def test_a_missing_extra_is_a_line(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "svit.cli.push", raising=False)
    for name, package, hint in (
        ("infer", "tqdm_", "pip install 'svit[train]'"),
        ("mm-test", "mmengine_", "pip install 'svit[mm]' && pip install --no-build-isolation mmcv==2.1.0"),
    ):

        def missing(module, package=package):
            raise ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.part")

        monkeypatch.setattr(cli.importlib, "import_module", missing)
        assert command(name)([]) == 1
        assert capsys.readouterr() == ("", f"error: svit {name} needs {package}: {hint}\n")
        with pytest.raises(ModuleNotFoundError):  # which has no extra: nothing that a user could install
            command("info")([])


def test_recipes_are_listed_and_shown(capsys):
    with pytest.raises(SystemExit) as stop:
        command("train")(["--list"])
    assert stop.value.code == 0
    names = capsys.readouterr().out.split()
    assert names == sorted(path.stem for path in (ROOT / "svit" / "recipes").glob("*.yaml"))
    with pytest.raises(SystemExit):
        command("train")(["--show", "digits"])
    assert capsys.readouterr().out == (ROOT / "svit/recipes/digits.yaml").read_text()
    assert command("train")(["--show", "nothing"]) == 1
    assert "no recipe of that name; there are cifar10, " in capsys.readouterr().err


def test_info(monkeypatch, capsys):
    monkeypatch.setattr(
        info.metadata,
        "requires",
        lambda name: ["torch", 'nothing-of-that-name>=2; extra == "train"', 'timm>99; extra == "export"'],
    )
    assert command("info")([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"svit {__version__} (")
    assert f"timm {timm.__version__}" in lines[0]
    assert any(line.startswith("cpu      float32  -> reference") for line in lines)
    extras = {line.split()[1]: line.partition("): ")[2] for line in lines if line.startswith("extra ")}
    assert extras["train"] == "needs nothing-of-that-name>=2: pip install 'svit[train]'"
    assert extras["export"] == "needs timm>99: pip install 'svit[export]'"
    assert extras["profile"] == "installed"


@pytest.mark.parametrize(
    "code",
    [
        "import svit, timm",
        "import timm, svit",
        "import svit\nfrom timm.models import create_model\nimport timm",
        "import svit.models\nimport timm",
        "from svit import models\nimport timm",
    ],
)
def test_models_are_registered(code):
    done = python("-c", f"{code}\nassert timm.is_model('svit_small')\nimport svit\nassert svit.models.SViT")
    assert done.returncode == 0, done.stderr


def messages(file: Path) -> list[str]:
    """The text in a module that a user may meet: all strings, of commands the docstring too."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    own = {n.body[0].value for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)}
    shown = {tree.body[0].value} if file.parent.name == "cli" and ast.get_docstring(tree) else set()
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in own - shown
    ]


def test_no_message_names_what_a_wheel_lacks():
    files = [*(ROOT / "svit").rglob("*.py")]
    found = {file: messages(file) for file in files}
    found |= {file: [file.read_text()] for file in (ROOT / "svit" / "recipes").glob("*.yaml")}
    assert sum(map(len, found.values())) > 2000
    for file, texts in found.items():
        for text in texts:
            assert not re.search(r"tools/|docs/|\.md\b(?<!README\.md)|constraints\.txt|'\.\[", text), f"{file}: {text}"


def test_a_result_that_nobody_reads(monkeypatch, capsys):
    """As stdout has it: the status that a shell calls the end by SIGPIPE, and no message."""

    def main(argv):
        raise BrokenPipeError

    monkeypatch.setattr("svit.cli.info.main", main)
    assert command("info")([]) == 141
    assert capsys.readouterr().err == ""
