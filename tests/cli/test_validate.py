"""tools/validate.py: its figures are those of a direct computation, and it says what is wrong."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import image_data
from helpers import ONE_THREAD, TWO_PROCESSES
from svit.checkpoints import save_model
from svit.cli import command, validate
from svit.training.data import Images
from svit.training.evaluation import Accuracy


@pytest.fixture
def run(digits, tmp_path):
    """Evaluates as the command line says; exit status and figures."""

    def run(*arguments, root=digits.root, checkpoint=digits.checkpoint, model="test_svit"):
        out = tmp_path / "new" / "result.json"
        options = ["--data-dir", str(root), "--checkpoint", str(checkpoint), "--workers", "0", "--json", str(out)]
        status = command("validate")([model, *options, *map(str, arguments)])
        return status, json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.fixture
def error_of(run, capsys):
    def error_of(*arguments, **options) -> str:
        assert run(*arguments, **options) == (1, None)
        *_, error = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("error: ")
        return error

    return error_of


def check(found: dict, logits: torch.Tensor, classes: torch.Tensor) -> None:
    right = logits.argmax(1) == classes
    assert found["images"] == len(classes)
    assert found["hits"] == right.sum()
    assert found["top1"] == pytest.approx(100 * right.double().mean().item())
    assert found["top5"] == 100
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-4)


@torch.no_grad()
def test_figures_of_all_and_of_each_class(digits, run, see, capsys):
    status, found = run("--per-class", "--batch-size", 7)
    assert status == 0
    logits = digits.model(see(digits.files))
    check(found, logits, digits.classes)
    assert 50 < found["top1"] < 100
    assert (found["img_size"], found["crop_pct"], found["unreadable"]) == ([16, 16], 1.0, 0)
    right = (logits.argmax(1) == digits.classes).view(5, -1).double().mean(1)
    shares = {name: 100 * share for name, share in zip(image_data.CLASSES, right.tolist(), strict=True)}
    assert {name: c["top1"] for name, c in found["classes"].items()} == pytest.approx(shares)
    assert {c["images"] for c in found["classes"].values()} == {image_data.VAL}

    all_images, each_class = (table.splitlines() for table in capsys.readouterr().out.split("\n\n"))
    cells = dict(zip(all_images[0].split(), all_images[2].split(), strict=False))
    assert (cells["model"], cells["images"]) == ("test_svit", "40")
    assert {f"{found['top1']:.2f}", "100.00", f"{found['loss']:.4f}"} <= set(all_images[2].split())
    rows = [line.split() for line in each_class[2:]]
    assert {name: float(share) for name, share, _ in rows} == pytest.approx(shares, abs=0.01)
    listed = [float(share) for _, share, _ in rows]
    assert listed == sorted(listed)
    assert listed[0] < listed[-1]


def test_two_processes_share_the_images(digits, run, tmp_path):
    _, one = run("--batch-size", 7)
    arguments = ["validate", "test_svit", "--data-dir", digits.root, "--checkpoint", digits.checkpoint]
    arguments += ["--workers", 0, "--batch-size", 7, "--json", tmp_path / "two.json"]
    done = subprocess.run(
        [*TWO_PROCESSES, "-m", "svit", *map(str, arguments)], capture_output=True, text=True, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert two == {**one, "loss": pytest.approx(one["loss"], rel=1e-5)}
    assert two["images"] == len(digits.files) == 40  # none twice, though the last batches are not full
    assert done.stdout.count("top-1 (paper)") == 1  # one process prints


@torch.no_grad()
def test_flip_averages_the_logits_of_both(digits, run, see):
    status, found = run("--flip")
    images = see(digits.files)
    assert status == 0
    check(found, (digits.model(images) + digits.model(images.flip(3))) / 2, digits.classes)


@torch.no_grad()
def test_another_size_and_crop(digits, run, see):
    status, found = run("--img-size", 24, "--crop-pct", 0.75)
    assert status == 0
    assert (found["img_size"], found["crop_pct"]) == ([24, 24], 0.75)
    check(found, digits.model(see(digits.files, size=24, edge=32)), digits.classes)


def test_mixed_precision_changes_the_loss_little(run):
    exact, mixed = (run(*arguments)[1]["loss"] for arguments in ((), ("--amp", "bf16")))
    assert exact != mixed
    assert mixed == pytest.approx(exact, rel=0.1)


@pytest.fixture
def copy(digits, tmp_path):
    return shutil.copytree(digits.root, tmp_path / "copy")


@torch.no_grad()
def test_unreadable_images_are_named_counted_and_too_many_an_error(digits, copy, run, see, error_of, capsys):
    broken = [3, 17]
    for index in broken:
        (copy / digits.files[index].relative_to(digits.root)).write_bytes(b"no image")
    assert "more than 1 images cannot be read" in error_of("--max-unreadable", 1, root=copy)
    status, found = run("--max-unreadable", 2, root=copy)
    assert status == 0
    assert found["unreadable"] == 2
    read = [index for index in range(40) if index not in broken]
    check(found, digits.model(see([digits.files[i] for i in read])), digits.classes[read])
    out, err = capsys.readouterr()
    for index in broken:
        assert f"unreadable, skipped: {digits.files[index].relative_to(digits.root / 'val')}" in err
    assert "unreadable" in out


def test_classes_of_data_and_checkpoint_must_agree(digits, copy, tmp_path, error_of):
    (copy / "val" / "one").rename(copy / "val" / "uno")
    assert "its classes are ['four', 'three', 'two', 'uno', 'zero'], expected" in error_of(root=copy)
    shutil.rmtree(copy / "val" / "uno")
    assert "expected the checkpoint's ['four', 'one', 'three', 'two', 'zero']" in error_of(root=copy)
    # Of one that does not say what its classes are called, their number counts.
    save_model(tmp_path / "nameless.safetensors", timm.create_model("test_svit", num_classes=5), "test_svit")
    nameless = tmp_path / "nameless.safetensors"
    assert "data_dir: 4 classes, expected the model's 5" in error_of(root=copy, checkpoint=nameless)


def test_the_datas_names_where_the_checkpoint_has_none(digits, run, tmp_path):
    save_model(tmp_path / "nameless.safetensors", timm.create_model("test_svit", num_classes=5), "test_svit")
    _, found = run(checkpoint=tmp_path / "nameless.safetensors")
    assert set(found["classes"]) == set(image_data.CLASSES)


def test_classes_of_the_same_name_in_words_keep_their_figures(run, tmp_path, capsys):
    """ImageNet has two cranes: a bird and a machine."""
    folders = ["n01440764", "n02012849", "n03126707"]
    for count, folder in enumerate(folders, start=1):
        (tmp_path / folder).mkdir()
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{number}.png")
    weights = tmp_path / "cranes.safetensors"
    save_model(weights, timm.create_model("test_svit", num_classes=3), "test_svit", folders)
    status, found = run("--per-class", "--img-size", 32, root=tmp_path, checkpoint=weights)
    assert status == 0
    names = ["tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)"]
    assert {name: c["images"] for name, c in found["classes"].items()} == dict(zip(names, (1, 2, 3), strict=True))
    out, err = capsys.readouterr()
    assert all(out.count(name) == 1 for name in names)
    assert "validation: 3 classes, 6 images: n01440764 1, n02012849 2, n03126707 3\n" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-classes", 7), "does not fit the model; other shapes"),
        (("--pretrained",), "pretrained: expected False together with a checkpoint"),
        (("--dataset", "torch/nothing"), "torch/nothing"),
        (("--json", "setup.cfg/result.json"), "setup.cfg"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(error_of, arguments, message):
    assert message in error_of(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 0), "--batch-size: expected at least 1, got 0"),
        (("--workers", -1), "--workers: expected at least 0, got -1"),
        (("--max-unreadable", -1), "--max-unreadable: expected at least 0, got -1"),
        (("--crop-pct", 0), "--crop-pct: expected more than 0 and at most 1, got 0"),
    ],
)
def test_numbers_out_of_range(run, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"svit validate: error: argument {message}\n")
    assert not (tmp_path / "new").exists()


def test_a_folder_is_no_place_for_the_figures(run, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run("--json", tmp_path)
    assert stop.value.code == 2
    message = f"--json: expected a file in a folder that exists, got {tmp_path}\n"
    assert capsys.readouterr().err.endswith(f"svit validate: error: {message}")


def test_no_data_and_no_model(error_of, tmp_path):
    assert "no such folder or file: " in error_of(root=tmp_path / "nowhere")
    (tmp_path / "empty" / "val").mkdir(parents=True)
    assert "empty/val: no class folders, 0 images in it" in error_of(root=tmp_path / "empty")
    assert "no model 'svit_smal' in timm; did you mean svit_small" in error_of(model="svit_smal")
    assert "no such file" in error_of(checkpoint=tmp_path / "nowhere.safetensors")


def test_out_of_memory_says_what_to_lower(monkeypatch, error_of):
    def evaluate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validate, "evaluate", evaluate)
    assert "out of memory: lower --batch-size or --img-size" in error_of()


@pytest.mark.parametrize(
    ("architecture", "trained", "size", "paper"),
    [
        ("svit_small", 224, 224, 83.6),
        ("svit_large.in1k", 224, 224, 85.3),
        ("svit_base.in1k_384", 384, 384, 86.0),
        ("svit_base", 224, 384, None),
        ("svit_small", 224, 256, None),
        ("resnet18", 224, 224, None),
    ],
)
def test_the_papers_figure_stands_beside(monkeypatch, run, capsys, architecture, trained, size, paper):
    model = timm.create_model("test_svit")
    model.pretrained_cfg.update(architecture=architecture, input_size=(3, trained, trained))
    config = {**timm.data.resolve_data_config({}, model=model), "input_size": (3, size, size)}
    monkeypatch.setattr(validate, "open_model", lambda args, **_: (model, torch.device("cpu"), config))
    monkeypatch.setattr(validate, "classes_of", lambda _: None)
    found = Accuracy(8, 6, 7, 0.5, [6, *[0] * 999], [8, *[0] * 999])
    monkeypatch.setattr(validate, "evaluate", lambda *_, **__: found)
    status, result = run()
    assert status == 0
    assert result["paper_top1"] == paper
    assert (result["top1"], result["top5"]) == (75, 87.5)
    assert list(result["classes"].values()) == [{"top1": 75.0, "images": 8}]
    assert (str(paper) if paper else "-") in capsys.readouterr().out.splitlines()[-1].split()


def test_a_reader_that_is_killed(digits, capsys, monkeypatch):
    monkeypatch.setattr(Images, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    options = ["--data-dir", str(digits.root), "--checkpoint", str(digits.checkpoint), "--workers", "1"]
    assert command("validate")(["test_svit", *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: DataLoader worker (pid")
    assert error.endswith("If memory ran short, lower --workers")
