"""What the documents say exists: files and headings behind links, pages of the site, tools and their options."""

import ast
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import yaml

import svit
from helpers import missing

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def links(document: Path) -> list[str]:
    """The relative ones, pictures among them."""
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", document.read_text()))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.MULTILINE)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them; whether MkDocs makes the same is for its strict build to say."""
    headings = re.findall(r"^#+ (.*)", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, str, str]]:
    """(document, command, its arguments) of each `svit COMMAND`, file of tools/ and table of options."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        for name, arguments in re.findall(r"\bsvit ([a-z][\w-]*)((?: +[^`\n#|]*)?)", "\n".join(code(text))):
            found.append((document.name, name, arguments))
        for tool, arguments in re.findall(r"(?<!\.\./)\btools/([\w/]+)\.py([^`\n#|]*)", text):
            found.append((document.name, f"tools/{tool}.py", arguments))
        for name, rows in re.findall(r"^\| option of `?(?:svit )?([\w.-]+)`? \|.*\n((?:\|.*\n)+)", text, re.MULTILINE):
            found.append((document.name, name, " ".join(re.findall(r"^\|([^|]*)\|", rows, re.MULTILINE))))
    return found


def code(text: str) -> list[str]:
    """What stands in backticks, and the lines of console sessions."""
    inline = re.findall(r"`(svit [^`\n]*)`", FENCE.sub("", text))
    return inline + [
        line
        for block in re.findall(r"^ *```console\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if line.lstrip().startswith("$")
    ]


def options(source: Path) -> set[str]:
    """What a command's parser takes, and those of the commands' modules that it imports."""
    text = source.read_text()
    known = {"--help", *re.findall(r"""["'](--[a-z][\w-]*)["']""", text)}
    for module in re.findall(r"^from \.(\w+) import", text, re.MULTILINE):
        known |= options(source.with_name(f"{module}.py"))
    if name := re.search(r"""command\("([\w-]+)"\)""", text):  # a file of tools/ that calls it
        known |= options(source_of(name[1]))
    return known


def source_of(command: str) -> Path:
    return ROOT / "svit" / "cli" / f"{command.replace('-', '_')}.py"


@pytest.mark.parametrize("document", relative(DOCUMENTS))
def test_links(document):
    document = ROOT / document
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_commands():
    assert len(commands()) > 40
    for document, name, arguments in commands():
        source = ROOT / name if name.startswith("tools/") else source_of(name)
        assert source.is_file(), f"{document}: {name}"
        used = set() if name == "exec" else set(re.findall(r"(?<=[\s\[`])--[a-z][\w-]*", arguments))
        assert used <= options(source), f"{document}: {name} {used - options(source)}"


def test_navigation():
    """Every page is in the site's navigation, and nothing else."""

    def files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for inner in (entry.values() if isinstance(entry, dict) else entry) for file in files(inner)]

    nav = files(yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)["nav"])  # it knows no `!ENV`
    assert sorted(nav) == sorted(str(page.relative_to(ROOT / "docs")) for page in PAGES)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """`make docs`, whose warnings are errors: a page it cannot read, a dead link, a docstring's unknown argument."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        try:
            importlib.import_module(package)
        except ImportError:
            missing(f"{package}: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def public_names() -> set[str]:
    """What the modules `svit.NAME` offer in their `__all__`, each with the module's name before it.

    They are not imported, since some need packages of an extra.
    """
    found = set()
    for module in pkgutil.iter_modules(svit.__path__, "svit."):
        tree = ast.parse(Path(importlib.util.find_spec(module.name).origin).read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= {f"{module.name}.{name}" for name in ast.literal_eval(node.value)}
    return found


def test_public_names(site):
    """Each is on a page of the API, under the name by which it is imported: what mkdocstrings lists for other sites."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split()[0] for line in inventory.splitlines()}
    assert {"svit.models.SViT", "svit.ops.super_token_attention", "svit.images.MODES"} <= public_names()
    assert public_names() <= described, public_names() - described


def test_site(site):
    assert "rounds of association" in (site / "api" / "layers.html").read_text()
    ops = (site / "ops.html").read_text()  # which takes the operators' READMEs in
    for text in (
        "a missing super token counts as a zero vector",
        "Upsampling is linear",
        "<code>composition.py</code>",
    ):
        assert text in ops, text
    assert "<code>constraints.txt</code>" in (site / "detection.html").read_text()  # a link on GitHub alone
