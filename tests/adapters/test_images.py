import json

import pytest
from PIL import Image

from helpers import needs_mm

needs_mm()

from mmdet.datasets import CocoDataset  # noqa: E402
from mmseg.datasets import BaseSegDataset  # noqa: E402

from svit.adapters.images import ImageError, check_images  # noqa: E402


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
