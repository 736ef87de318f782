import io
import os
import re
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers import missing
from svit.checkpoints import save_model
from svit.cli import command
from svit.cli.visualize import input_size
from svit.visualize import draw_attention

main = command("visualize")

FIGURES = ("super-tokens", "attention", "rounds-of-association")


@pytest.fixture(autouse=True)
def pictures_can_be_drawn():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing("matplotlib")


@pytest.fixture
def photo(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(tmp_path / "a photo & more %20.png")
    return tmp_path / "a photo & more %20.png"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(1)
    model = timm.create_model("test_svit", num_classes=3)
    save_model(tmp_path / "small.safetensors", model, "test_svit", classes=["<cat>", "dog", "coffee cup"])
    return tmp_path / "small.safetensors"


def test_a_page_and_its_pictures(photo, checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "page"
    assert main([str(photo), "--model", "test_svit", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    pictures = {f"{photo.stem}-{figure}.png" for figure in FIGURES}
    assert {file.name for file in out.iterdir()} == {*pictures, "index.html"}
    for picture in pictures:
        with Image.open(out / picture) as image:
            assert image.format == "PNG"
            assert np.asarray(image.convert("L")).std() > 10

    page = (out / "index.html").read_text("utf-8")
    assert {unquote(name) for name in re.findall(r'(?:src|href)="([^"]*)"', page)} == pictures
    assert "Super tokens of test_svit" in page
    assert "Weights: small.safetensors" in page
    assert "<h2>a photo &amp; more %20.png</h2>" in page
    assert re.search(r"64 x 96 pixels, classified as .*&lt;cat&gt; \(\d+\.\d%\)", page)
    assert "<cat>" not in page
    shares = [float(share) for share in re.findall(r"\((\d+\.\d)%\)", page)]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert capsys.readouterr().out.endswith(f"wrote {out / 'index.html'}\n")


def test_several_images_random_weights_and_options(photo, tmp_path, capsys):
    other = tmp_path / "other.jpg"
    Image.new("L", (40, 40), 128).save(other)
    options = ["--img-size", "40", "56", "--n-iter", "2", "--point", "1", "0", "--format", "webp", "--device", "cpu"]
    out = ["--out", str(tmp_path / "out")]
    assert main([str(photo), str(other), "--model", "svit_nano_32", *options, *out]) == 0
    names = {f"{stem}-{figure}.webp" for stem in (photo.stem, "other") for figure in FIGURES}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, "index.html"}
    with Image.open(tmp_path / "out" / "other-rounds-of-association.webp") as image:
        assert image.format == "WEBP"
        assert image.width == pytest.approx(2 * image.height, rel=0.2)  # two square panels
    assert "Weights: random" in (tmp_path / "out" / "index.html").read_text("utf-8")
    assert capsys.readouterr().out.count("seen at 40 x 56 pixels, classified as ") == 2


@pytest.mark.parametrize(
    ("asked", "size"),
    [((32,), (32, 48)), ((48,), (48, 80)), ((40,), (32, 64)), ((5,), (16, 16)), ((33, 70), (33, 70))],
)
def test_input_size_covers_the_image_with_whole_pixels(asked, size):
    assert input_size(Image.new("RGB", (450, 290)), asked, 16) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nosuch.jpg"], "nosuch.jpg: no such image"),
        (["photo.png", "nosuch.jpg"], "nosuch.jpg: no such image"),
        (["damaged.png"], "damaged.png: cannot be read (not an image"),
        (["cut.png"], "cut.png: cannot be read ("),
        (["photo.png", "photo.jpg"], "photo.png: another image has the same name"),
        (["photo.png", "--point", "0.5", "1.5"], "point: expected two fractions between 0 and 1, got 0.5 1.5"),
        (["photo.png", "--model", "svit_smal"], "model: no model 'svit_smal' in timm; did you mean svit_small"),
        (["photo.png", "--model", "test_resnet"], "test_resnet: has no super-token attention; these have: svit_base, "),
        (["photo.png", "--checkpoint", "nosuch.safetensors"], "nosuch.safetensors: no such file"),
        (["photo.png", "--checkpoint", "damaged.png"], "damaged.png: cannot be read"),
        (["photo.png", "--device", "nosuch"], "--device: nosuch cannot be used: "),
        (["photo.png", "--out", "photo.png"], "--out: photo.png cannot be written to: File exists"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((48, 48), 50).save("photo.png")
    Path("photo.jpg").write_bytes(Path("photo.png").read_bytes())
    Path("damaged.png").write_bytes(b"no image")
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:-500])
    before = sorted(tmp_path.rglob("*"))
    # Of an option that is given twice the last one counts.
    assert main(["--model", "test_svit", "--out", "out", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n-iter", "0"], "--n-iter: expected at least 1, got 0"),
        (["--img-size", "32", "0"], "--img-size: expected one or two positive whole numbers, got 32 0"),
        (["--img-size", "1", "2", "3"], "--img-size: expected one or two positive whole numbers, got 1 2 3"),
    ],
)
def test_numbers_out_of_range(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["photo.png", "--model", "test_svit", *options])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"svit visualize: error: argument {message}\n")


def test_images_that_cannot_be_read_are_named_and_the_others_drawn(photo, tmp_path, capsys):
    (tmp_path / "damaged.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:-500])
    (tmp_path / "link.png").symlink_to("nowhere")
    Image.new("RGB", (1, 21)).save(tmp_path / "line.png")
    bad = [str(tmp_path / f"{name}.png") for name in ("damaged", "cut", "link", "line")]
    files = [bad[0], str(photo), *bad[1:]]
    options = ["--model", "test_svit", "--out", str(tmp_path / "out")]
    assert main([*files, *options]) == 1
    *errors, last = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in errors[:3]] == [f"error: {file}: cannot be read" for file in bad[:3]]
    assert errors[3:] == [f"error: {bad[3]}: cannot be drawn, 21 x 1 pixels; expected sides up to 1 to 20"]
    assert last == "error: 4 of 5 images cannot be read"
    names = {f"{photo.stem}-{figure}.png" for figure in FIGURES}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, "index.html"}
    assert (tmp_path / "out" / "index.html").read_text("utf-8").count("<section>") == 1

    options[-1] = str(tmp_path / "none")
    assert main([*bad[:2], *options]) == 1
    assert capsys.readouterr().err.endswith("error: 2 of 2 images cannot be read\n")
    assert not (tmp_path / "none").exists()


def test_a_model_whose_cells_are_pixels(photo, tmp_path, capsys):
    cells = {"stoken_size": [1, 1, 1, 1]}
    model = timm.create_model("test_svit", num_classes=3, **cells)
    save_model(tmp_path / "a.safetensors", model, "test_svit", recipe={"model_args": cells})
    options = ["--model", "test_svit", "--checkpoint", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "out")]
    assert main([str(photo), *options]) == 1
    assert "test_svit: expected at least one layer with cells of more than one pixel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_text_is_drawn_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # takes it, as that of a tool does
    name = os.fsdecode(b"caf\xe9")
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    (tmp_path / "photo.png").rename(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    assert main([str(tmp_path / f"{name}.png"), "--model", "test_svit", "--out", str(out)]) == 0
    assert (out / f"{name}-attention.png").is_file()
    page = (out / "index.html").read_text("utf-8")
    assert 'src="caf%E9-attention.png"' in page
    assert r"<h2>caf\udce9.png</h2>" in page


def test_an_error_on_the_way_keeps_the_old_page(photo, tmp_path, monkeypatch, capsys):
    other = photo.with_name("other.png")
    other.write_bytes(photo.read_bytes())
    command = [str(photo), str(other), "--model", "test_svit", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    room = [draw_attention]  # for the pictures of the first image

    def draw(*args):
        if not room:
            raise OSError(28, "No space left on device")
        return room.pop()(*args)

    monkeypatch.setattr("svit.cli.visualize.draw_attention", draw)
    assert main([*command, "--point", "0.1", "0.1"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_picture_does_not_replace_an_image(photo, tmp_path, capsys):
    """Figures lie beside the images, and an image has the name of the other's figure."""
    taken = photo.with_name(f"{photo.stem}-attention.png")
    taken.write_bytes(photo.read_bytes())
    assert main([str(photo), str(taken), "--model", "test_svit", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"--out: expected another place than the images', got {tmp_path}, where {taken.name} is one")
    assert taken.read_bytes() == photo.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {photo.name, taken.name}
