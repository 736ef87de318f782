"""mm_train, mm_test and mm_infer, as a user calls them, on small data sets of real photographs."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ONE_THREAD, needs_mm

needs_mm()

from mmengine.config import Config  # noqa: E402

from mm_data import TILE, ade_folder, coco_folder  # noqa: E402
from svit.adapters import find_config  # noqa: E402
from svit.adapters.checkpoints import allow_mmengine_checkpoints  # noqa: E402
from svit.cli import (  # noqa: E402
    command,
    mm_infer,
    mm_test,
    mm_train,
)
from svit.errors import InputError  # noqa: E402

TOOLS = Path(__file__).parents[2] / "tools"
ENDS_THREADS = Path(__file__).with_name("ends_threads.py")

# Random in all places: order, flips, colours, drop path and the sampled regions; and a moving average.
DETECTION = """
_base_ = {base!r}
data_root = {root!r}
classes = ("coin",)
model = dict(
    backbone=dict(norm_eval=False, drop_path_rate=0.1),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=50)),
    test_cfg=dict(rpn=dict(max_per_img=50)),
)
load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
augmentation = [dict(type="RandomFlip", prob=0.5), dict(type="PhotoMetricDistortion", brightness_delta=8)]
pipeline = [*load[:2], *augmentation, dict(type="PackDetInputs")]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    dataset=dict(data_root=data_root, metainfo=dict(classes=classes), pipeline=pipeline),
)
resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root, metainfo=dict(classes=classes), pipeline=[load[0], resize, load[1], load[2]]
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "/annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=16, val_interval=16)
param_scheduler = [dict(type="LinearLR", start_factor=0.2, by_epoch=False, begin=0, end=8)]
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type="CheckImagesHook"), dict(type="EMAHook", momentum=0.2, update_buffers=True)]
randomness = dict(seed=0)
"""

# No random augmentation and no drop path: what resumes exactly in a run that counts iterations.
SEGMENTATION = """
_base_ = {base!r}
data_root = {root!r}
model = dict(
    backbone=dict(drop_path_rate=0.0),
    decode_head=dict(dropout_ratio=0.0),
    data_preprocessor=dict(size=(96, 96)),
)
load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, pipeline=load)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, pipeline=load))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=60, val_interval=60)
param_scheduler = [dict(type="LinearLR", start_factor=0.2, by_epoch=False, begin=0, end=4)]
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=10))
randomness = dict(seed=0)
"""

KINDS = {
    "detection": (DETECTION, "mask-rcnn_svit-nano_fpn_1x_coco", coco_folder),
    "segmentation": (SEGMENTATION, "svit-nano_fpn_1xb8-4k_ade20k-256x256", ade_folder),
}


def write_config(folder: Path, kind: str) -> Path:
    """Data and a config for them; the config's path."""
    text, base, make_data = KINDS[kind]
    root = make_data(folder / "data")
    (folder / "config.py").write_text(text.format(base=str(find_config(base)), root=str(root)))
    return folder / "config.py"


def command_line(tool: str, *args, processes: int = 1) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(ENDS_THREADS)]
    return [sys.executable, *(several if processes > 1 else []), str(TOOLS / tool), *map(str, args)]


def run(tool: str, *args, processes: int = 1) -> str:
    # One thread: sums in the same order in every run.
    done = subprocess.run(
        command_line(tool, *args, processes=processes), capture_output=True, text=True, env=ONE_THREAD, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def scalars(work_dir: Path) -> list[dict]:
    """What the run logged, one dict a line, of all its starts."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def weights(file: Path) -> dict[str, torch.Tensor]:
    allow_mmengine_checkpoints()
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request, tmp_path_factory) -> tuple[str, Path]:
    """A config and, in `work`, the finished run of it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder, request.param)
    run("mm_train.py", config, "--work-dir", folder / "work")
    return request.param, config


LAST = {"detection": "epoch_16.pth", "segmentation": "iter_60.pth"}
MIDDLE = {"detection": 3, "segmentation": 20}  # epochs, iterations
METRIC = {"detection": "coco/segm_mAP_50", "segmentation": "mIoU"}


def test_learns(trained):
    kind, config = trained
    log = scalars(config.parent / "work")
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == {"detection": 64, "segmentation": 60}[kind]
    assert np.mean(losses[-4:]) < losses[0] * 0.6
    (score,) = [line[METRIC[kind]] for line in log if METRIC[kind] in line]
    assert score > {"detection": 0.05, "segmentation": 40}[kind], log[-1]


def saved(pointer: Path) -> int:
    """The epoch or iteration of the newest checkpoint, 0 if there is none."""
    number = Path(pointer.read_text()).stem.rpartition("_")[2] if pointer.exists() else ""
    return int(number) if number else 0  # empty while it is being written


def test_kill_and_resume(trained):
    """Killed between two checkpoints and resumed: the weights of the run that was not."""
    kind, config = trained
    work = config.parent / "killed"
    process = subprocess.Popen(
        command_line("mm_train.py", config, "--work-dir", work),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    pointer = work / "last_checkpoint"
    deadline = time.monotonic() + 600
    while saved(pointer) < MIDDLE[kind]:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (work / LAST[kind]).exists()
    done = saved(pointer) * {"detection": 4, "segmentation": 1}[kind]
    before = len(scalars(work))

    run("mm_train.py", config, "--work-dir", work, "--resume")
    steps = [line["step"] for line in scalars(work)[before:] if "loss" in line]
    assert done > 1
    assert steps == list(range(done + 1, {"detection": 64, "segmentation": 60}[kind] + 1))  # from there, not from 1
    expected = weights(config.parent / "work" / LAST[kind])
    found = weights(work / LAST[kind])
    assert list(found) == list(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_evaluation(trained, tmp_path):
    kind, config = trained
    checkpoint = config.parent / "work" / LAST[kind]
    run("mm_test.py", config, checkpoint, "--out", tmp_path / "metrics.json", "--work-dir", tmp_path / "work")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    (expected,) = [line[METRIC[kind]] for line in scalars(config.parent / "work") if METRIC[kind] in line]
    assert metrics[METRIC[kind]] == pytest.approx(expected, abs=1e-3)
    if kind == "segmentation":
        assert set(metrics) == {"aAcc", "mIoU", "mAcc"}
    else:
        assert {"coco/bbox_mAP", "coco/segm_mAP", "coco/segm_mAP_75"} <= set(metrics)


@pytest.mark.parametrize("trained", ["segmentation"], indirect=True)
@pytest.mark.parametrize("own", [False, True], ids=["ADE20K", "own data"])
def test_several_scales(trained, tmp_path, own):
    """--tta: the mean over sizes and flips, with ADE20K's labels and with those of a data set of one's own."""
    _, config = trained
    if own:
        root = tmp_path / "data"
        shutil.copytree(config.parent / "data", root)
        for file in (root / "annotations").rglob("*.png"):  # classes from 0 on
            Image.fromarray(np.asarray(Image.open(file)) - 1).save(file)
        names = tuple(f"class {i}" for i in range(150))
        data = dict(type="BaseSegDataset", data_root=str(root), metainfo=dict(classes=names), seg_map_suffix=".png")
        own_config = tmp_path / "own.py"
        own_config.write_text(f"_base_ = {str(config)!r}\ntest_dataloader = dict(dataset={data})\n")
        config = own_config
    checkpoint = trained[1].parent / "work" / LAST["segmentation"]
    run("mm_test.py", config, checkpoint, "--tta", "--out", tmp_path / "tta.json", "--work-dir", tmp_path / "a")
    run("mm_test.py", config, checkpoint, "--out", tmp_path / "one.json", "--work-dir", tmp_path / "b")
    several, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("tta", "one"))
    assert several != one
    assert several["aAcc"] > 50


def test_pictures(trained, tmp_path, capsys):
    kind, config = trained
    folder = {"detection": "val2017", "segmentation": "images/validation"}[kind]
    images = sorted((config.parent / "data" / folder).iterdir())[:2]
    args = [str(config), str(config.parent / "work" / LAST[kind])]
    assert command("mm-infer")([*args, *map(str, images), "--out", str(tmp_path / "out"), "--score", "0.05"]) == 0
    assert command("mm-infer")([*args, str(images[0]), "--out", str(tmp_path / "one.jpg")]) == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [f"{image.stem}.png" for image in images]
    out = capsys.readouterr().out
    assert "coin" in out if kind == "detection" else "%" in out
    for image in images:
        picture, photo = (np.asarray(Image.open(f), dtype=int) for f in (tmp_path / "out" / f"{image.stem}.png", image))
        assert picture.shape[2] == 3
        assert picture.shape[:2] == photo.shape[:2] == (TILE, TILE)
        assert np.abs(picture - photo).mean() > 2  # something is drawn
    assert Image.open(tmp_path / "one.jpg").format == "JPEG"


@pytest.mark.parametrize("trained", ["segmentation"], indirect=True)
def test_two_processes(trained, tmp_path):
    """The tool under torchrun on a CPU; tests/adapters/test_distributed.py compares the gradients."""
    _, config = trained
    options = ["--cfg-options", "train_cfg.max_iters=2", "train_dataloader.batch_size=2"]
    run("mm_train.py", config, "--work-dir", tmp_path / "work", *options, processes=2)
    assert [line["step"] for line in scalars(tmp_path / "work") if "loss" in line] == [1, 2]
    checkpoint = tmp_path / "work/iter_2.pth"
    run("mm_test.py", config, checkpoint, "--out", tmp_path / "two.json", "--work-dir", tmp_path / "test", processes=2)
    run("mm_test.py", config, checkpoint, "--out", tmp_path / "one.json", "--work-dir", tmp_path / "test")
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())


def test_auto_scale_lr(trained, tmp_path):
    kind, config = trained
    options = ["--auto-scale-lr", "--cfg-options", "default_hooks.checkpoint.interval=1000"]
    stop = "train_cfg.max_iters=2" if kind == "segmentation" else "train_cfg.max_epochs=1"
    run("mm_train.py", config, "--work-dir", tmp_path / "work", *options, stop)
    base = 8 if kind == "segmentation" else 4
    batch = Config.fromfile(tmp_path / "work/config.py").train_dataloader.batch_size
    rates = [line["lr"] for line in scalars(tmp_path / "work") if "lr" in line]
    assert rates[0] == pytest.approx(1e-3 * 0.2 * batch / base)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_amp(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = Config(dict(optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW"))))
    mm_train.use_amp(config, dtype)
    assert config.optim_wrapper == dict(
        type="AmpOptimWrapper", optimizer=dict(type="AdamW"), dtype=dtype, loss_scale="dynamic"
    )


def failure(capsys, tool, *args) -> str:
    name = tool.__name__.rpartition(".")[2].replace("_", "-")
    assert command(name)([str(arg) for arg in args]) == 1
    return capsys.readouterr().err


@pytest.fixture
def config(tmp_path) -> Path:
    return write_config(tmp_path, "detection")


def test_missing_weights(capsys, tmp_path, monkeypatch):
    """A published config without ImageNet weights: stops at once, says where they are and how to do without."""
    monkeypatch.chdir(tmp_path)
    error = failure(capsys, mm_train, "mask-rcnn_svit-b_fpn_1x_coco")
    for part in ("pretrained/svit_base.in1k.safetensors", "stvit-base-224.pth", "hhb072/STViT", "init_cfg=None"):
        assert part in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-root", "nowhere"], "data_root: no such folder: nowhere. Give yours with --data-root"),
        (
            ["--cfg-options", "model.backbone.arch=svit_nan"],
            "arch: no model 'svit_nan' in timm; did you mean svit_nano",
        ),
        (["--cfg-options", "model.backbone.out_indices=[0,7]"], "out_indices: expected rising numbers of svit_nano's"),
        (["--cfg-options", "train_dataloader.dataset.ann_file=train2017/0.png.json"], "ann_file: no such file"),
        (["--resume", "none.pth"], "none.pth: no such checkpoint"),
        (["--amp"], "--amp: mmengine's mixed precision needs a GPU"),
    ],
)
def test_bad_input(capsys, config, monkeypatch, options, message):
    monkeypatch.chdir(config.parent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in failure(capsys, mm_train, config, *options)
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.py", "data"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim_wrapper.optimizer.lr=-1", "Invalid learning rate: -1"),
        ("train_dataloader.batch_size=0", "batch_size should be a positive integer value, but got batch_size=0"),
    ],
)
def test_numbers_that_no_run_can_have(capsys, config, option, message):
    options = [option, "model.backbone.init_cfg=None"]
    error = failure(capsys, mm_train, config, "--work-dir", config.parent / "work", "--cfg-options", *options)
    assert message in error


@pytest.mark.parametrize("tool", [mm_train, mm_test])
def test_options_without_a_value(capsys, config, tool):
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(config), *(["none.pth"] if tool is mm_test else []), "--cfg-options", "foo"])
    assert "--cfg-options: expected KEY=VALUE, got foo" in capsys.readouterr().err


def test_unknown_config(capsys):
    assert "no such file or name: nothing" in failure(capsys, mm_train, "nothing")
    assert "no such file or name: nothing" in failure(capsys, mm_test, "nothing", __file__)
    assert "none.pth: no such checkpoint" in failure(capsys, mm_test, "mask-rcnn_svit-s_fpn_1x_coco", "none.pth")


def test_weights_of_another_model(capsys, config):
    torch.save({"state_dict": {"stem.layers.0.weight": torch.zeros(1)}}, config.parent / "other.pth")
    init = dict(type="Pretrained", checkpoint=str(config.parent / "other.pth"))
    config.write_text(config.read_text() + f"model['backbone']['init_cfg'] = {init}\n")
    error = failure(capsys, mm_train, config, "--work-dir", config.parent / "work")
    assert "other.pth: is not of svit_nano; missing keys" in error
    assert not (config.parent / "work").exists()


def test_not_json(capsys, config):
    (config.parent / "data/annotations/instances_val2017.json").write_text("{")
    error = failure(capsys, mm_train, config, "--work-dir", config.parent / "work")
    assert "val_dataloader.dataset.ann_file" in error
    assert "instances_val2017.json is not JSON" in error
    assert not (config.parent / "work").exists()


def test_work_dir_of_another_run(capsys, config):
    work = config.parent / "work"
    work.mkdir()
    (work / "last_checkpoint").write_text("epoch_1.pth")
    error = failure(capsys, mm_train, config, "--work-dir", work)
    assert f"--work-dir: {work} holds a run already; go on with --resume or name another" in error
    error = failure(capsys, mm_train, config, "--work-dir", work, "--resume", config.parent / "other/epoch_3.pth")
    assert f"--work-dir: {work} holds a run already" in error
    assert [path.name for path in work.iterdir()] == ["last_checkpoint"]


def test_resume_without_a_run_keeps_load_from(tmp_path):
    """A queue that always says --resume: the first time it starts as the config says."""
    config = Config(dict(work_dir=str(tmp_path), load_from="whole.pth", resume=False))
    mm_train.set_resume(config, "auto")
    assert (config.load_from, config.resume) == ("whole.pth", False)
    (tmp_path / "last_checkpoint").write_text("epoch_3.pth")
    mm_train.set_resume(config, "auto")
    assert (config.load_from, config.resume) == (str(tmp_path / "epoch_3.pth"), True)


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "copied"])
@pytest.mark.parametrize("asked", ["auto", None], ids=["--resume", "the config"])
def test_resume_takes_the_checkpoint_beside(tmp_path, moved, asked):
    """mmengine writes down the whole path of a checkpoint, that of the folder where it was written."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "iter_20.pth").touch()
    (old / "last_checkpoint").write_text(str(old / "iter_20.pth"))
    shutil.copytree(old, new)
    if moved:
        shutil.rmtree(old)
    config = Config(dict(work_dir=str(new), resume=asked is None))
    mm_train.set_resume(config, asked)
    assert (config.load_from, config.resume) == (str(new / "iter_20.pth"), True)


def test_resume_after_a_kill_while_the_newest_was_written_down(tmp_path):
    """The file that names the newest checkpoint is empty; a checkpoint that was cut short does not count."""
    for number in (8, 9, 10):
        torch.save({"number": number}, tmp_path / f"epoch_{number}.pth")
    torch.save({}, tmp_path / "best_coco_bbox_mAP_epoch_11.pth")
    (tmp_path / "epoch_11.pth").write_bytes((tmp_path / "epoch_10.pth").read_bytes()[:-50])
    (tmp_path / "last_checkpoint").write_text("")
    config = Config(dict(work_dir=str(tmp_path)))
    mm_train.set_resume(config, "auto")
    assert config.load_from == str(tmp_path / "epoch_10.pth")
    with pytest.raises(InputError, match="holds a run already"):
        mm_train.set_resume(Config(dict(work_dir=str(tmp_path))), None)


def test_checkpoints_in_another_folder_than_the_work_dir(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "last_checkpoint").write_text("/elsewhere/work/epoch_3.pth")
    hooks = dict(checkpoint=dict(type="CheckpointHook", out_dir=str(tmp_path / "out")))
    config = Config(dict(work_dir=str(work), default_hooks=hooks))
    assert mm_train.find_newest(config) == str(tmp_path / "out" / "work" / "epoch_3.pth")
    (work / "last_checkpoint").write_text("s3://runs/work/epoch_3.pth")
    assert mm_train.find_newest(config) == "s3://runs/work/epoch_3.pth"


@pytest.mark.parametrize(
    ("hooks", "expected"),
    [
        (None, dict(type="FiniteCheckpointHook", interval=1)),
        (dict(), dict(type="FiniteCheckpointHook", interval=1)),
        (dict(checkpoint=dict(type="CheckpointHook", interval=5)), dict(type="FiniteCheckpointHook", interval=5)),
        (dict(checkpoint=dict(type="Own", interval=5)), dict(type="Own", interval=5)),
        (dict(checkpoint=None), None),
    ],
)
def test_checkpoints_are_guarded(hooks, expected):
    config = Config(dict(default_hooks=hooks))
    mm_train.guard_checkpoints(config)
    assert config.default_hooks.checkpoint == expected


@pytest.mark.parametrize("trained", ["segmentation"], indirect=True)
def test_a_run_that_diverges(trained, tmp_path):
    """Status 1 and what to change; the good checkpoints stay, and nothing that is no number is the best."""
    _, config = trained
    work = tmp_path / "work"
    options = ["optim_wrapper.optimizer.lr=1e30", "param_scheduler=[]", "train_cfg.val_interval=1"]
    done = subprocess.run(
        command_line(
            "mm_train.py", config, "--work-dir", work, "--cfg-options", *options, "default_hooks.checkpoint.interval=1"
        ),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "in epoch 1, iteration " in error
    assert "lower optim_wrapper.optimizer.lr" in error
    assert "Traceback" not in done.stderr
    for file in work.glob("*.pth"):
        assert all(value.isfinite().all() for value in weights(file).values()), file


@pytest.mark.parametrize("trained", ["segmentation"], indirect=True)
def test_ctrl_c(trained, tmp_path):
    """Saves, says so in one line, and goes on to the weights of the run that nothing disturbed."""
    _, config = trained
    work = tmp_path / "work"
    process = subprocess.Popen(
        command_line("mm_train.py", config, "--work-dir", work),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    )
    deadline = time.monotonic() + 600
    while saved(work / "last_checkpoint") < 10:
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    newest = work / f"iter_{saved(work / 'last_checkpoint')}.pth"
    assert output.splitlines()[-1] == f"SIGINT: ended after an iteration; --resume goes on from {newest}"
    moved = work.rename(tmp_path / "moved")
    run("mm_train.py", config, "--work-dir", moved, "--resume")
    expected, found = weights(config.parent / "work" / LAST["segmentation"]), weights(moved / LAST["segmentation"])
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_image_that_is_none(config):
    (config.parent / "data/val2017/9.png").write_text("no image")
    done = subprocess.run(
        command_line("mm_train.py", config, "--work-dir", config.parent / "work"), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: 1 of the images cannot be read" in done.stderr
    assert "val2017/9.png (not an image, or a damaged one)" in done.stderr
    assert not list((config.parent / "work").glob("*.pth"))


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return exec, (f"open({str(self.file)!r}, 'w')",)


@pytest.mark.parametrize("tool", ["mm_train.py", "mm_test.py", "mm_infer.py"])
def test_nothing_is_executed(config, tool):
    folder = config.parent
    torch.save({"state_dict": {}, "meta": Trap(folder / "executed")}, folder / "trap.pth")
    args = {
        "mm_train.py": [config, "--resume", folder / "trap.pth", "--work-dir", folder / "work"],
        "mm_test.py": [config, folder / "trap.pth", "--work-dir", folder / "work"],
        "mm_infer.py": [config, folder / "trap.pth", folder / "data/val2017/8.png", "--out", folder / "a.png"],
    }
    done = subprocess.run(command_line(tool, *args[tool]), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {folder / 'trap.pth'}: holds Python objects other than tensors" in done.stderr
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("trained", ["detection"], indirect=True)
def test_fine_tuning(trained, tmp_path):
    """From a whole detector of other classes: its heads start again, all else is taken. The rate of 0 shows it."""
    _, config = trained
    checkpoint = config.parent / "work" / LAST["detection"]
    shutil.copytree(config.parent / "data", tmp_path / "data")
    for file in (tmp_path / "data/annotations").iterdir():
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "categories": [*content["categories"], dict(id=2, name="dime")]}))
    other = tmp_path / "config.py"
    other.write_text(f"""
_base_ = {str(config)!r}
model = dict(roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)))
data = dict(dataset=dict(metainfo=dict(classes=("coin", "dime"))))
train_dataloader = data
val_dataloader = data
test_dataloader = data
load_from = {str(checkpoint)!r}
optim_wrapper = dict(optimizer=dict(lr=0.0))
param_scheduler = []
train_cfg = dict(max_epochs=1, val_interval=1)
""")
    run("mm_train.py", other, "--work-dir", tmp_path / "work", "--data-root", tmp_path / "data")
    before, after = weights(checkpoint), weights(tmp_path / "work/epoch_1.pth")
    moved = {name for name, value in after.items() if value.shape != before[name].shape}
    heads = ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
    assert moved == {f"roi_head.{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    for name, value in after.items():
        assert name in moved or "running" in name or "num_batches" in name or torch.equal(value, before[name]), name


def test_bad_pictures(capsys, config):
    photo = config.parent / "data/val2017/8.png"
    checkpoint = config.parent / "none.pth"
    args = [config, checkpoint]
    assert "none.pth" in failure(capsys, mm_infer, *args, photo, "--out", config.parent / "a.png")
    assert "nowhere" in failure(capsys, mm_infer, *args, photo, "--out", config.parent / "nowhere/a.png")
    assert "config.py: not an image" in failure(capsys, mm_infer, *args, config, "--out", config.parent / "a.png")
    assert "expected a folder" in failure(capsys, mm_infer, *args, photo, photo, "--out", config)
    assert "same file" in failure(capsys, mm_infer, *args, photo, photo, "--out", config.parent / "folder")
    assert not (config.parent / "a.png").exists()
    before = photo.read_bytes()
    for out in (photo, photo.parent):
        assert "expected another place than the images'" in failure(capsys, mm_infer, *args, photo, "--out", out)
    assert photo.read_bytes() == before
    assert "expected the name of a picture" in failure(capsys, mm_infer, *args, photo, "--out", config.parent / "a.xyz")
    assert "--device: nowhere cannot be used" in failure(
        capsys, mm_infer, *args, photo, "--out", config.parent / "a.png", "--device", "nowhere"
    )
