"""tools/infer.py: classes of images as a direct computation finds them, in three formats; what cannot be read."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors import safe_open

import image_data
from helpers import ONE_THREAD, TWO_PROCESSES
from svit import inference
from svit.cli import command
from svit.folders import find_images

main = command("infer")


@pytest.fixture
def run(digits, capsys):
    """Classifies as the command line says; exit status, output and errors."""

    def run(*arguments, model="test_svit", checkpoint=digits.checkpoint):
        status = main([*map(str, arguments), "--model", model, "--checkpoint", str(checkpoint)])
        return status, *capsys.readouterr()

    return run


@torch.no_grad()
def expected(model, files, images, top) -> list[dict]:
    best = model(images).softmax(1).sort(1, descending=True)
    return [
        {
            "image": str(file),
            "classes": [
                {"class": image_data.CLASSES[c], "index": c, "probability": pytest.approx(p, abs=1e-4)}
                for c, p in list(zip(row.tolist(), shares.tolist(), strict=True))[:top]
            ],
        }
        for file, row, shares in zip(files, best.indices, best.values, strict=True)
    ]


@pytest.mark.parametrize("top", [2, 9])
def test_the_classes_of_a_folder_as_json(digits, run, see, top):
    status, out, err = run(digits.root / "val", "--top", top, "--format", "json", "--batch-size", 7)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found == expected(digits.model, digits.files, see(digits.files), top)
    assert len({image["classes"][0]["class"] for image in found}) > 2


def test_another_size(digits, run, see):
    files = digits.files[::9]
    _, out, _ = run(*files, "--img-size", 24, "--format", "json")
    assert json.loads(out) == expected(digits.model, files, see(files, size=24, edge=24), 5)


def test_csv_and_table_say_the_same_as_json(digits, run):
    files = digits.files[::11]
    found = json.loads(run(*files, "--top", 3, "--format", "json")[1])
    _, out, _ = run(*files, "--top", 3, "--format", "csv")
    assert out.count("\n") == 13
    assert "\r" not in out
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 12
    for row, (image, rank) in zip(rows, ((image, rank) for image in found for rank in range(3)), strict=True):
        top = image["classes"][rank]
        assert (row["image"], int(row["rank"]), row["class"]) == (image["image"], rank + 1, top["class"])
        assert (int(row["index"]), float(row["probability"])) == (top["index"], pytest.approx(top["probability"]))
    _, out, _ = run(*files, "--top", 3)
    lines = out.splitlines()[2:]
    assert len(lines) == 4
    for line, image in zip(lines, found, strict=True):
        assert line.split()[0] == image["image"]
        assert line.endswith(", ".join(f"{top['class']} {top['probability']:.1%}" for top in image["classes"]))


def test_formats_of_files_say_the_same_as_json(digits, run, tmp_path):
    files = digits.files[::11]
    found = json.loads(run(*files, "--top", 2, "--format", "json")[1])
    for name in ("classes.jsonl", "classes.csv", "classes.parquet", "classes.json", "classes.txt"):
        assert run(*files, "--top", 2, "--out", tmp_path / name) == (0, "", "")
    assert [json.loads(line) for line in (tmp_path / "classes.jsonl").read_text().splitlines()] == found
    assert json.loads((tmp_path / "classes.json").read_text()) == found
    assert (tmp_path / "classes.csv").read_text() == run(*files, "--top", 2, "--format", "csv")[1]
    assert (tmp_path / "classes.txt").read_text() == run(*files, "--top", 2)[1]
    rows = parquet.read_table(tmp_path / "classes.parquet").to_pylist()
    flat = [{"image": image["image"], "rank": n, **top} for image in found for n, top in enumerate(image["classes"], 1)]
    assert rows == [{**row, "probability": pytest.approx(row["probability"])} for row in flat]
    assert len(list(tmp_path.iterdir())) == 5  # nothing of a run that ended


@pytest.mark.parametrize("form", ["csv", "txt", "parquet", "json"])
def test_a_name_that_is_no_text(digits, run, tmp_path, form):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(digits.files[0].read_bytes())
    out = tmp_path / f"classes.{form}"
    assert run(tmp_path, "--out", out)[0] == 0
    text = str(parquet.read_table(out).to_pylist()) if form == "parquet" else out.read_text()
    assert r"caf\udce9.png" in text.replace("\\\\", "\\")


def test_features_are_what_the_classifier_gets(digits, run, see, tmp_path):
    with torch.no_grad():
        expected = digits.model.forward_head(digits.model.forward_features(see(digits.files)), pre_logits=True)
    expected = expected.flatten(1)
    assert run(digits.root / "val", "--features", "--out", tmp_path / "a.safetensors") == (0, "", "")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["images"]) == [str(file) for file in digits.files]
        torch.testing.assert_close(file.get_tensor("features"), expected, atol=1e-4, rtol=1e-4)
    assert run(digits.root / "val", "--features", "--out", tmp_path / "a.parquet") == (0, "", "")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table["image"].to_pylist() == [str(file) for file in digits.files]
    torch.testing.assert_close(torch.tensor(table["features"].to_pylist()), expected, atol=1e-4, rtol=1e-4)
    lines = run(digits.files[0], "--features")[1].splitlines()
    torch.testing.assert_close(torch.tensor(json.loads(lines[0])["features"]), expected[0], atol=1e-4, rtol=1e-4)


def test_lists_patterns_and_tar_files(digits, run, tmp_path, monkeypatch):
    files = digits.files[:6]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, file in enumerate(files[:2]):
            tar.add(file, f"{number:05d}.png")
        tar.addfile(tarfile.TarInfo("00000.cls"))
        tar.addfile(tarfile.TarInfo("00002.png"))  # empty
    (tmp_path / "list.txt").write_text(f"{files[2]}\n\n{tmp_path}/*.tar\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{files[4]}\n"))
    pattern = str(files[5].with_name(f"[{files[5].name[0]}]{files[5].name[1:]}"))
    status, out, err = run(f"@{tmp_path}/list.txt", files[3], "-", pattern, "--format", "json")
    names = [image["image"] for image in json.loads(out)]
    shard = [f"{tmp_path}/shard.tar/{number:05d}.png" for number in range(2)]
    assert names == [str(files[2]), *shard, str(files[3]), str(files[4]), str(files[5])]
    direct = json.loads(run(files[2], *files[:2], *files[3:], "--format", "json")[1])
    assert [image["classes"] for image in json.loads(out)] == [image["classes"] for image in direct]
    assert status == 1
    assert err.startswith(f"error: {tmp_path}/shard.tar/00002.png: cannot be read")


def test_lists_with_a_name_that_is_no_text(digits, run, tmp_path, monkeypatch):
    name = str(tmp_path).encode() + b"/caf\xe9.png"
    shutil.copy(digits.files[0], name)
    (tmp_path / "list.txt").write_bytes(name + b"\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(name + b"\n"), encoding="utf-8"))
    status, out, err = run(f"@{tmp_path}/list.txt", "-", "--format", "json")
    assert (status, err) == (0, "")
    assert [image["image"] for image in json.loads(out)] == 2 * [os.fsdecode(name)]


@pytest.mark.parametrize("out", [".", "folder", "none/a.csv"])
def test_a_place_that_takes_no_file(digits, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([str(digits.files[0]), "--model", "test_svit", "--out", out])
    assert f"--out: expected a file in a folder that exists, got {out}\n" in capsys.readouterr().err
    assert os.listdir() == ["folder"]


class Broken(Exception):
    """The end of a process, in a test."""


@pytest.mark.parametrize("out", ["a.csv", "a.parquet"])
def test_a_run_that_broke_off_continues(digits, run, tmp_path, monkeypatch, out):
    whole = tmp_path / f"whole{out[1:]}"
    arguments = [digits.root / "val", tmp_path / "no.png", "--batch-size", 4]
    (tmp_path / "no.png").write_text("no image")
    assert run(*arguments, "--out", whole)[0] == 1

    def broken(*arguments):
        seen.append(arguments)
        if len(seen) == 4:
            raise Broken
        return records(*arguments)

    records, seen = inference.records, []
    with monkeypatch.context() as patch:
        patch.setattr(inference, "records", broken)
        with pytest.raises(Broken):
            run(*arguments, "--out", tmp_path / out)
    part = tmp_path / f"{out}.part"
    assert not (tmp_path / out).exists()
    assert part.read_bytes().count(b"\n") == 1 + 12
    with part.open("a") as file:
        file.write('{"image": "cut sho')

    status, _, err = run(*arguments, "--out", tmp_path / out)
    assert (status, err) == (
        1,
        f"error: --out: {part} is of a run that broke off; --resume continues it, or delete it\n",
    )
    status, _, err = run(*arguments, "--top", 1, "--out", tmp_path / out, "--resume")
    assert (status, err.startswith(f"error: --resume: {part} is of another run, ")) == (1, True)

    status, _, err = run(*arguments, "--out", tmp_path / out, "--resume")
    assert (status, err.splitlines()[-1]) == (1, f"error: 1 of {len(digits.files) + 1} images cannot be read")
    assert (tmp_path / out).read_bytes() == whole.read_bytes()
    assert not part.exists()
    assert run(*arguments[:1], "--out", tmp_path / out, "--resume")[0] == 0  # nothing broke off: from the start


def test_two_processes_share_the_images(digits, tmp_path):
    options = ["--model", "test_svit", "--checkpoint", digits.checkpoint, "--batch-size", 4, "--workers", 0]
    command = [digits.root / "val", *options, "--out", tmp_path / "two.jsonl"]
    done = subprocess.run(
        [*TWO_PROCESSES, "-m", "svit", "infer", *map(str, command)], capture_output=True, text=True, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr
    assert main([*map(str, [digits.root / "val", *options, "--out", tmp_path / "one.jsonl"])]) == 0
    one, two = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("one.jsonl", "two.jsonl")
    )
    assert len(one) == len(digits.files)
    for image, same in zip(one, two, strict=True):
        assert image["image"] == same["image"]
        for top, other in zip(image["classes"], same["classes"], strict=True):
            assert other == {**top, "probability": pytest.approx(top["probability"], abs=1e-5)}


def test_unreadable_images_are_named_and_the_others_classified(digits, run, tmp_path):
    files = [Path(shutil.copy(file, tmp_path / f"{number}.png")) for number, file in enumerate(digits.files[:4])]
    whole = json.loads(run(tmp_path, "--format", "json")[1])
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[2].write_text("no image")
    status, out, err = run(tmp_path, "--format", "json", "--batch-size", 1)
    assert status == 1
    names = [image["image"] for image in json.loads(out)]
    assert names == [str(files[0]), str(files[3])]
    for image, same in zip(json.loads(out), (whole[0], whole[3]), strict=True):
        assert [top["class"] for top in image["classes"]] == [top["class"] for top in same["classes"]]
    *errors, last = err.strip().splitlines()
    assert [line.split(" (")[0] for line in errors] == [f"error: {file}: cannot be read" for file in files[1:3]]
    assert last == "error: 2 of 4 images cannot be read"

    for file in files:
        file.write_text("no image")
    status, out, err = run(tmp_path, "--format", "json")
    assert (status, json.loads(out), err.count(".png: cannot be read")) == (1, [], 4)
    assert err.endswith("error: 4 of 4 images cannot be read\n")


def test_a_photo_is_turned_upright(digits, run, tmp_path):
    upright, turned = digits.files[9], tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned clockwise
    with Image.open(upright) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    found = json.loads(run(upright, turned, "--format", "json")[1])
    assert found[0]["classes"] == found[1]["classes"]


def test_16_bits_are_seen_as_8(digits, run, tmp_path):
    with Image.open(digits.files[9]) as image:
        Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    found = json.loads(run(digits.files[9], tmp_path / "deep.tif", "--format", "json")[1])
    assert found[0]["classes"] == found[1]["classes"]


def test_folders_are_searched_to_their_end_for_images(tmp_path):
    (tmp_path / "b" / "folder.png").mkdir(parents=True)
    for name in ("b/2.JPG", "b/folder.png/3.jpeg", "1.png", "notes.txt", "b/data.csv"):
        (tmp_path / name).touch()
    assert list(find_images([tmp_path])) == [tmp_path / name for name in ("1.png", "b/2.JPG", "b/folder.png/3.jpeg")]
    assert list(find_images([tmp_path / "notes.txt"])) == [tmp_path / "notes.txt"]  # named, so tried


def test_a_folder_with_links_and_clutter(digits, run, tmp_path):
    """As the training sees it: hidden files are left out, links to folders followed, loops cut."""
    (tmp_path / "store").mkdir()
    (tmp_path / "photos" / "@eaDir").mkdir(parents=True)
    for name in ("photos/1.png", "photos/._1.png", "photos/@eaDir/1.png", "store/2.png"):
        shutil.copy(digits.files[0], tmp_path / name)
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "photos")
    status, out, err = run(tmp_path / "photos", "--format", "json")
    names = [str(tmp_path / "photos" / name) for name in ("1.png", "more/2.png")]
    assert (status, [image["image"] for image in json.loads(out)]) == (0, names)
    assert err.startswith(f"warning: {tmp_path / 'photos'}: left out ")
    assert err.count("\n") == 1


def test_what_cannot_be_done_is_said_in_a_line(digits, run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(digits.checkpoint.read_bytes()[:999])
    image = digits.files[0]
    for message, arguments, options in (
        (f"{tmp_path / 'empty'}: no images in this folder", [tmp_path / "empty"], {}),
        (f"{tmp_path / 'none.png'}: no such file or folder", [image, tmp_path / "none.png"], {}),
        ("--device: toaster cannot be used", [image, "--device", "toaster"], {}),
        ("did you mean svit_small", [image], {"model": "svit_smal"}),
        ("does not fit the model", [image], {"model": "svit_nano_32"}),
        ("damaged.safetensors: cannot be read", [image], {"checkpoint": tmp_path / "damaged.safetensors"}),
    ):
        status, out, err = run(*arguments, **options)
        assert (status, out) == (1, ""), message
        assert err.startswith("error: ")
        assert message in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--top", "expected at least 1, got 0"),
        ("--batch-size", "expected at least 1, got 0"),
        ("--img-size", "expected one or two positive whole numbers, got 0"),
        ("--in-chans", "expected 1, 2, 3, 4, got 0"),
    ],
)
def test_numbers_out_of_range(run, capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        run("photo.jpg", option, 0)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"svit infer: error: argument {option}: {message}\n")


def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_is_killed(digits, run, monkeypatch):
    monkeypatch.setattr(inference.Photos, "__getitem__", killed)
    status, _, err = run(digits.root / "val", "--batch-size", 4, "--workers", 1)
    assert status == 1
    assert err.startswith("error: DataLoader worker (pid")
    assert err.endswith("If memory ran short, lower --workers\n")


def test_output_to_a_pipe(digits, run, tmp_path):
    pipe, read = tmp_path / "pipe.csv", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert run(*digits.files[:2], "--out", pipe)[0] == 0
    reader.join()
    assert read == [run(*digits.files[:2], "--format", "csv")[1]]
    assert os.listdir(tmp_path) == ["pipe.csv"]
    with pytest.raises(SystemExit, match="2"):
        run(digits.files[0], "--out", pipe, "--resume")


def test_what_follows_a_damaged_line_is_done_again(digits, run, tmp_path, monkeypatch):
    arguments = [*digits.files[:6], "--batch-size", 1, "--workers", 0, "--out", tmp_path / "a.csv"]
    assert run(*arguments)[0] == 0
    whole = (tmp_path / "a.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("svit.cli.infer.write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*arguments)
    part = tmp_path / "a.csv.part"
    lines = part.read_bytes().splitlines(keepends=True)
    for damaged in (b"\0" * 40 + b"\n", b"[1]\n", lines[3][:-9] + b"\n"):
        part.write_bytes(b"".join([*lines[:3], damaged, *lines[4:]]))
        (tmp_path / "a.csv").unlink()
        assert run(*arguments, "--resume")[0] == 0
        assert (tmp_path / "a.csv").read_bytes() == whole
