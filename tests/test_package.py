"""The package as a user gets it: built as wheel and sdist, installed where nothing else is, imported, run."""

import ast
import csv
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers import ONE_THREAD

ROOT = Path(__file__).parent.parent

# What must not be needed: a GPU's compiler, and the packages of every extra.
ABSENT = ["triton", "fvcore", "matplotlib", "sklearn", "onnx", "mmengine", "mmcv", "mmdet", "mmseg", "pytest"]

SMOKE = f"""
import importlib.util
for name in {ABSENT}:
    assert importlib.util.find_spec(name) is None, name
import pathlib, sys, timm, torch, svit
assert pathlib.Path(svit.__file__).is_relative_to(sys.prefix), svit.__file__
package = pathlib.Path(svit.__file__).parent
assert (package / "py.typed").is_file()
assert not list(package.parent.glob("mm_configs"))
for name in timm.list_models(module="svit"):
    device = "meta" if name in ("svit_small", "svit_base", "svit_large") else "cpu"
    model = timm.create_model(name, device=device).eval()
    assert model(torch.randn(1, 3, 64, 64, device=device)).shape == (1, model.num_classes)
    with torch.inference_mode():
        model(torch.randn(1, 3, 64, 64, device=device))
model = timm.create_model("svit_nano_32.cifar10", pretrained=True)  # the weights come along
assert model.num_classes == 10 and model.head.fc.weight.abs().max() > 0.1
from svit import published
assert published.value("svit_small", "ImageNet-1K", (224, 224), "top1") == 83.6  # the table comes along
print("version", svit.__version__)
"""


def run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("build")
    for name in (
        "svit",
        "mm_configs",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
        "MANIFEST.in",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder)
    return folder / "dist"


def dependencies(name: str, found: dict | None = None) -> dict[str, metadata.Distribution]:
    """The installed packages that `name` needs, itself included, without any extra and without Triton."""
    found = {} if found is None else found
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found and key != "triton":
        found[key] = metadata.distribution(name)
        for requirement in map(Requirement, found[key].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                for extra in requirement.extras or {""}:
                    needed = Requirement(str(requirement)).name
                    dependencies(needed, found)
                    for line in metadata.distribution(needed).requires or [] if extra else []:
                        optional = Requirement(line)
                        if optional.marker and optional.marker.evaluate({"extra": extra}):
                            dependencies(optional.name, found)
    return found


def bare_environment(folder: Path, *more: str) -> Path:
    """A new environment that holds, as links, what torch, timm and `more` need and nothing else; returns its Python."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for needed in ("torch", "timm", "safetensors", *more):
        for distribution in dependencies(needed).values():
            tops = {Path(f).parts[0] for f in distribution.files or [] if not str(f).startswith(("..", "/"))}
            for top in tops:
                source, link = Path(str(distribution.locate_file(top))), site / top
                if not link.exists() and source.exists() and top != "__pycache__":
                    link.symlink_to(source)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheels(built, tmp_path_factory) -> dict[str, Path]:
    """The wheel, and the one that the sdist gives."""
    folder = tmp_path_factory.mktemp("from_sdist")
    (source,) = built.glob("*.tar.gz")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", folder, source),
    )
    return {"wheel": next(built.glob("*.whl")), "sdist": next(folder.glob("*.whl"))}


def install(wheel: Path, python: Path) -> None:
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)


def test_bare_environment(wheels, tmp_path):
    python = bare_environment(tmp_path / "environment")
    install(wheels["wheel"], python)
    assert run(python, "-I", "-c", SMOKE).startswith("version ")
    svit = python.with_name("svit")
    assert run(svit, "--version").startswith("svit ")
    assert "extra train " in run(svit, "info")
    for command, package, extra in (("train", "accelerate", "train"), ("mm-train", "mmengine", "mm")):
        done = subprocess.run([svit, command, "x"], capture_output=True, text=True)
        line = f"error: svit {command} needs {package}: pip install 'svit[{extra}]'"
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith(line), done.stderr


# What a README's reader types in an empty folder.
COMMANDS = """
svit train digits --cpu --set epochs=1 model=test_svit img_size=32 workers=0 batch_size=700 data_dir=digits
svit validate test_svit --checkpoint outputs/train/digits/best.safetensors --data-dir digits --workers 0
svit infer digits/val/one --model test_svit --checkpoint outputs/train/digits/best.safetensors
svit visualize $(ls digits/val/one/* | head -1) --model svit_nano_32.cifar10 --pretrained --out page
svit export test_svit --checkpoint outputs/train/digits/best.safetensors --format torch --static --out m.pt2
python -m svit flops test_svit
svit benchmark test_svit --img-size 32 --runs 1 --batch-size 1
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_commands(wheels, kind, tmp_path):
    """What a clone's user can do works without a clone, whichever of the two is installed."""
    extras = ["accelerate", "omegaconf", "tabulate", "tensorboard", "tqdm", "matplotlib", "fvcore", "scikit-learn"]
    python = bare_environment(tmp_path / "environment", *extras)
    install(wheels[kind], python)
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**ONE_THREAD, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    for line in COMMANDS.strip().splitlines():
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    with open(folder / "outputs/train/digits/log.csv") as file:
        assert len(list(csv.DictReader(file))) == 1
    names = {"digits", "outputs", "page", "m.pt2"}
    assert {path.name for path in folder.iterdir()} == names


def test_metadata(built):
    """Its long description is README.md for readers without the repository: no link or picture leads into that."""
    (archive,) = built.glob("*.whl")
    with zipfile.ZipFile(archive) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".dist-info/METADATA"))
        found = email.message_from_bytes(content.read(name))
    assert found["Description-Content-Type"] == "text/markdown"
    assert found["License"] == "MIT"
    assert found["License-File"] == "LICENSE"
    assert found["Project-URL"] == "Paper, https://arxiv.org/abs/2211.11167"
    text = found.get_payload(decode=True).decode()
    assert {link.partition(":")[0] for link in re.findall(r"\]\(([^)]*)\)", text)} == {"https"}
    assert len(re.findall(r"\]\((?!https:)", (ROOT / "README.md").read_text())) > 15
    assert "![" not in text
    assert "| classify an image, get feature maps | Quickstart |" in text
    # What an installed package can do comes first.
    assert text.index("pip install svit") < text.index("svit train digits") < text.index("make demo")


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_complete(built, kind):
    """Modules, recipes and configs are in the package, the configs inside; in the sdist what builds the kernels too."""
    patterns = ("*.py", "recipes/*.yaml", "README.md", "weights/*.safetensors")
    expected = {str(f.relative_to(ROOT)) for pattern in patterns for f in (ROOT / "svit").rglob(pattern)}
    inside = "svit/mm_configs" if kind == "wheel" else "mm_configs"
    expected |= {f"{inside}/{f.relative_to(ROOT / 'mm_configs')}" for f in (ROOT / "mm_configs").rglob("*.py")}
    if kind == "wheel":
        (archive,) = built.glob("*.whl")
        found = zipfile.ZipFile(archive).namelist()
    else:
        # From these a user builds the CUDA backend.
        expected |= {f"svit/ops/csrc/{f.name}" for f in (ROOT / "svit" / "ops" / "csrc").iterdir()} | {"setup.py"}
        (archive,) = built.glob("*.tar.gz")
        with tarfile.open(archive) as content:
            found = [name.partition("/")[2] for name in content.getnames()]
    assert len(expected) > 60
    assert expected <= set(found), expected - set(found)


def imports(file: Path) -> set[str]:
    """Full names of the modules and members that a file of the package imports, anywhere in it."""
    package = file.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, modules) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def test_imports_point_one_way():
    """cli -> training, adapters -> convert, profiling, visualize -> models -> layers -> ops."""
    apart = ["svit.files", "svit.names", "svit.images", "svit.folders", "svit.processes", "svit.published"]
    helpers = ["svit.convert", "svit.profiling", "svit.visualize"]
    top = ["svit.cli", "svit.training", "svit.adapters"]
    above = {
        "svit/training": ["svit.cli", "svit.adapters"],
        "svit/adapters": ["svit.cli", "svit.training"],
        "svit/ops": ["svit.layers", "svit.models", *top, *helpers],
        "svit/layers": ["svit.models", *top, *helpers],
        "svit/models": [*top, *helpers],
        **{f"{name.replace('.', '/')}.py": top for name in helpers},
        **{
            f"{name.replace('.', '/')}.py": ["svit.ops", "svit.layers", "svit.models", *top, *helpers] for name in apart
        },
    }
    for part, forbidden in above.items():
        files = [ROOT / part] if part.endswith(".py") else [*(ROOT / part).rglob("*.py")]
        assert files, part
        for file in files:
            assert not {name for name in imports(file) if inside(name, forbidden)}, file


def messages(file: Path) -> list[str]:
    """The strings of a file that a user may read: all but docstrings, which are the help of a command in svit/cli."""
    tree = ast.parse(file.read_text())
    kinds = (
        (ast.ClassDef, ast.FunctionDef) if file.parent.name == "cli" else (ast.Module, ast.ClassDef, ast.FunctionDef)
    )
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    docstrings = {id(statement.value) for statement in first if isinstance(statement, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in strings if id(node) not in docstrings]


def test_messages_name_nothing_that_the_wheel_lacks():
    pattern = re.compile(
        r"\b(tools|docs|tests|mm_configs)/|constraints\.txt|CONTRIBUTING|Makefile|\bmake (demo|test|docs)"
    )
    files = [*(ROOT / "svit").rglob("*.py"), *(ROOT / "mm_configs").rglob("*.py")]
    assert sum(len(messages(file)) for file in files) > 1000
    for file in files:
        found = [text for text in messages(file) if pattern.search(text)]
        assert not found, f"{file.relative_to(ROOT)}: {found}"


def test_the_package_knows_no_tool():
    tools = {
        file.stem for file in (ROOT / "tools").iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()
    }
    assert {"train", "gpu_check", "gpu"} <= tools
    for file in (ROOT / "svit").rglob("*.py"):
        assert not {name for name in imports(file) if inside(name, tools | {"tools"})}, file


def test_operators_know_each_other_by_their_public_functions():
    """`_dispatch` and what it stands on know no operator; kernels no reference and no other kernels."""
    ops = ROOT / "svit" / "ops"
    operators = {folder.name for folder in ops.iterdir() if (folder / "registration.py").exists()}
    assert operators == {"super_token", "depthwise", "attention", "conv_ffn"}
    folders = {f"svit.ops.{name}" for name in operators}
    shared = [file for file in ops.glob("*.py") if file.name not in ("__init__.py", "reference.py")]
    assert len(shared) > 6
    for file in shared:
        assert not {name for name in imports(file) if inside(name, folders)}, file
    for folder in operators:
        kernels = [file for name in ("triton", "cuda", "onednn") if (file := ops / folder / f"{name}.py").exists()]
        assert kernels
        for file in kernels:
            assert not {name for name in imports(file) if "reference" in name.split(".")}, file
            assert not {name for name in imports(file) if inside(name, folders - {f"svit.ops.{folder}"})}, file
        for file in (ops / folder).glob("*.py"):
            for name in imports(file):
                other = next((o for o in operators - {folder} if inside(name, [f"svit.ops.{o}"])), None)
                if other is not None:  # a public function, or the reference's in a reference
                    public = name.removeprefix(f"svit.ops.{other}.")
                    assert "." not in public or (file.stem == "reference" and public.startswith("reference.")), file
