import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import needs_mm

needs_mm()

from mmcv.transforms import Compose, LoadImageFromFile  # noqa: E402
from mmdet.datasets import CocoDataset  # noqa: E402
from mmseg.datasets import BaseSegDataset  # noqa: E402

from svit.adapters.images import SAMPLE, ImageError, check_images  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.jpg")
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    return tmp_path


def masks(folder) -> BaseSegDataset:
    return BaseSegDataset(data_root=str(folder), data_prefix=dict(img_path="", seg_map_path=""))


def test_good(folder):
    assert len(masks(folder)) == 8
    check_images(masks(folder))


def test_bad(folder):
    (folder / "1.jpg").write_bytes(b"")
    (folder / "3.png").write_text("no picture")
    (folder / "4.png").unlink()
    with pytest.raises(ImageError) as error:
        check_images(masks(folder))
    message = str(error.value)
    assert message.startswith("3 of the images cannot be read")
    for part in (
        "1.jpg (not an image, or a damaged one)",
        "3.png (not an image, or a damaged one)",
        "4.png (no such file)",
    ):
        assert f"{folder}/{part}" in message


def test_only_the_first_are_named(folder):
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"8 of the images .*/4\.jpg \(not an image, or a damaged one\) \.\.\.$"):
        check_images(masks(folder))


def test_cut_short(folder):
    """Only the header is read, unless asked for more."""
    Image.effect_noise((64, 64), 50).save(folder / "2.jpg")
    Image.new("L", (64, 64)).save(folder / "2.png")
    whole = (folder / "2.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(whole[: len(whole) // 2])
    check_images(masks(folder))
    with pytest.raises(ImageError, match=r"1 of the images .*2\.jpg"):
        check_images(masks(folder), decode=True)


def test_processes_share_the_work(folder, monkeypatch):
    """Each opens its part and all learn of what any has found."""
    (folder / "0.jpg").write_bytes(b"")
    (folder / "1.jpg").write_bytes(b"")
    elsewhere = {f"{folder}/0.jpg": "not an image"}
    monkeypatch.setattr("svit.adapters.images.get_dist_info", lambda: (1, 2))
    monkeypatch.setattr("svit.adapters.images.all_gather_object", lambda own: [elsewhere, own])
    with pytest.raises(ImageError, match="2 of the images"):
        check_images(masks(folder))
    elsewhere.clear()
    with pytest.raises(ImageError, match=r"1 of the images .*/1\.jpg"):
        check_images(masks(folder))


def test_coco(folder):
    images = [dict(id=i, file_name=f"{i}.jpg", width=4, height=4) for i in (1, 2)]
    content = dict(images=images, annotations=[], categories=[dict(id=1, name="coin")])
    (folder / "ann.json").write_text(json.dumps(content))
    dataset = CocoDataset(
        data_root=str(folder),
        ann_file="ann.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=("coin",)),
        test_mode=True,
    )
    check_images(dataset)
    (folder / "2.jpg").write_bytes(b"GIF89")
    with pytest.raises(ImageError, match=r"1 of the images .*2\.jpg \(not an image, or a damaged one\)"):
        check_images(dataset)


class OneImage:
    """A data set of one image that is loaded as `loader` says, with these annotations."""

    def __init__(self, loader: LoadImageFromFile, **info) -> None:
        self.pipeline = Compose([loader])
        self.info = info

    def __len__(self) -> int:
        return 1

    def get_data_info(self, i: int) -> dict:
        return self.info


WIDTH, HEIGHT = 6, 4
COLOR_TYPES = ["color", "grayscale", "color_ignore_orientation", "unchanged"]


def photo(file: Path, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (WIDTH, HEIGHT)).save(file, exif=exif)
    return file


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("color_type", COLOR_TYPES)
def test_orientation_and_annotated_size(tmp_path, color_type, backend):
    """The size that counts is the one in which mmcv loads the image, which it turns for some color types alone."""
    loader = LoadImageFromFile(color_type=color_type, imdecode_backend=backend)
    turned = set()
    for suffix, orientation in itertools.product(["jpg", "png", "webp", "tif", "bmp"], range(1, 9)):
        name = f"{orientation}.{suffix}"
        info = dict(img_path=str(photo(tmp_path / name, orientation)))
        height, width = loader(dict(info))["img_shape"]
        turned |= {name} if height > width else set()
        check_images(OneImage(loader, **info, width=width, height=height))
        message = f"{name} .the image is loaded as {width} x {height}, its annotations are of {height} x {width} pixels"
        with pytest.raises(ImageError, match=message):
            check_images(OneImage(loader, **info, width=height, height=width))
    assert ("6.jpg" in turned) == (color_type in ("color", "grayscale"))


@pytest.mark.parametrize(
    ("color_type", "size", "message"),
    [
        ("color", (6, 4), "its EXIF orientation turns it: set color_type='color_ignore_orientation' in the pipelines'"),
        ("color_ignore_orientation", (4, 6), "its EXIF orientation would turn it: set color_type='color' in the"),
        ("color_ignore_orientation", (12, 8), r"the image is loaded as 6 x 4, its annotations are of 12 x 8 pixels\)$"),
    ],
)
def test_what_to_do_about_the_size(tmp_path, color_type, size, message):
    info = dict(img_path=str(photo(tmp_path / "x.jpg", 6)), width=size[0], height=size[1])
    with pytest.raises(ImageError, match=message):
        check_images(OneImage(LoadImageFromFile(color_type=color_type), **info))


def test_what_the_loader_does_not_read(tmp_path):
    """Pillow opens more than OpenCV, which is what loads the images unless the config says otherwise."""
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "x.pcx")
    Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)).save(tmp_path / "x.tif")
    for name, message in (("x.pcx", "PCX, which OpenCV does not read"), ("x.tif", "a TIFF of 32 bits, which OpenCV")):
        info = dict(img_path=str(tmp_path / name), width=WIDTH, height=HEIGHT)
        with pytest.raises(ImageError, match=message):
            check_images(OneImage(LoadImageFromFile(), **info))
        with pytest.raises((AssertionError, cv2.error)):  # without the check, in the midst of the training
            LoadImageFromFile()(dict(info))
    check_images(OneImage(LoadImageFromFile(imdecode_backend="pillow"), **dict(info, img_path=tmp_path / "x.pcx")))
    check_images(OneImage(LoadImageFromFile(color_type="unchanged"), **info))  # as it is stored


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_depth(tmp_path, suffix):
    """Of 16 bits OpenCV takes the upper 8; mmcv by Pillow would make all above 255 white."""
    grey = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"x.{suffix}")
    info = dict(img_path=str(tmp_path / f"x.{suffix}"), width=WIDTH, height=HEIGHT)
    check_images(OneImage(LoadImageFromFile(), **info))
    assert np.array_equal(LoadImageFromFile(color_type="grayscale")(dict(info))["img"], grey)
    with pytest.raises(ImageError, match="more than 8 bits, which imdecode_backend='pillow' makes white"):
        check_images(OneImage(LoadImageFromFile(imdecode_backend="pillow"), **info))


def camvid(folder: Path, **options) -> BaseSegDataset:
    """Eleven classes, stored pixels."""
    loader = LoadImageFromFile(color_type=options.pop("color_type", "color_ignore_orientation"))
    names = tuple(f"class {i}" for i in range(11))
    prefix = dict(img_path="", seg_map_path="")
    found = BaseSegDataset(
        data_root=str(folder), data_prefix=prefix, metainfo=dict(classes=names), lazy_init=True, **options
    )
    found.full_init()
    found.pipeline = Compose([loader])
    return found


def pair(folder: Path, name: str, mask: Image.Image, orientation: int = 1) -> None:
    photo(folder / f"{name}.jpg", orientation)
    mask.save(folder / f"{name}.png")


@pytest.mark.parametrize("color_type", COLOR_TYPES)
def test_orientation_and_size_of_the_mask(tmp_path, color_type):
    pair(tmp_path, "a", Image.new("L", (1, 1)))
    dataset = camvid(tmp_path, color_type=color_type)
    for orientation in range(1, 9):
        info = dict(img_path=str(photo(tmp_path / "a.jpg", orientation)))
        height, width = LoadImageFromFile(color_type=color_type)(info)["img_shape"]
        Image.new("L", (width, height), 3).save(tmp_path / "a.png")
        check_images(dataset)
        Image.new("L", (height, width), 3).save(tmp_path / "a.png")
        message = f"a.png .the image is loaded as {width} x {height}, this mask is {height} x {width} pixels"
        with pytest.raises(ImageError, match=message):
            check_images(dataset)


def mask_of(*values: int) -> Image.Image:
    return Image.fromarray(np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (mask_of(0, 10, 255), None),
        (mask_of(3), None),
        (mask_of(0, 10, 255).convert("P"), None),
        (mask_of(0, 1).convert("I"), None),
        (
            mask_of(0, 255).convert("RGB"),
            r"a.png \(a mask in colours \(mode RGB\); expected one channel of class numbers, 0..10 or 255 = ignore\)",
        ),
        (mask_of(0, 1).convert("RGBA"), r"a mask in colours \(mode RGBA\)"),
        (mask_of(0, 1).convert("LA"), r"a mask in colours \(mode LA\)"),
        (mask_of(0, 200), r"a.png \(a mask of values 0 and 200; expected 0..10 or 255 = ignore\)"),
        (Image.fromarray(np.full((HEIGHT, WIDTH), 256, np.uint16)), "a mask of value 256; expected 0..10 or 255"),
        (mask_of(0, 255), r"masks in .*: nothing but values 0 and 255; expected 0..10 or 255 = ignore \(in the 1 loo"),
        (mask_of(255), "nothing but value 255; expected 0..10"),
    ],
)
def test_masks(tmp_path, mask, message):
    pair(tmp_path, "a", mask)
    if message is None:
        check_images(camvid(tmp_path))
    else:
        with pytest.raises(ImageError, match=message):
            check_images(camvid(tmp_path))


def test_masks_whose_zero_is_no_class(tmp_path):
    pair(tmp_path, "a", mask_of(0, 11, 255))
    check_images(camvid(tmp_path, reduce_zero_label=True))
    pair(tmp_path, "b", mask_of(0, 12))
    with pytest.raises(ImageError, match="b.png .a mask of values 0 and 12; expected 1..11 or 0, 255 = ignore"):
        check_images(camvid(tmp_path, reduce_zero_label=True))


def test_palette_of_colours(tmp_path):
    """As VOC's masks: a palette's indices are the classes."""
    mask = mask_of(0, 1, 255)
    mask.putpalette(list(range(256)) * 3)
    pair(tmp_path, "a", mask)
    check_images(camvid(tmp_path))


def test_sample_of_the_masks(tmp_path):
    """Pixels of SAMPLE masks are looked at, evenly spread; of all masks with decode=True."""
    for i in range(3 * SAMPLE):
        pair(tmp_path, f"{i:03}", mask_of(0, 1))
    check_images(camvid(tmp_path))
    mask_of(0, 99).save(tmp_path / "004.png")
    check_images(camvid(tmp_path))
    with pytest.raises(ImageError, match="1 of the images .*004.png"):
        check_images(camvid(tmp_path), decode=True)
    mask_of(0, 99).save(tmp_path / "006.png")
    with pytest.raises(ImageError, match="1 of the images .*006.png"):
        check_images(camvid(tmp_path))
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "007.png")  # seen by the header
    with pytest.raises(ImageError, match="2 of the images .*006.png .*007.png"):
        check_images(camvid(tmp_path))


@settings(max_examples=100, deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I", "I;16", "F"]),
    suffix=st.sampled_from(["jpg", "png", "bmp", "tif", "webp", "gif", "pcx", "tga", "ppm", "ico", "sgi", "jp2"]),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    orientation=st.integers(0, 9),
    color_type=st.sampled_from(COLOR_TYPES),
    backend=st.sampled_from(["cv2", "pillow"]),
    cut=st.sampled_from([None, None, None, 0.5, 0.9]),
)
def test_what_passes_is_loaded_in_its_size(tmp_path_factory, mode, suffix, size, orientation, color_type, backend, cut):
    """Read to its end, an image that passes is loaded by mmcv in the size of its annotations."""
    file = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    try:
        Image.new(mode, size).save(file, exif=exif)
    except (OSError, KeyError, ValueError, SystemError):  # a format that has no such mode
        assume(False)
    if cut:
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * cut)])
    loader = LoadImageFromFile(color_type=color_type, imdecode_backend=backend)
    try:
        height, width = loader(dict(img_path=str(file)))["img_shape"]
    except Exception:  # anything
        height, width = size[::-1]
        loads = False
    else:
        loads = True
    message = None
    try:
        check_images(OneImage(loader, img_path=str(file), width=width, height=height), decode=True)
    except ImageError as error:
        message = str(error)
    # OpenCV fills up what is cut short, Pillow does not.
    assert cut or loads == (message is None) or "makes white" in message
    assert loads or message
