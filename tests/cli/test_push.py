import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled

from svit.checkpoints import create_model, save_model
from svit.cli import command, push

CLASSES = [f"class {i}" for i in range(10)]
FACTS = dict(top1=91.25, recipe={"opt": "adamw", "data_dir": "/data/cifar10", "mean": [0.5, 0.4, 0.3]})
METRICS = ["--metrics", "CIFAR-10 top-1=91.25", "CIFAR-10 top-5=99", "loss=0.4", "--dataset", "cifar10"]


@pytest.fixture
def model():
    overlay = dict(mean=(0.5, 0.4, 0.3), input_size=(3, 48, 64), interpolation="nearest", label_names=CLASSES)
    torch.manual_seed(0)
    model = timm.create_model("test_svit.untrained", num_classes=10, pretrained_cfg_overlay=overlay).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    return model


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, model):
    """Runs the tool in a folder that holds a checkpoint only: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("best.safetensors"), model, "test_svit.untrained", CLASSES, **FACTS)

    def run(*args: str) -> tuple[int, str, str]:
        status = command("push")(list(args))
        return status, *capsys.readouterr()

    return run


def check_files(folder: str, model: torch.nn.Module, repo_id: str) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 64)
    assert torch.equal(loaded(x), model(x))
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["mean"], config["input_size"], config["interpolation"]) == ([0.5, 0.4, 0.3], (3, 48, 64), "nearest")
    assert loaded.pretrained_cfg["label_names"] == CLASSES
    written = json.loads(Path(folder, "config.json").read_text())
    assert written["label_names"] == CLASSES
    assert written["num_classes"] == 10
    assert "num_classes" not in written.get("model_args", {})  # transformers passes it by itself
    assert f'timm.create_model("hf-hub:{repo_id}", pretrained=True)' in Path(folder, "README.md").read_text()


def test_folder_loads_with_timm(run, model):
    status, out, err = run("best.safetensors", "me/small", "--local", "folder")
    assert (status, err) == (0, "")
    assert out == 'wrote folder; timm.create_model("local-dir:folder", pretrained=True) loads it\n'
    assert sorted(os.listdir()) == ["best.safetensors", "folder"]
    check_files("folder", model, "me/small")
    modes = {path.stat().st_mode for path in Path("folder").iterdir()}
    assert len(modes) == 1  # the weights too are for whom the folder is


def test_card(run):
    assert run("best.safetensors", "me/small", "--license", "apache-2.0", *METRICS, "--local", "folder")[0] == 0
    card = ModelCard.load("folder/README.md")
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert (data.datasets, data.metrics, data.model_name) == (["cifar10"], ["accuracy", "loss"], "small")
    assert data.tags == ["image-classification", "timm", "svit"]
    fields = ("task_type", "dataset_type", "dataset_name", "metric_type", "metric_name", "metric_value")
    results = [tuple(getattr(result, field) for field in fields) for result in data.eval_results]
    assert results == [
        ("image-classification", "cifar-10", "CIFAR-10", "accuracy", "top-1", 91.25),
        ("image-classification", "cifar-10", "CIFAR-10", "accuracy", "top-5", 99.0),
        ("image-classification", "cifar10", "cifar10", "loss", "loss", 0.4),
    ]
    assert "| CIFAR-10 | top-1 | 91.25 |\n| CIFAR-10 | top-5 | 99.0 |\n" in card.text
    assert "```yaml\ntop1: 91.25\nrecipe:\n  opt: adamw\n  mean:\n  - 0.5\n" in card.text
    assert "/data/cifar10" not in card.text  # a place on one machine
    usage = card.text.split("```python\n")[1].split("```")[0]
    assert usage.startswith("import svit")
    compile(usage, "usage", "exec")
    assert "title = {Vision Transformer with Super Token Sampling}" in card.text
    assert "\n\n\n" not in card.text


def test_card_of_another_model_without_facts(run):
    model = create_model("test_resnet")
    torch.save(model.state_dict(), "theirs.pth")
    status, _, err = run("theirs.pth", "me/small", "--model", "test_resnet", "--local", "folder")
    assert (status, err) == (0, "")
    text = Path("folder/README.md").read_text()
    assert "`test_resnet`" in text
    assert not any(word in text for word in ("svit", "Super Token", "## Training", "## Results", "model-index"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(timm.create_model("local-dir:folder", pretrained=True).eval()(x), model(x))


def test_the_licence_of_weights_that_started_from_others(run, model):
    for key, value in (("pretrained", True), ("checkpoint", "svit_small.safetensors")):
        save_model(Path("tuned.safetensors"), model, "test_svit", recipe={key: value})
        status, _, err = run("tuned.safetensors", "me/small", "--local", "folder")
        assert status == 1
        assert f"--license: expected one, since the training started from others ({key}: {value})" in err
        assert not Path("folder").exists()
    assert run("tuned.safetensors", "me/small", "--license", "cc-by-nc-4.0", "--local", "folder")[0] == 0
    assert ModelCard.load("folder/README.md").data.license == "cc-by-nc-4.0"


def test_upload(run, model, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/owner/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            check_files(folder_path, model, repo_id)
            calls.append(("upload_folder", repo_id, options))

    monkeypatch.setattr(push, "HfApi", Hub)
    status, out, err = run("best.safetensors", "small", "--private")
    assert (status, out, err) == (0, "pushed to https://huggingface.co/owner/small\n", "")
    assert calls == [
        ("create_repo", "small", dict(private=True, exist_ok=True)),
        ("upload_folder", "owner/small", dict(commit_message="Add the model")),
    ]
    assert os.listdir() == ["best.safetensors"]
    assert run("best.safetensors", "small")[0] == 0
    assert calls[2] == ("create_repo", "small", dict(private=False, exist_ok=True))


def test_no_hub(run, monkeypatch):
    def refuse(*_, **__):
        raise OfflineModeIsEnabled("Cannot reach it.\nReally.")

    monkeypatch.setattr(push.HfApi, "create_repo", refuse)
    assert run("best.safetensors", "me/small") == (1, "", "error: me/small: cannot be pushed: Cannot reach it.\n")


BAD = {
    "none.safetensors me/small": "none.safetensors: no such file\n",
    "best.safetensors me/small/er": "REPO_ID: Repo id must be in the form",
    "best.safetensors me/small --dataset a=b": "--dataset: Repo id must use alphanumeric chars",
    "best.safetensors me/small --dataset d --metrics top-1": "--metrics: expected 'DATASET METRIC=NUMBER', got 'top",
    "best.safetensors me/small --dataset d --metrics top-1=a": "--metrics: expected 'DATASET METRIC=NUMBER', got 'top",
    "best.safetensors me/small --dataset d --metrics top=nan": "--metrics: expected 'DATASET METRIC=NUMBER', got 'top",
    "best.safetensors me/small --dataset d --metrics =1": "--metrics: expected 'DATASET METRIC=NUMBER', got '=1'\n",
    "best.safetensors me/small --metrics top-1=1": "--metrics: 'top-1=1' names no dataset, and there is no --dataset\n",
    "best.safetensors me/small --model svit_smal": "model: no model 'svit_smal' in timm; did you mean svit_small",
    "best.safetensors me/small --model svit_nano": "best.safetensors: does not fit the model; ",
    "bare.pth me/small": "bare.pth: does not say which model it is of; --model NAME does\n",
    "bad.safetensors me/small": "bad.safetensors: cannot be read; it is damaged",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_arguments(run, line):
    Path("bad.safetensors").write_bytes(b"nothing")
    torch.save({"a": torch.zeros(1)}, "bare.pth")
    before = sorted(os.listdir())
    status, out, err = run(*line.split(), "--local", "folder")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {BAD[line]}")
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == before


def test_folder_whole_or_not_at_all(run, monkeypatch):
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    assert run("best.safetensors", "me/small", "--local", "full") == (1, "", "error: full: exists already\n")
    assert os.listdir("full") == ["file"]

    assert run("best.safetensors", "me/small", "--local", "none/folder")[2].startswith("error: none/folder: cannot be")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(ModelCard, "save", full_disk)
    status, out, err = run("best.safetensors", "me/small", "--local", "folder")
    assert (status, out, err) == (1, "", "error: folder: cannot be written (No space left on device)\n")
    assert sorted(os.listdir()) == ["best.safetensors", "full"]
