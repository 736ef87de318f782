import io
import sys
import tarfile
from itertools import chain

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

import svit  # noqa: F401
from svit.folders import FolderError
from svit.images import UnreadableImageError
from svit.inference import Photo, collate, find_photos, infer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    overlay = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    return timm.create_model("test_svit", num_classes=4, pretrained_cfg_overlay=overlay).eval()


@pytest.fixture
def photos(tmp_path) -> list[Photo]:
    rng = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("no image")
    return find_photos([str(tmp_path)])


def test_records_are_of_each_photo_in_order(model, photos):
    records = list(chain(*infer(model, photos, resolve_data_config({}, model=model), top=2, batch_size=3)))
    assert [record["image"] for record in records] == [photo.name for photo in photos]
    assert records[3].keys() == {"image", "error"}
    pixels = torch.tensor(np.asarray(Image.open(photos[6].name))).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        shares = model((pixels - mean) / std).softmax(1)[0]
    best = shares.argsort(descending=True)[:2].tolist()
    expected = [{"class": str(n), "index": n, "probability": pytest.approx(shares[n].item(), abs=1e-5)} for n in best]
    assert records[6]["classes"] == expected


@pytest.mark.parametrize("start", [0, 2])
def test_processes_share_the_batches(model, photos, start):
    options = dict(preprocessing=resolve_data_config({}, model=model), features=True, batch_size=2, start=start)
    alone = list(chain(*infer(model, photos, **options)))
    assert [record["image"] for record in alone] == [photo.name for photo in photos[start:]]
    for world in (2, 3):
        steps = zip(*(infer(model, photos, rank=rank, world=world, **options) for rank in range(world)), strict=True)
        together = [record for step in steps for records in step for record in records]
        assert [record["image"] for record in together] == [record["image"] for record in alone]
        for record, same in zip(together, alone, strict=True):
            assert ("error" in record) == ("error" in same)
            if "features" in record:
                torch.testing.assert_close(record["features"], same["features"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.png", "no.png: no such file or folder"),
        ("no*.png", r"no\*.png: no file has such a name"),
        ("@no.txt", "@no.txt: the list cannot be read"),
        ("damaged.tar", "damaged.tar: expected an uncompressed tar file"),
        ("", "expected a file, folder or pattern, got an empty name"),
        ("@empty.txt", "@empty.txt: expected a list with a file on each line, got an empty one"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.tar").write_text("no tar file")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(FolderError, match=message):
        find_photos([source])


def test_a_list_on_an_empty_standard_input(monkeypatch):
    for stdin in (io.TextIOWrapper(io.BytesIO()), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(FolderError, match="^-: expected a list"):
            find_photos(["-"])


def test_a_list_that_starts_with_a_byte_order_mark(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.png\r\n", encoding="utf-8-sig")
    assert find_photos([f"@{tmp_path}/list.txt"]) == [Photo(f"{tmp_path}/a.png", f"{tmp_path}/a.png")]


def test_links_in_a_tar_file_are_what_they_lead_to(tmp_path):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    links = [
        ("a/hard.png", tarfile.LNKTYPE, "./a/red.png", (255, 0, 0)),
        ("b/soft.png", tarfile.SYMTYPE, "../a/blue.png", (0, 0, 255)),
        ("b/twice.png", tarfile.SYMTYPE, "soft.png", (0, 0, 255)),
        ("b/folder", tarfile.SYMTYPE, "../a", None),
        ("b/below.png", tarfile.SYMTYPE, "folder/blue.png", (0, 0, 255)),
        ("b/broken.png", tarfile.SYMTYPE, "none.png", None),
        ("b/early.png", tarfile.LNKTYPE, "a/blue.png", None),  # which comes later
        ("b/loop.png", tarfile.SYMTYPE, "loop.png", None),
    ]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "red.png", "./a/red.png")
        for name, kind, target, _ in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        tar.add(tmp_path / "blue.png", "a/blue.png")
        tar.add(tmp_path / "blue.png", "./a/red.png")  # a newer one, to which the hard link does not lead
    colours = [("./a/red.png", (255, 0, 0)), *((name, colour) for name, *_, colour in links if name.endswith("png"))]
    colours += [("a/blue.png", (0, 0, 255)), ("./a/red.png", (0, 0, 255))]
    photos = find_photos([f"{tmp_path}/shard.tar"])
    assert [photo.name for photo in photos] == [f"{tmp_path}/shard.tar/{name}" for name, _ in colours]
    for photo, (name, colour) in zip(photos, colours, strict=True):
        if colour:
            assert photo.read("RGB").getpixel((0, 0)) == colour
        else:
            with pytest.raises(UnreadableImageError, match=f"{name}: cannot be read .a link to no file in the tar"):
                photo.read("RGB")


def test_a_batch_that_was_read_elsewhere_is_one_tensor(model, photos):
    """Each tensor from another process is an open file, of which a process may have 1024 or fewer."""
    read = collate([(0, torch.ones(3, 2, 2)), (1, "no image"), (2, torch.zeros(3, 2, 2))])
    assert read.errors == {0: None, 1: "no image", 2: None}
    torch.testing.assert_close(read.images, torch.stack([torch.ones(3, 2, 2), torch.zeros(3, 2, 2)]))
    assert collate([(3, "no image")]).images is None
    options = dict(preprocessing=resolve_data_config({}, model=model), batch_size=3)
    assert list(infer(model, photos, workers=2, **options)) == list(infer(model, photos, **options))
