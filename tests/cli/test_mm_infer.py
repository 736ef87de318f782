"""mm_infer on what users feed it, with a small segmentor and a small detector of random weights."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from helpers import needs_mm

needs_mm()

from mmengine.registry import MODELS  # noqa: E402

from svit.adapters import find_config, load_config, to_safetensors  # noqa: E402
from svit.cli import command  # noqa: E402

SEGMENTOR = """
_base_ = {base!r}
model = dict(backbone=dict(arch="test_svit"), neck=dict(in_channels=[8, 16, 24, 32]))
"""
DETECTOR = """
_base_ = {base!r}
model = dict(
    backbone=dict(arch="test_svit"),
    neck=dict(in_channels=[8, 16, 24, 32]),
    roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)),
    test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5), rpn=dict(max_per_img=20)),
)
test_pipeline = [
    dict(type="LoadImageFromFile", color_type="color_ignore_orientation"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
test_dataloader = dict(dataset=dict(metainfo=dict(classes=("crane", "crane")), pipeline=test_pipeline))
"""
KINDS = {
    "segmentor": (SEGMENTOR, "svit-nano_fpn_1xb8-1k_camvid-256x256"),
    "detector": (DETECTOR, "mask-rcnn_svit-nano_fpn_1x_coco"),
}


def write_model(folder: Path, kind: str, classes: tuple[str, ...]) -> tuple[str, str]:
    """The paths of a config and of a checkpoint with these classes."""
    text, base = KINDS[kind]
    config, weights = folder / f"{kind}.py", folder / f"{kind}.pth"
    config.write_text(text.format(base=str(find_config(base))))
    torch.manual_seed(0)
    model = MODELS.build(load_config(str(config)).model)
    palette = [[20 * i, 255 - 20 * i, 99] for i in range(len(classes))]
    meta = dict(dataset_meta=dict(classes=classes, palette=palette))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), weights)
    return str(config), str(weights)


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory) -> tuple[str, str]:
    return write_model(tmp_path_factory.mktemp("segmentor"), "segmentor", tuple(f"class {i}" for i in range(11)))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> tuple[str, str]:
    return write_model(tmp_path_factory.mktemp("detector"), "detector", ("crane", "crane"))


def photo(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A picture whose quarters differ, so that turning it shows."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def shares(out: str) -> list[str]:
    """What was found, without the names of the files."""
    return [line.partition(": ")[2] for line in out.splitlines() if " -> " in line]


def test_unreadable_files_among_good_ones(segmentor, tmp_path, capsys):
    """One is reported and counted; the rest is drawn; the exit status says so."""
    folder = tmp_path / "photos"
    (folder / "2024").mkdir(parents=True)
    photo().save(folder / "a.jpg")
    whole = (folder / "a.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 30])
    (folder / "c.jpg").write_text("no image")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")  # of macOS
    (folder / "d.webp").symlink_to("nowhere.webp")
    (folder / "notes.txt").write_text("no image, and no name of one")
    photo().save(folder / "2024/z.png")
    out = tmp_path / "out"
    assert command("mm-infer")([*segmentor, str(folder), "--out", str(out)]) == 1
    told = capsys.readouterr()
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == ["2024/z.png", "a.png"]
    for name, reason in (
        ("b.jpg", "cannot be read .*truncated"),
        ("c.jpg", "cannot be read .not an image of a format that Pillow reads"),
        ("d.webp", "cannot be read .no such file"),
    ):
        assert re.search(f"warning: {folder}/{name}: {reason}", told.err)
    assert f"warning: {folder}: left out 1 hidden .jpg, 1 .txt" in told.err
    assert "error: 3 of 5 images could not be read; the others are drawn" in told.err
    assert "Traceback" not in told.err
    assert len(shares(told.out)) == 2
    assert command("mm-infer")([*segmentor, str(folder / "a.jpg"), str(folder / "2024"), "--out", str(out)]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_none_can_be_read(kind, request, tmp_path, capsys):
    model = request.getfixturevalue(kind)
    (tmp_path / "c.jpg").write_text("no image")
    assert command("mm-infer")([*model, str(tmp_path / "c.jpg"), "--out", str(tmp_path / "out")]) == 1
    assert "error: no image to draw in: " in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command("mm-infer")([*model, str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 1
    assert f"error: {tmp_path}/empty: no images in this folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_upright(kind, request, tmp_path, capsys):
    """A photo stored sideways is seen and drawn as a person sees it."""
    model = request.getfixturevalue(kind)
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    upright = photo()
    upright.save(folder / "1.png")
    for orientation, turn in ((3, "ROTATE_180"), (6, "ROTATE_90"), (7, "TRANSVERSE"), (8, "ROTATE_270")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(Image.Transpose[turn])
        stored.save(folder / f"{orientation}.png", exif=exif)
    for score in ("0", "2"):  # the second draws nothing of a detector's, whose colours vary
        assert command("mm-infer")([*model, str(folder), "--out", str(out), "--score", score]) == 0
        found = shares(capsys.readouterr().out)
        assert len(found) == 5
        assert len(set(found)) == 1
    drawn = [np.asarray(Image.open(file)) for file in sorted(out.iterdir())]
    assert drawn[0].shape == (32, 48, 3)
    assert all(np.array_equal(picture, drawn[0]) for picture in drawn)
    if kind == "detector":
        assert np.array_equal(drawn[0], np.asarray(upright))


def test_depth_and_format(segmentor, tmp_path, capsys):
    """16 bits, floats and formats that OpenCV does not read look like their twins of 8 bits."""
    grey = np.linspace(0, 255, 48 * 32).round().astype(np.uint8).reshape(32, 48)
    Image.fromarray(grey).save(tmp_path / "1.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "2.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "3.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "4.tiff")
    Image.fromarray(grey).save(tmp_path / "5.pcx")
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "6.webp", lossless=True)
    out = tmp_path / "out"
    assert command("mm-infer")([*segmentor, str(tmp_path), "--out", str(out)]) == 0
    assert len(set(shares(capsys.readouterr().out))) == 1
    drawn = [np.asarray(Image.open(out / f"{i}.png")) for i in range(1, 7)]
    assert all(np.array_equal(picture, drawn[0]) for picture in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors(kind, request, tmp_path, capsys):
    """The same finds as of mmengine's file, whose weights and classes it holds."""
    config, weights = request.getfixturevalue(kind)
    photo().save(tmp_path / "a.png")
    to_safetensors(weights, tmp_path / "model.safetensors", torch.float32)
    for checkpoint in (weights, str(tmp_path / "model.safetensors")):
        arguments = [config, checkpoint, str(tmp_path / "a.png"), "--out", str(tmp_path / "found.png"), "--score", "0"]
        assert command("mm-infer")([*arguments, "--device", "cpu"]) == 0
    first, second = shares(capsys.readouterr().out)
    assert first == second != ""
    assert ("crane" if kind == "detector" else "class") in first


def test_blood_cells(tmp_path, capsys):
    """The detector that comes with the package, by its name: four red cells, a white one and a platelet, all drawn."""
    image = Image.new("RGB", (640, 480), (225, 215, 205))
    draw = ImageDraw.Draw(image)
    for x, y in ((100, 100), (500, 120), (120, 380), (520, 380)):
        draw.ellipse((x - 50, y - 50, x + 50, y + 50), (205, 150, 150))
        draw.ellipse((x - 18, y - 18, x + 18, y + 18), (222, 200, 195))
    draw.ellipse((235, 155, 405, 325), (205, 180, 205))
    draw.ellipse((260, 190, 350, 280), (110, 80, 190))
    draw.ellipse((310, 210, 380, 300), (120, 90, 200))
    draw.ellipse((225, 58, 255, 86), (150, 130, 190))
    image.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "a.png")
    name = "retinanet_svit-nano_fpn_bccd"
    arguments = [name, name, str(tmp_path / "a.png"), "--out", str(tmp_path / "found.png"), "--score", "0.5"]
    assert command("mm-infer")([*arguments, "--device", "cpu"]) == 0
    assert shares(capsys.readouterr().out) == ["4 RBC, 1 WBC, 1 Platelets"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_without_names_of_classes(kind, request, tmp_path, capsys):
    """The config names them; MMDetection would take COCO's, MMSegmentation those of Cityscapes."""
    config, weights = request.getfixturevalue(kind)
    photo().save(tmp_path / "a.png")
    torch.save({"state_dict": torch.load(weights, weights_only=False)["state_dict"]}, tmp_path / "bare.pth")
    changes = "test_dataloader.dataset.metainfo.classes=" + ",".join(f"kind{i}" for i in range(11))
    if kind == "detector":
        changes = "test_dataloader.dataset.metainfo.classes=kind0,kind1"
    arguments = [config, str(tmp_path / "bare.pth"), str(tmp_path / "a.png"), "--out", str(tmp_path / "found.png")]
    options = ["--score", "0", "--device", "cpu", "--cfg-options", changes]
    assert command("mm-infer")([*arguments, *options]) == 0
    (found,) = shares(capsys.readouterr().out)
    assert re.fullmatch(r"(\d+%? kind\d+(, )?)+", found), found


def test_two_classes_of_the_same_name(detector, tmp_path, capsys):
    """Each keeps its own count."""
    photo((96, 64)).save(tmp_path / "a.png")
    assert (
        command("mm-infer")([*detector, str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), "--score", "0"]) == 0
    )
    (found,) = shares(capsys.readouterr().out)
    counts = {name: int(count) for count, name in (part.split(" ", 1) for part in found.split(", "))}
    assert set(counts) <= {"crane (0)", "crane (1)"}
    assert sum(counts.values()) == 5


def test_a_picture_that_cannot_be_written(segmentor, tmp_path, capsys):
    photo().save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").mkdir()
    assert command("mm-infer")([*segmentor, str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 1
    assert f"error: {tmp_path}/out/a.png: cannot be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]


def test_an_image_that_the_model_does_not_take(detector, tmp_path, capsys):
    """One pixel wide, it would be resized to less."""
    photo((1, 2000)).save(tmp_path / "a.png")
    photo((96, 64)).save(tmp_path / "b.png")
    assert command("mm-infer")([*detector, str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "a.png: the config's model does not take 1 x 2000 pixels (" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--score", "nan"], "--score: expected a number, got nan"),
        (["--score", "half"], "--score: expected a number, got half"),
        (["--cfg-options", "foo"], "--cfg-options: expected KEY=VALUE, got foo"),
    ],
)
def test_arguments_out_of_range(capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        command("mm-infer")(["config.py", "weights.pth", "a.png", "--out", "out", *option])
    assert message in capsys.readouterr().err


def test_an_image_without_a_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        command("mm-infer")(["config.py", "weights.pth", "", "--out", "out"])
    assert "IMAGE: expected a path, got an empty name" in capsys.readouterr().err
