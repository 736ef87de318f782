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
    for part in ("1.jpg (not an image)", "3.png (not an image)", "4.png (no such file)"):
        assert f"{folder}/{part}" in message


def test_only_the_first_are_named(folder):
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(ImageError, match=r"8 of the images .*/4\.jpg \(not an image\) \.\.\.$"):
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
    with pytest.raises(ImageError, match=r"1 of the images .*2\.jpg \(not an image\)"):
        check_images(dataset)
