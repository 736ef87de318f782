"""Makes what the sources of the page lack: the model, onnxruntime-web and the samples.

    python docs/explorer/build.py build/explorer
    cp -R build/explorer/page/. site/explorer    # of the site that MkDocs has built

The folder gets the packages of npm, and `page`. Needs the extras `docs` and `export`, and npm.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
from skimage import data

from svit.cli import command
from svit.images import read_image

SOURCES = Path(__file__).parent
# Names under which every file server knows the type of the file.
RUNTIME = {
    "ort.wasm.min.mjs": "ort.js",
    "ort-wasm-simd-threaded.mjs": "ort-wasm.js",
    "ort-wasm-simd-threaded.wasm": "ort-wasm.wasm",
}
SAMPLES = {
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "astronaut": "astronaut.png",
    "rocket": "rocket.jpg",
    "hubble": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
}


def build(packages: Path) -> None:
    """Writes to `packages`/page; `packages` gets node_modules."""
    folder = packages / "page"
    folder.mkdir(parents=True, exist_ok=True)
    add_runtime(folder, packages)
    add_model(folder)
    add_samples(folder / "samples")


def add_runtime(folder: Path, packages: Path) -> None:
    if shutil.which("npm") is None:
        sys.exit("explorer: needs npm, which comes with Node.js 18 or later: apt-get install npm")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(SOURCES / name, packages)
    subprocess.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=packages, check=True)
    for name, new in RUNTIME.items():
        shutil.copy(packages / "node_modules" / "onnxruntime-web" / "dist" / name, folder / new)


def add_model(folder: Path) -> None:
    file = folder / "model.onnx"
    options = ["--outputs", "super-tokens", "--out", str(file)]
    if status := command("export")(["svit_nano.photos20", *options]):
        sys.exit(status)
    # The JavaScript interface of ONNX Runtime does not show a file's metadata.
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(file).metadata_props}
    (folder / "model.json").write_text(json.dumps(metadata))


def add_samples(folder: Path) -> None:
    """Those that scikit-image's package holds, at most 640 pixels wide and high."""
    folder.mkdir(exist_ok=True)
    for name, file in SAMPLES.items():
        photo = read_image(Path(data.__file__).parent / file)
        photo.thumbnail((640, 640))
        photo.save(folder / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
