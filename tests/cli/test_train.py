"""tools/train.py as a user calls it, on scikit-learn's digits: it learns, it goes on exactly, it says what is wrong."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import image_data
from helpers import ONE_THREAD, TWO_PROCESSES
from svit import processes
from svit.checkpoints import create_model, read_metadata, save_model
from svit.cli import command, train
from svit.errors import InputError
from svit.files import atomic_write
from svit.training import loop
from svit.training import state as states
from svit.training.data import Loader
from svit.training.evaluation import Accuracy

TOOLS = Path(__file__).parents[2] / "tools"
ENDS_THREADS = Path(__file__).with_name("ends_threads.py")


# All that is random at once: whatever does not come back exactly after a kill changes the weights.
RECIPE = """
model: test_svit
dataset: folder
img_size: 16
epochs: 4
batch_size: 8
repeated_augmentation: 2
color_jitter: 0.4
auto_augment: rand-m5
random_erasing: 0.3
mixup: 0.8
cutmix: 1.0
label_smoothing: 0.1
drop_path: 0.3
lr: 0.002
warmup_epochs: 0.5
clip_grad: 1.0
ema: 0.9
layer_decay: 0.9
workers: 0
"""


@pytest.fixture(autouse=True)
def one_process():
    """Trainings in one process one after the other: accelerate keeps the first one's settings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_data.folder(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture
def recipe(tmp_path, data):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{RECIPE}data_dir: {data}\n")
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    """The folder of a training that nothing disturbed."""
    root = tmp_path_factory.mktemp("uninterrupted")
    (root / "recipe.yaml").write_text(f"{RECIPE}data_dir: {data}\n")
    torch.set_num_threads(1)
    assert command("train")([str(root / "recipe.yaml"), "--output", str(root / "out")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return root / "out"


def run(recipe, output, *arguments):
    """A training in this process."""
    status = command("train")([str(recipe), "--output", str(output), *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    return status


def start(recipe, output, *arguments, launcher=(sys.executable,)):
    """A training in a process of its own."""
    tool = (TOOLS / "train.py",) if ENDS_THREADS in launcher else ("-m", "svit", "train")
    command = [*launcher, *tool, recipe, "--output", output, *arguments]
    return subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def updates_saved(output: Path) -> int:
    """How far the saved state is, 0 if there is none."""
    if not (output / "state.pt").exists():
        return 0
    state = torch.load(output / "state.pt", weights_only=True)["state"]
    return 10 * state["epoch"] + state["update"]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_training(a: Path, b: Path) -> bool:
    """Whether two trainings ended with the same weights, bit for bit, averages, moments and log included."""
    states = [torch.load(out / "state.pt", weights_only=True) for out in (a, b)]
    for state in states:
        del state["state"]["seconds"], state["state"]["recipe"]
        for row in state["state"]["rows"]:
            del row["seconds"]
    flat = [torch.utils._pytree.tree_flatten(state)[0] for state in states]
    if len(flat[0]) != len(flat[1]):
        return False
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*flat, strict=True)
    ) and same_weights(a / "last.safetensors", b / "last.safetensors")


def test_it_learns_and_its_files_can_be_used(tmp_path, data, capsys):
    recipe = tmp_path / "digits.yaml"
    recipe.write_text(
        "model: test_svit\nimg_size: 16\nepochs: 12\nbatch_size: 8\nlr: 0.003\nwarmup_epochs: 1\nworkers: 0\n"
        "scale: [0.8, 1.0]\nhflip: 0\nmodel_args: {stem_stride: 2, stoken_size: [2, 1, 1, 1]}\n"
    )
    out = tmp_path / "out"
    assert run(recipe, out, "--data-dir", str(data)) == 0
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(12))
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    top1 = [float(row["top1"]) for row in rows]
    assert max(top1) > 50  # of 5 classes
    assert list(out.glob("events.out.tfevents.*"))

    told = read_metadata(out / "best.safetensors")
    assert told["facts"]["top1"] == pytest.approx(max(top1))
    assert told["facts"]["recipe"]["lr"] == 0.003
    assert told["pretrained_cfg"]["label_names"] == list(image_data.CLASSES)
    arguments = {"stem_stride": 2, "stoken_size": (2, 1, 1, 1)}
    model = create_model("test_svit", out / "best.safetensors", **arguments)
    assert model.num_classes == 5
    assert model.pretrained_cfg["input_size"] == [3, 16, 16]
    assert same_weights(out / "last.safetensors", out / "best.safetensors") == (top1[-1] > max(top1[:-1]))
    assert "best" in capsys.readouterr().out


def test_shards_with_fewer_batches_than_they_should_have(tmp_path, recipe, monkeypatch, capsys):
    """As with fewer shards than readers."""
    epoch = Loader.epoch
    monkeypatch.setattr(Loader, "epoch", lambda self, *where: islice(epoch(self, *where), 7))
    message = error_of(capsys, recipe, tmp_path / "out")
    assert "train: expected 10 batches an epoch in each process, got 7; some readers had no shard" in message


class Stopped(Exception):
    pass


@pytest.mark.parametrize("update", [1, 7, 10, 14])
def test_a_training_that_breaks_off_anywhere_goes_on_exactly(tmp_path, recipe, uninterrupted, monkeypatch, update):
    """An epoch has 10 updates; the last state is up to 2 updates old."""
    step = loop.Training.step

    def breaks(self, batches):
        if self.total == update:
            raise Stopped
        return step(self, batches)

    out = tmp_path / "out"
    monkeypatch.setattr(loop.Training, "step", breaks)
    with pytest.raises(Stopped):
        run(recipe, out, "--set", "save_every=3")
    monkeypatch.setattr(loop.Training, "step", step)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert updates_saved(out) == {1: 0, 7: 6, 10: 10, 14: 12}[update]
    if update > 1:  # the accuracy of other weights is not told
        assert ("top1" in read_metadata(out / "last.safetensors")["facts"]) == (update == 10)
    assert run(recipe, out, "--resume", "--set", "save_every=3", "workers=1") == 0
    assert same_training(out, uninterrupted)


def test_a_training_killed_at_several_moments_goes_on_exactly(tmp_path, recipe, uninterrupted):
    out = tmp_path / "out"
    arguments = ("--resume", "--set", "save_every=1")
    chance = random.Random(0)
    for until in (2, 10, 16):
        process = start(recipe, out, *arguments)
        while updates_saved(out) < until and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.15))  # in the midst of whatever it does, saving included
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert until <= updates_saved(out) < 40
    finish(start(recipe, out, *arguments))
    assert updates_saved(out) == 40
    assert same_training(out, uninterrupted)
    assert not list(out.glob(".part-*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(tmp_path, recipe, uninterrupted, number, status):
    out = tmp_path / "out"
    process = start(recipe, out, "--set", "save_every=3", "workers=1")
    while updates_saved(out) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    assert output.strip().splitlines()[-1] == f"{number.name}: saved; --resume goes on from here"
    assert "Traceback" not in output
    assert 3 < updates_saved(out) < 40
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)


def test_sigterm_in_an_evaluation(tmp_path, recipe, uninterrupted, monkeypatch):
    evaluate, seen = loop.evaluate, []

    def terminated(model, batches, *arguments, **options):
        def watched():
            for batch in batches:
                seen.append(batch)
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        return evaluate(model, watched(), *arguments, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", terminated)
        assert run(recipe, out) == 143
    assert len(seen) == 2  # of 5 batches
    state = torch.load(out / "state.pt", weights_only=True)["state"]
    assert (state["epoch"], state["update"], state["rows"]) == (0, 10, [])
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)


def test_a_reader_that_is_killed_ends_the_training_in_words(tmp_path, recipe, uninterrupted):
    out = tmp_path / "out"
    process = start(recipe, out, "--set", "save_every=3", "workers=1")
    while updates_saved(out) < 3 and process.poll() is None:
        time.sleep(0.02)
    for reader in psutil.Process(process.pid).children():
        reader.kill()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "error: DataLoader worker (pid" in output
    assert "lower workers" in output
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)


def equal_up_to_rounding(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


# What makes as many images in one process or in two, in one step or in two, the same training.
FROZEN = """
model: test_svit
img_size: 16
epochs: 2
freeze_bn: true
opt: sgd
lr: 0.05
workers: 0
"""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, data):
    """Recipe and result of a training of 8 images an update, in one process."""
    root = tmp_path_factory.mktemp("frozen")
    (root / "recipe.yaml").write_text(f"{FROZEN}data_dir: {data}\n")
    torch.set_num_threads(1)
    assert command("train")([str(root / "recipe.yaml"), "--output", str(root / "out"), "--set", "batch_size=8"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return root


@pytest.mark.parametrize(("parallel", "steps"), [("ddp", 1), ("fsdp", 1), ("fsdp", 2)])
def test_two_processes_train_like_one(tmp_path, frozen, parallel, steps):
    changes = ("--set", f"batch_size={4 // steps}", f"grad_accum={steps}", f"parallel={parallel}")
    # DTensor's caches hold FSDP's group and its threads to the end.
    launcher = TWO_PROCESSES if parallel == "fsdp" else (*TWO_PROCESSES, ENDS_THREADS)
    finish(start(frozen / "recipe.yaml", tmp_path / "out", *changes, launcher=launcher))
    one, two = frozen / "out" / "last.safetensors", tmp_path / "out" / "last.safetensors"
    assert equal_up_to_rounding(one, two)
    assert not equal_up_to_rounding(frozen / "out" / "best.safetensors", two) or same_weights(
        frozen / "out" / "best.safetensors", one
    )
    rows = [list(csv.DictReader((root / "log.csv").open())) for root in (frozen / "out", tmp_path / "out")]
    for a, b in zip(*rows, strict=True):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-4)
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


@pytest.mark.parametrize(
    ("parallel", "ended_by"),
    [("ddp", signal.SIGKILL), ("fsdp", signal.SIGKILL), ("ddp", signal.SIGTERM), ("ddp", signal.SIGINT)],
)
def test_two_processes_that_are_ended_go_on(tmp_path, frozen, parallel, ended_by):
    recipe, whole, out = frozen / "recipe.yaml", tmp_path / "whole", tmp_path / "out"
    changes = ("batch_size=4", f"parallel={parallel}", "save_every=1", "opt=adamw", "lr=0.002", "clip_grad=1.0")
    arguments = ("--resume", "--set", *changes, "epochs=3")
    finish(start(recipe, whole, *arguments, launcher=TWO_PROCESSES))
    process = start(recipe, out, *arguments, launcher=TWO_PROCESSES)
    while updates_saved(out) < 5 and process.poll() is None:
        time.sleep(0.02)
    if ended_by != signal.SIGKILL:
        process.send_signal(ended_by)  # torchrun passes it on
        output, _ = process.communicate(timeout=60)
        assert f"{ended_by.name}: saved; --resume goes on from here" in output
        assert updates_saved(out) in (10, 20, 30)  # where the processes ask each other
        rows = torch.load(out / "state.pt", weights_only=True)["state"]["rows"]
        assert len(rows) == updates_saved(out) // 10 - 1  # before the evaluation
    else:
        for one in [process, *psutil.Process(process.pid).children(recursive=True)]:
            one.kill()
        process.communicate(timeout=60)
        assert 5 <= updates_saved(out) < 30
    finish(start(recipe, out, *arguments, launcher=TWO_PROCESSES))
    assert same_training(whole, out)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_process_that_has_nothing_to_evaluate(tmp_path, frozen, data, parallel):
    """One test image for two processes."""
    few = tmp_path / "few"
    shutil.copytree(data / "train" / "one", few / "train" / "one")
    (few / "val" / "one").mkdir(parents=True)
    shutil.copy(sorted((data / "val" / "one").iterdir())[0], few / "val" / "one")
    changes = ("--data-dir", few, "--set", "num_classes=5", "epochs=2")
    assert run(frozen / "recipe.yaml", tmp_path / "one", *map(str, changes), "batch_size=8") == 0
    more = ("batch_size=4", f"parallel={parallel}")
    finish(start(frozen / "recipe.yaml", tmp_path / "two", *changes, *more, launcher=TWO_PROCESSES))
    one, two = (list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-4)
    assert equal_up_to_rounding(tmp_path / "one" / "last.safetensors", tmp_path / "two" / "last.safetensors")


def test_two_steps_an_update_train_like_one(tmp_path, frozen):
    assert run(frozen / "recipe.yaml", tmp_path / "out", "--set", "batch_size=4", "grad_accum=2") == 0
    assert equal_up_to_rounding(frozen / "out" / "last.safetensors", tmp_path / "out" / "last.safetensors")


def test_a_teacher_is_learned_from(tmp_path, frozen):
    """With all weight on the teacher the labels do not count."""
    recipe, teacher = frozen / "recipe.yaml", frozen / "out" / "last.safetensors"
    arguments = ("--set", "batch_size=8", "teacher=test_svit", f"teacher_checkpoint={teacher}")
    for name, weight, smoothing in (("a", 1.0, 0.0), ("b", 1.0, 0.3), ("c", 0.5, 0.0)):
        extra = (f"teacher_weight={weight}", f"label_smoothing={smoothing}", "epochs=1")
        assert run(recipe, tmp_path / name, *arguments, *extra) == 0
    weights = {name: tmp_path / name / "last.safetensors" for name in "abc"}
    assert same_weights(weights["a"], weights["b"])
    assert not same_weights(weights["a"], weights["c"])


def test_a_teacher_of_other_classes(tmp_path, frozen, capsys):
    arguments = (frozen / "recipe.yaml", tmp_path / "out", "--set", "batch_size=8")
    message = error_of(capsys, *arguments, "teacher=svit_nano_32.cifar10")
    assert "teacher: expected one of the data's 5 classes, got svit_nano_32.cifar10 of 10" in message
    model = create_model("test_svit", num_classes=5)
    save_model(tmp_path / "teacher.safetensors", model, "test_svit", sorted(image_data.CLASSES, reverse=True))
    message = error_of(
        capsys, *arguments, "teacher=test_svit", f"teacher_checkpoint={tmp_path / 'teacher.safetensors'}"
    )
    assert "teacher: its classes are in another order than the data's: ['zero', 'two'," in message


def test_a_teacher_of_more_classes_teaches_those_of_the_data(tmp_path, frozen, capsys):
    recipe, teacher = frozen / "recipe.yaml", frozen / "out" / "last.safetensors"
    places, weights = [6, 2, 0, 5, 3], load_file(teacher)
    model = create_model("test_svit", num_classes=7)
    for key in ("head.fc.weight", "head.fc.bias"):
        weights[key] = torch.full((7, *weights[key].shape[1:]), 9.0).index_copy(0, torch.tensor(places), weights[key])
    save_model(tmp_path / "more.safetensors", model, "test_svit", weights=weights)
    common = ("--set", "batch_size=8", "epochs=1", "teacher_weight=1", "teacher=test_svit")
    more = (*common, f"teacher_checkpoint={tmp_path / 'more.safetensors'}")
    assert run(recipe, tmp_path / "a", *common, f"teacher_checkpoint={teacher}") == 0
    assert run(recipe, tmp_path / "b", *more, f"teacher_classes={places}") == 0
    assert equal_up_to_rounding(tmp_path / "a" / "last.safetensors", tmp_path / "b" / "last.safetensors")
    for wrong in ([6, 2, 0, 5], [6, 2, 0, 5, 7]):
        message = error_of(capsys, recipe, tmp_path / "c", *more, f"teacher_classes={wrong}")
        assert "teacher_classes: expected 5 numbers, one for each class of the data, less than the 7 of" in message
        assert message.endswith(f"got {wrong}")


def test_a_teacher_of_another_size(tmp_path, frozen, capsys):
    arguments = (frozen / "recipe.yaml", tmp_path / "out", "--set", "batch_size=8", "teacher=vit_tiny_patch16_224")
    save_model(tmp_path / "teacher.safetensors", create_model("vit_tiny_patch16_224", num_classes=5), "a")
    arguments += (f"teacher_checkpoint={tmp_path / 'teacher.safetensors'}", "epochs=1")
    for sizes in (["img_size=32"], ["img_size=224", "train_size=32"], ["img_size=224", "train_size_schedule={0: 32}"]):
        message = error_of(capsys, *arguments, *sizes)
        assert "teacher: vit_tiny_patch16_224 takes no images of 32 x 32, as the training has: Input height" in message


def test_starting_from_a_checkpoint_of_other_classes(tmp_path, frozen, data):
    three = tmp_path / "three"
    shutil.copytree(data, three)
    for split in ("train", "val"):
        for name in ("two", "zero"):
            shutil.rmtree(three / split / name)
    arguments = ("--data-dir", str(three), "--set", "batch_size=8", "epochs=1", "lr=0", "sched=none")
    source = frozen / "out" / "last.safetensors"
    assert run(frozen / "recipe.yaml", tmp_path / "out", *arguments, f"checkpoint={source}") == 0
    before, after = load_file(source), load_file(tmp_path / "out" / "last.safetensors")
    assert after["head.fc.weight"].shape[0] == 3
    for key in before:
        assert torch.equal(before[key], after[key]) == (not key.startswith("head.fc"))


def test_drop_path_follows_its_schedule(tmp_path, recipe, monkeypatch):
    seen = []
    step = loop.Training.step

    def watch(self, batches):
        seen.append((self.state.epoch, max(module.drop_prob for module, _ in self.drop_paths)))
        return step(self, batches)

    monkeypatch.setattr(loop.Training, "step", watch)
    assert run(recipe, tmp_path / "out", "--set", "epochs=2", "drop_path_schedule={1: 0.6}") == 0
    assert dict(seen) == {0: pytest.approx(0.3), 1: pytest.approx(0.6)}


@pytest.mark.parametrize(("off", "mixed"), [("null", [0, 1]), ("0", []), ("1", [0])])
def test_mixup_ends_at_its_epoch(tmp_path, recipe, monkeypatch, off, mixed):
    seen = []
    step = loop.Training.step

    def watch(self, batches):
        mixup = self.mixup
        self.mixup = lambda *batch: seen.append(self.state.epoch) or mixup(*batch)
        loss = step(self, batches)
        self.mixup = mixup
        return loss

    monkeypatch.setattr(loop.Training, "step", watch)
    assert run(recipe, tmp_path / "out", "--set", "epochs=2", f"mixup_off_epoch={off}") == 0
    assert sorted(set(seen)) == mixed


def test_the_largest_rate_scales_with_the_images_of_an_update(tmp_path, recipe):
    assert run(recipe, tmp_path / "out", "--set", "lr_base_size=16", "sched=constant", "epochs=1", "layer_decay=null",
               "warmup_epochs=0") == 0  # fmt: skip
    with open(tmp_path / "out" / "log.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["lr"]) == pytest.approx(0.002 * 8 / 16)


# bfloat16 not with test_svit, which has a map of one pixel before its last downsampling here: see docs/training.md.
@pytest.mark.parametrize(
    "changes", [["mixed_precision=bf16", "model=svit_nano_32"], ["grad_checkpointing=true"], ["augment=false"]]
)
def test_other_ways_to_train(tmp_path, recipe, changes, uninterrupted):
    assert run(recipe, tmp_path / "out", "--set", "epochs=1", *changes) == 0
    with open(tmp_path / "out" / "log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert 1 < float(row["train_loss"]) < 2.5


def test_shards_train_and_go_on_exactly(tmp_path, recipe, monkeypatch):
    root = image_data.shards(tmp_path / "shards")
    arguments = ("--data-dir", str(root), "--set", "dataset=wds/digits", "num_classes=5", "repeated_augmentation=1")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(recipe, whole, *arguments) == 0
    step = loop.Training.step

    def breaks(self, batches):
        if self.total == 13:
            raise Stopped
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "step", breaks)
        with pytest.raises(Stopped):
            run(recipe, out, *arguments, "save_every=3")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(recipe, out, "--resume", *arguments) == 0
    assert same_training(out, whole)


def test_a_class_in_shards_that_the_model_does_not_have(tmp_path, recipe, capsys):
    root = image_data.shards(tmp_path / "shards")
    arguments = ("--data-dir", str(root), "--set", "dataset=wds/digits", "num_classes=4")
    assert error_of(capsys, recipe, tmp_path / "out", *arguments) == "error: class: expected 0 to 3, got 4"


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_none_of_whose_images_can_be_read(tmp_path, recipe, data, capsys, split):
    root = shutil.copytree(data, tmp_path / "data")
    for image in (root / split).rglob("*.png"):
        image.write_bytes(b"no image")
    assert run(recipe, tmp_path / "out", "--data-dir", str(root), "--set", "max_unreadable=1000") == 1
    assert "images can be read\n" in capsys.readouterr().err.splitlines(keepends=True)[-1]


def test_shards_in_two_processes(tmp_path, recipe):
    """An epoch of 80 images is 5 updates of 16."""
    pytest.importorskip("webdataset")
    root = image_data.shards(tmp_path / "shards")
    arguments = ("--data-dir", root, "--set", "dataset=wds/digits", "num_classes=5", "epochs=1", "ema=null")
    out = tmp_path / "out"
    finish(start(recipe, out, *arguments, "evaluate=model", launcher=TWO_PROCESSES))
    state = torch.load(out / "state.pt", weights_only=True)
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {5.0}


# What is wrong, and what the message says


def error_of(capsys, *arguments) -> str:
    assert run(*arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    return errors[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epoch=3", "no recipe has a key 'epoch'; did you mean epochs"),
        ("epochs=many", "Value 'many' of type 'str' could not be converted to Integer (key 'epochs')"),
        ("model=svit_smal", "no model 'svit_smal' in timm; did you mean svit_small"),
        ("epochs=0", "epochs: expected at least 1, got 0"),
        ("evaluate=best", "evaluate: expected model or ema, got 'best'"),
        ("batch_size=9", "batch_size: expected an even number with mixup or cutmix, got 9"),
        ("batch_size=100", "batch_size: expected at most the 80 images of the data for one update, got 100"),
        ("parallel=fsdp", "ema: expected null with parallel: fsdp"),
        ("num_classes=3", "num_classes: expected the data's 5, got 3"),
        ("model_args.num_classes=7", "model_args.num_classes: expected num_classes, 5, got 7"),
        ("model_args={nothing: 1}", "model: test_svit cannot be made with"),
        ("checkpoint=nowhere.pth", "checkpoint: no such file: nowhere.pth"),
        ("data_dir=nowhere", "data_dir: no such folder or file: nowhere"),
        ("mixed_precision=fp8", "mixed_precision: expected None or bf16 or fp16, got 'fp8'"),
        ("auto_augment=foo", "the recipe cannot be followed: AssertionError"),
        ("opt_args={foo: 1}", "the recipe cannot be followed: TypeError: "),
        ("warmup_epochs=-1", "warmup_epochs: expected at least 0, got -1"),
        ("img_size=0", "img_size: expected at least 1, got 0"),
        ("std=[0.2, 0, 0.2]", "std: expected numbers above 0, got [0.2, 0.0, 0.2]"),
        ("epochs", "--set: expected KEY=VALUE, got 'epochs'"),
    ],
)
def test_a_recipe_that_cannot_be_followed(tmp_path, recipe, capsys, change, message):
    assert message in error_of(capsys, recipe, tmp_path / "out", "--set", change)
    assert not (tmp_path / "out").exists()


def test_the_log_of_a_training_killed_before_it_was_written(tmp_path, recipe, uninterrupted):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    log = (out / "log.csv").read_text()
    (out / "log.csv").write_text(log.splitlines()[0])
    assert run(recipe, out, "--resume") == 0
    assert (out / "log.csv").read_text() == log


def test_no_such_recipe(tmp_path, capsys):
    message = error_of(capsys, "nothing", tmp_path / "out")
    assert "recipe: no file nothing and no recipe of that name; there are " in message
    assert "cifar10" in message


def test_an_output_whose_name_is_no_text(tmp_path, recipe):
    out = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    with pytest.raises(InputError, match="^--output: expected UTF-8"):
        train.main([str(recipe), "--output", str(out)])
    assert not out.exists()


def test_a_class_that_val_lacks(tmp_path, recipe, data, capsys):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    shutil.rmtree(other / "val" / "two")
    assert "val: no images of 1 of 5 classes: two" in error_of(
        capsys, recipe, tmp_path / "out", "--data-dir", str(other)
    )


def test_a_training_does_not_go_on_with_another_recipe(tmp_path, recipe, uninterrupted, capsys):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    message = error_of(capsys, recipe, out, "--resume", "--set", "lr=0.1", "model=svit_nano_32", "workers=1")
    assert f"resume: {out / 'state.pt'} is of another training; lr: 0.002, now 0.1; " in message
    assert "model: 'test_svit', now 'svit_nano_32'" in message
    assert "workers" not in message
    assert f"--output: {out} holds a training already" in error_of(capsys, recipe, out)
    (out / "state.pt").write_bytes(before["state.pt"][:1000])
    assert "state.pt: cannot be read; it is damaged" in error_of(capsys, recipe, out, "--resume")
    (out / "state.pt").write_bytes(before["state.pt"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_training_does_not_go_on_with_other_data(tmp_path, recipe, uninterrupted, data, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(uninterrupted, out)
    shutil.copytree(data, other)

    def difference() -> str:
        message = error_of(capsys, recipe, out, "--resume", "--data-dir", str(other))
        start = f"error: resume: {out / 'state.pt'} is of another training; "
        assert message.startswith(start)
        return message.removeprefix(start).strip()

    extra = next((other / "train" / "zero").iterdir())
    shutil.copy(extra, extra.with_name("extra.png"))
    images = len(list(data.glob("train/*/*.png")))
    assert difference() == f"train: {images} images, now {images + 1}"
    extra.with_name("extra.png").unlink()
    for split in ("train", "val"):
        (other / split / "one").rename(other / split / "un")
    assert difference() == "classes: one gone, un new"
    for split in ("train", "val"):
        (other / split / "un").rename(other / split / "one")
    assert run(recipe, out, "--resume", "--data-dir", str(other)) == 0

    state = torch.load(out / "state.pt", weights_only=True)
    assert state["state"]["data"] == {"classes": list(image_data.CLASSES), "train": images, "val": 40}
    del state["state"]["data"]  # as of a version before
    torch.save(state, out / "state.pt")
    assert run(recipe, out, "--resume") == 0


def test_a_state_that_lacks_something(tmp_path, recipe, uninterrupted, capsys):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    state = torch.load(out / "state.pt", weights_only=True)
    del state["optimizer"]
    torch.save(state, out / "state.pt")
    assert "resume: the state is damaged; KeyError: 'optimizer'" in error_of(capsys, recipe, out, "--resume")


def test_a_full_disk_leaves_the_last_state(tmp_path, recipe, uninterrupted, monkeypatch, capsys):
    out = tmp_path / "out"
    kept = {}
    save = torch.save

    def full(content, path):
        if content["state"]["epoch"] == 1 and content["state"]["update"] == 6:
            kept["state"] = (out / "state.pt").read_bytes()
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = error_of(capsys, recipe, out, "--set", "save_every=2")
    assert "No space left on device" in message
    assert "what was saved before is whole" in message
    assert (out / "state.pt").read_bytes() == kept["state"]
    assert not list(out.glob(".part-*"))
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)


def test_out_of_memory_says_what_to_lower(tmp_path, recipe, monkeypatch, capsys):
    def step(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Training, "step", step)
    message = error_of(capsys, recipe, tmp_path / "out")
    assert "out of memory: lower batch_size, now 8, and raise grad_accum" in message


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, recipe, capsys):
    message = error_of(capsys, recipe, tmp_path / "out", "--set", "lr=1e30", "clip_grad=null", "log_every=1")
    assert "the loss is nan" in message or "the loss is inf" in message
    assert "lower lr (now 1e+30), raise warmup_epochs (now 0.5), set clip_grad=1; nothing of it is saved" in message
    assert "mixed_precision" not in message
    assert not (tmp_path / "out" / "state.pt").exists()


def test_validate_finds_what_the_training_logged(tmp_path, uninterrupted, data, capsys):
    out = tmp_path / "result.json"
    arguments = ["test_svit", "--checkpoint", str(uninterrupted / "last.safetensors"), "--data-dir", str(data)]
    assert command("validate")([*arguments, "--workers", "0", "--json", str(out)]) == 0
    with open(uninterrupted / "log.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    assert f"{float(row['top1']):g}" in capsys.readouterr().out
    assert json.loads(out.read_text())["top1"] == pytest.approx(float(row["top1"]))


# Nothing that is not finite is saved


def all_finite(output: Path) -> bool:
    tensors = torch.utils._pytree.tree_flatten(torch.load(output / "state.pt", weights_only=True))[0]
    files = [load_file(output / "last.safetensors"), *map(load_file, output.glob("best.safetensors"))]
    tensors += [tensor for file in files for tensor in file.values()]
    return all(tensor.isfinite().all() for tensor in tensors if isinstance(tensor, torch.Tensor))


def poison_weights(training) -> None:
    next(training.plain.parameters()).data[0] = float("nan")


def poison_statistics(training) -> None:
    next(b for name, b in training.plain.named_buffers() if "running_var" in name)[0] = float("inf")


def poison_moments(training) -> None:
    next(iter(training.optimizer.optimizer.state.values()))["exp_avg"][0] = float("-inf")


def poison_average(training) -> None:
    next(training.ema.module.parameters()).data[0] = float("nan")


def poisoned(monkeypatch, update, poison) -> None:
    """Calls `poison` right after that update, the first time that it is done."""
    step, left = loop.Training.step, [update]

    def stepped(self, batches):
        loss = step(self, batches)
        if self.total == update and left:
            left.pop()
            return poison(self) or loss
        return loss

    monkeypatch.setattr(loop.Training, "step", stepped)


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (poison_weights, "not all numbers of the weights are finite"),
        (poison_statistics, "not all numbers of the weights are finite"),
        (poison_moments, "not all numbers of the optimizer's state are finite"),
        (poison_average, "not all numbers of the moving average are finite"),
        (lambda training: torch.tensor(float("inf")), "the loss is inf"),
    ],
    ids=["weights", "statistics", "moments", "average", "loss"],
)
def test_what_is_not_finite_is_not_saved(tmp_path, recipe, uninterrupted, monkeypatch, capsys, poison, what):
    """In the last update before a save; the loss is not looked at before."""
    out = tmp_path / "out"
    poisoned(monkeypatch, 13, poison)
    message = error_of(capsys, recipe, out, "--set", "save_every=2")
    assert f"error: {what} in epoch 1, update 4; lower lr (now 0.002)" in message
    assert "lower clip_grad (now 1); nothing of it is saved: --resume goes on from epoch 1, update 2, with" in message
    assert f"checkpoint={out / 'last.safetensors'}" in message
    assert updates_saved(out) == 12
    assert all_finite(out)
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)


@pytest.mark.parametrize("update", [9, 7], ids=["at the end of an epoch", "when a signal comes"])
def test_what_is_not_finite_is_not_saved_either(tmp_path, recipe, monkeypatch, capsys, update):
    def poison(training):
        poison_weights(training)
        if update == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    poisoned(monkeypatch, update, poison)
    assert "not all numbers of the weights are finite" in error_of(capsys, recipe, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "tfevents" not in path.name) == ["recipe.yaml"]


def test_a_loss_is_not_forgotten(tmp_path, recipe, monkeypatch, capsys):
    """One update of which nothing is left but the loss, long before the next look."""
    poisoned(monkeypatch, 2, lambda training: torch.tensor(float("nan")))
    message = error_of(capsys, recipe, tmp_path / "out", "--set", "log_every=6")
    assert "the loss is nan in epoch 0, update 6" in message


def test_accumulated_steps_that_diverge(tmp_path, frozen, capsys):
    arguments = ("--set", "batch_size=4", "grad_accum=2", "lr=1e30", "save_every=1")
    message = error_of(capsys, frozen / "recipe.yaml", tmp_path / "out", *arguments)
    assert "in epoch 0, update 2" in message
    assert updates_saved(tmp_path / "out") == 1
    assert all_finite(tmp_path / "out")


def test_gradients_that_a_scaler_leaves_out_are_no_error(tmp_path, frozen, monkeypatch):
    """As mixed_precision=fp16 has them on a GPU, where the first scales are too large."""

    def accelerator(**arguments):
        made = Accelerator(**arguments)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        return made

    def stepped(self, batches):
        if self.total >= 2:
            return step(self, batches)
        handle = next(self.plain.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        loss = step(self, batches)
        handle.remove()
        return loss

    scales = []
    step, write = loop.Training.step, states.write
    monkeypatch.setattr(loop, "Accelerator", accelerator)
    monkeypatch.setattr(loop.Training, "step", stepped)
    monkeypatch.setattr(states, "write", lambda path, *a: (scales.append(a[1]["scaler"]["scale"]), write(path, *a)))
    out = tmp_path / "out"
    assert run(frozen / "recipe.yaml", out, "--set", "batch_size=8", "epochs=1", "save_every=1") == 0
    assert scales[:3] == [512, 256, 256]  # two updates were skipped, and saved
    assert all_finite(out)


def test_logits_that_are_not_finite_are_not_the_best(tmp_path, recipe, monkeypatch):
    evaluate, seen = loop.evaluate, []

    def evaluated(*arguments, **options):
        found = evaluate(*arguments, **options)
        seen.append(found)
        return Accuracy(found.count, found.count, found.count, float("nan"), [], []) if len(seen) == 2 else found

    monkeypatch.setattr(loop, "evaluate", evaluated)
    out = tmp_path / "out"
    assert run(recipe, out) == 0
    state = torch.load(out / "state.pt", weights_only=True)["state"]
    top1 = [row["top1"] for row in state["rows"]]
    assert top1[1] == 100
    assert state["best"] == read_metadata(out / "best.safetensors")["facts"]["top1"] == max(top1[:1] + top1[2:])


# A process of which the loss alone is none, and what the others do.
ONE_OF_TWO = """
from svit import processes
from svit.cli import command
from svit.training.loop import Training

step = Training.step


def one_of_two(self, batches):
    loss = step(self, batches)
    return loss * float("nan") if self.rank == 1 and self.total == 4 else loss


Training.step = one_of_two
processes.run(command("train"))
"""


@pytest.mark.parametrize(
    "changes", [("save_every=5",), ("log_every=5",), ("save_every=5", "parallel=fsdp")], ids=["save", "log", "fsdp"]
)
def test_two_processes_agree_that_it_diverged(tmp_path, frozen, changes):
    (tmp_path / "tool.py").write_text(ONE_OF_TWO)
    launcher = (*TWO_PROCESSES, tmp_path / "tool.py")
    command = [*launcher, frozen / "recipe.yaml", "--output", tmp_path / "out", "--set", "batch_size=4", *changes]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, done.stderr  # neither waits for the other one until torchrun ends it
    assert errors[0] == errors[1]
    assert errors[0].startswith("error: the loss is nan in epoch 0, update 5; ")
    assert not (tmp_path / "out" / "state.pt").exists()


def test_a_state_that_is_not_finite_is_refused(tmp_path, recipe, uninterrupted, capsys):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    state = torch.load(out / "state.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg_sq"][0] = float("nan")
    torch.save(state, out / "state.pt")
    assert f"{out / 'state.pt'}: holds weights or moments that are not finite" in error_of(
        capsys, recipe, out, "--resume"
    )


def test_weights_that_are_not_finite_are_no_start(tmp_path, recipe, uninterrupted, capsys):
    file = tmp_path / "lost.safetensors"
    weights = load_file(uninterrupted / "best.safetensors")
    weights["head.fc.bias"][1] = float("inf")
    save_file(weights, file)
    message = error_of(capsys, recipe, tmp_path / "out", "--set", f"checkpoint={file}")
    assert f"checkpoint: {file} holds numbers that are not finite, in head.fc.bias" in message


# Ctrl-C


def test_a_second_ctrl_c_ends_at_once(tmp_path, recipe, monkeypatch):
    """In the midst of the save that the first one asked for."""
    out = tmp_path / "out"
    poisoned(monkeypatch, 7, lambda training: os.kill(os.getpid(), signal.SIGINT))
    write = states.write

    def interrupted(path, state, tensors):
        if state.update == 8:
            with atomic_write(path) as part:
                part.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
        write(path, state, tensors)

    monkeypatch.setattr(states, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, "--set", "save_every=4")
    assert updates_saved(out) == 4
    assert not list(out.glob(".part-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_tool_says_so_in_one_line():
    code = "import os, signal; from svit import processes\n"
    code += "processes.run(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_sigterm_may_come_twice_but_not_after_ctrl_c():
    with processes.stop_signals() as came:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGTERM, signal.SIGTERM]
    with processes.stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # torchrun's answer to a second Ctrl-C
            os.kill(os.getpid(), signal.SIGTERM)


# Going on in another folder


def test_a_training_goes_on_whole_in_another_folder(tmp_path, recipe, uninterrupted, monkeypatch):
    """Broken off after its best epoch, which the new folder has from the start."""
    old, out = tmp_path / "old", tmp_path / "out"
    rows = torch.load(uninterrupted / "state.pt", weights_only=True)["state"]["rows"]
    best = max(range(4), key=lambda epoch: rows[epoch]["top1"])
    stop = min(10 * (best + 1), 38) + 1
    with monkeypatch.context() as patch:
        poisoned(patch, stop, lambda training: os.kill(os.getpid(), signal.SIGTERM))
        assert run(recipe, old) == 143
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with monkeypatch.context() as patch:
        poisoned(patch, stop + 1, lambda training: os.kill(os.getpid(), signal.SIGTERM))
        assert run(recipe, out, "--resume", str(old / "state.pt")) == 143
    assert {"best.safetensors", "last.safetensors", "log.csv", "recipe.yaml", "state.pt"} <= set(os.listdir(out))
    for name in ("best.safetensors", "log.csv", "recipe.yaml"):
        assert (out / name).read_bytes() == before[name]
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)
    assert same_weights(out / "best.safetensors", uninterrupted / "best.safetensors")
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_a_training_with_schedules_goes_on_in_another_folder(tmp_path, recipe):
    """The weights hold the recipe as JSON, whose keys are text."""
    changes = ("epochs=2", "drop_path_schedule={1: 0.2}", "train_size_schedule={1: 24}")
    assert run(recipe, tmp_path / "old", "--set", *changes) == 0
    assert run(recipe, tmp_path / "out", "--resume", str(tmp_path / "old" / "state.pt"), "--set", *changes) == 0
    assert same_training(tmp_path / "old", tmp_path / "out")


def test_a_finished_training_is_whole_in_another_folder(tmp_path, recipe, uninterrupted):
    out = tmp_path / "out"
    assert run(recipe, out, "--resume", str(uninterrupted / "state.pt")) == 0
    assert same_training(out, uninterrupted)
    for name in ("best.safetensors", "recipe.yaml", "log.csv"):
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_two_trainings_are_never_mixed(tmp_path, recipe, uninterrupted, capsys):
    state, out = str(uninterrupted / "state.pt"), tmp_path / "out"
    out.mkdir()
    for name in ("state.pt", "best.safetensors", "last.safetensors", "log.csv"):
        (out / name).write_bytes(b"another's")
        message = error_of(capsys, recipe, out, "--resume", state)
        assert f"--output: {out} holds a training already ({name}), and {state} is another state" in message
        assert f"--output: {out} holds a training already ({name})" in error_of(capsys, recipe, out)
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_bytes() == b"another's"
        (out / name).unlink()
    (out / "best.safetensors").write_bytes(b"another's")
    message = error_of(capsys, recipe, out, "--resume")
    assert f"--output: {out} holds a training without its state.pt (best.safetensors)" in message


def test_a_state_without_its_best_weights(tmp_path, recipe, uninterrupted, capsys):
    old, out = tmp_path / "old", tmp_path / "out"
    old.mkdir()
    shutil.copy(uninterrupted / "state.pt", old)
    message = error_of(capsys, recipe, out, "--resume", str(old / "state.pt"))
    assert f"resume: {old / 'state.pt'} has no best.safetensors beside it, of top-1 " in message
    model = create_model("test_svit", num_classes=5)
    save_model(old / "best.safetensors", model, "test_svit", recipe={"seed": 5}, top1=100.0)
    message = error_of(capsys, recipe, out, "--resume", str(old / "state.pt"))
    assert f"resume: {old / 'best.safetensors'} is not of the training of {old / 'state.pt'}" in message
    assert not out.exists()


def test_a_kill_in_the_very_first_save(tmp_path, recipe, uninterrupted):
    """One command again and again: the weights that came before the state are no other training's."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "last.safetensors").write_bytes(b"the weights of a state that did not follow")
    assert run(recipe, out, "--resume") == 0
    assert same_training(out, uninterrupted)


# The model of a checkpoint to start from

CELLS = {"stoken_size": [4, 2, 1, 1], "n_iter": 2, "stem_stride": 2}


@pytest.fixture
def other_cells(tmp_path):
    """A checkpoint of a training with other arguments than the model's own, some of training alone."""
    torch.manual_seed(1)
    model = create_model("test_svit", num_classes=5, **CELLS)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
    file = tmp_path / "other.safetensors"
    recipe = {"model": "test_svit", "model_args": {**CELLS, "drop_path_rate": 0.5, "proj_drop_rate": 0.25}}
    save_model(file, model, "test_svit", list(image_data.CLASSES), recipe=recipe)
    return model.eval(), file


def test_fine_tuning_goes_on_with_the_model_of_the_checkpoint(tmp_path, frozen, other_cells):
    """With a rate of 0 the weights stay, and so does the function; who reads the new file knows of the arguments."""
    model, file = other_cells
    out, images = tmp_path / "out", torch.randn(2, 3, 32, 32)
    arguments = ("--set", "batch_size=8", "epochs=1", "lr=0", "sched=none", f"checkpoint={file}")
    assert run(frozen / "recipe.yaml", out, *arguments) == 0
    assert read_metadata(out / "last.safetensors")["facts"]["recipe"]["model_args"] == CELLS
    assert torch.equal(create_model("test_svit", out / "last.safetensors")(images), model(images))
    assert not torch.allclose(create_model("test_svit", num_classes=5)(images), model(images))
    assert run(frozen / "recipe.yaml", out, "--resume", *arguments) == 0
    assert OmegaConf.load(out / "recipe.yaml").model_args == CELLS


@pytest.mark.parametrize("change", ["n_iter: 1", "stoken_size: [8, 4, 2, 1]"])
def test_a_recipe_that_contradicts_its_checkpoint(tmp_path, frozen, other_cells, capsys, change):
    key, _, given = change.partition(": ")
    arguments = ("--set", "batch_size=8", f"checkpoint={other_cells[1]}", f"model_args={{{change}}}")
    message = error_of(capsys, frozen / "recipe.yaml", tmp_path / "out", *arguments)
    assert f"was trained with model_args {key}: {CELLS[key]}, the model is made with {given}; leave it out" in message
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_may_change(tmp_path, frozen, other_cells):
    """Arguments that say the same, and those of training alone."""
    same = "model_args={n_iter: 2, stoken_size: [4, 2, 1, 1], drop_path_rate: 0.1, differentiable_association: true}"
    arguments = ("--set", "batch_size=8", "epochs=1", "lr=1e-5", f"checkpoint={other_cells[1]}", same)
    assert run(frozen / "recipe.yaml", tmp_path / "out", *arguments) == 0


def test_timm_and_the_checkpoint_of_another_model(other_cells):
    """As docs/finetuning.md has it: timm reads weights alone, so the arguments are given; feature maps too."""
    model, file = other_cells
    images = torch.randn(2, 3, 32, 32)
    again = timm.create_model("test_svit", num_classes=5, checkpoint_path=file, **CELLS).eval()
    assert torch.equal(again(images), model(images))
    told = read_metadata(file)["facts"]["recipe"]["model_args"]
    backbone = timm.create_model(
        "test_svit", features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **told
    )
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(backbone.eval()(images), maps, strict=True))
