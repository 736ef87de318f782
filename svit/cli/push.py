"""Pushes a checkpoint to the Hugging Face Hub, or writes the same files to a folder.

    svit push best.safetensors me/svit_nano_cifar10 --metrics "CIFAR-10 top-1=91.2" --dataset cifar10
    svit push best.safetensors me/svit_nano_cifar10 --local svit_nano_cifar10

The files are timm's (config.json, model.safetensors) and a model card, so that `timm.create_model("hf-hub:me/...",
pretrained=True)` and "local-dir:..." load the model, after `import svit`. Pushing needs a token: `hf auth login`.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are not in its __all__
    HFValidationError,
    validate_repo_id,
)
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn

from svit.checkpoints import create_model, pretrained_cfg, read_metadata
from svit.errors import InputError
from svit.files import atomic_write
from svit.images import MODES
from svit.models import SViT

from .base import make_parser

TASK = "image-classification"

# Jinja, where {%- takes the line break before it away.
CARD = """---
{{ card_data }}
---

# {{ repo_id.split("/")[-1] }}
{% if svit %}
A Super Token Vision Transformer (SViT), [arXiv 2211.11167](https://arxiv.org/abs/2211.11167), for image classification.
{%- else %}
A model of timm for image classification.
{%- endif %}

- Model: `{{ architecture }}`, {{ "%.1f" | format(params / 1e6) }} M parameters
- Classes: {{ num_classes }}
- Images: {{ size[1] }} x {{ size[2] }} pixels, {{ size[0] }} channels
- Licence: {{ license }}

## Usage

```python
{%- if svit %}
import svit  # first: it registers the models
{%- endif %}
import timm
{%- if svit %}
from svit.images import read_image
{%- else %}
from PIL import Image, ImageOps
{%- endif %}

model = timm.create_model("hf-hub:{{ repo_id }}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
{%- if svit %}
image = read_image("photo.jpg", "{{ mode }}")
{%- else %}
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{{ mode }}")
{%- endif %}
logits = model(transform(image).unsqueeze(0))
names = model.pretrained_cfg.get("label_names")  # of the classes, where they are known
```
{%- if results %}

## Results

| dataset | metric | value |
|---|---|---|
{%- for result in results %}
| {{ result.dataset_name }} | {{ result.metric_name }} | {{ result.metric_value }} |
{%- endfor %}
{%- endif %}
{%- if facts %}

## Training

What the training wrote into the checkpoint:

```yaml
{{ facts }}```
{%- endif %}
{%- if svit %}

## Citation

```bibtex
@inproceedings{huang2023vision,
  title = {Vision Transformer with Super Token Sampling},
  author = {Huang, Huaibo and Zhou, Xiaoqiang and Cao, Jie and He, Ran and Tan, Tieniu},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2023}
}
```
{%- endif %}
"""


def parser() -> argparse.ArgumentParser:
    parser = make_parser("push", __doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help=".safetensors, or a file of torch.save")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name")
    parser.add_argument("--model", metavar="NAME", help="of timm or svit; default: what the checkpoint says")
    parser.add_argument("--private", action="store_true", help="if the repository is new")
    parser.add_argument(
        "--license", metavar="ID", help="as the Hub spells it; default: mit, of weights that started from no others"
    )
    parser.add_argument(
        "--metrics", metavar="'DATASET METRIC=VALUE'", nargs="+", default=[], help="such as 'CIFAR-10 top-1=91.2'"
    )
    parser.add_argument("--dataset", metavar="NAME", help="trained on; the Hub's name of it")
    parser.add_argument("--local", metavar="DIR", type=Path, help="write the files there, push nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    args = parser().parse_args(argv)
    check_repo_id("REPO_ID", args.repo_id)
    if args.dataset:
        check_repo_id("--dataset", args.dataset)
    results = [parse_metric(text, args.dataset) for text in args.metrics]
    model, facts = load(args.checkpoint, args.model)
    license = args.license or default_license(facts)
    card = dict(facts=facts, results=results, license=license, dataset=args.dataset)
    if args.local:
        write_folder(args.local, model, args.repo_id, **card)
        print(f'wrote {args.local}; timm.create_model("local-dir:{args.local}", pretrained=True) loads it')
    else:
        url = push(model, args.repo_id, args.private, **card)
        print(f"pushed to {url}")
    return 0


def check_repo_id(what: str, name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{what}: {error}") from error


def parse_metric(text: str, dataset: str | None) -> EvalResult:
    """The result that 'CIFAR-10 top-1=91.2' means; without a dataset of its own it is on `dataset`."""
    words, _, number = text.rpartition("=")
    named, _, metric = words.strip().rpartition(" ")
    dataset = named.strip() or dataset
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not metric or not math.isfinite(value):
        raise InputError(f"--metrics: expected 'DATASET METRIC=NUMBER', got {text!r}")
    if dataset is None:
        raise InputError(f"--metrics: {text!r} names no dataset, and there is no --dataset")
    return EvalResult(
        task_type=TASK,
        dataset_type=re.sub("[^a-z0-9/._]+", "-", dataset.lower()),
        dataset_name=dataset,
        metric_type="accuracy" if metric.startswith("top") else metric,
        metric_name=metric,
        metric_value=value,
    )


def load(checkpoint: Path, name: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, and how it was trained as far as the checkpoint tells."""
    metadata = read_metadata(checkpoint)
    name = name or metadata["pretrained_cfg"].get("architecture")
    if name is None:
        raise InputError(f"{checkpoint}: does not say which model it is of; --model NAME does")
    return create_model(name, checkpoint), metadata["facts"]


def default_license(facts: Mapping[str, Any]) -> str:
    """Ours; an error for weights that were trained from others, whose licence may say more."""
    recipe = facts.get("recipe", {})
    for key in ("pretrained", "checkpoint"):
        if recipe.get(key):
            raise InputError(f"--license: expected one, since the training started from others ({key}: {recipe[key]})")
    return "mit"


def write_folder(folder: Path, model: nn.Module, repo_id: str, **card: Any) -> None:
    """Writes the files to a new folder, whole or not at all.

    Raises:
        InputError: the folder is there and not empty, or cannot be written.
    """
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder}: exists already")
        with atomic_write(folder) as part:
            write_files(part, model, repo_id, **card)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error


def push(model: nn.Module, repo_id: str, private: bool, **card: Any) -> str:
    """Uploads the files in one commit, to a new repository or on top of what is there; returns the repository's URL.

    Raises:
        InputError: the Hub cannot be reached or refuses.
    """
    api = HfApi(library_name="timm")
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            write_files(Path(folder), model, repo.repo_id, **card)
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="Add the model")
    except Exception as error:  # the Hub's own errors, the network's, those of missing tokens
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{repo_id}: cannot be pushed: {reason}") from error
    return str(repo)


def write_files(
    folder: Path,
    model: nn.Module,
    repo_id: str,
    facts: Mapping[str, Any],
    results: list[EvalResult],
    license: str,
    dataset: str | None,
) -> None:
    """Weights and configuration as timm writes them, and the model card."""
    architecture = pretrained_cfg(model)["architecture"].partition(".")[0]  # without the tag of timm's weights
    config: dict[str, Any] = dict(pretrained_cfg=dict(architecture=architecture, license=license, tag=None))
    names = pretrained_cfg(model).get("label_names")
    if names and len(names) == model.num_classes:
        config["label_names"] = list(names)
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
    drop_repeated_arguments(folder / "config.json")
    # safetensors makes a file for its owner alone.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)

    svit = isinstance(model, SViT)
    data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag=TASK,
        tags=[TASK, "timm", *(["svit"] if svit else [])],
        datasets=[dataset] if dataset else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo_id.split("/")[-1],
        eval_results=results or None,
    )
    shown = without_places(facts)
    size = resolve_model_data_config(model)["input_size"]
    card = ModelCard.from_template(
        data,
        template_str=CARD,
        repo_id=repo_id,
        svit=svit,
        architecture=architecture,
        params=sum(p.numel() for p in model.parameters()),
        num_classes=model.num_classes,
        size=size,
        mode=MODES.get(size[0], "RGB"),
        license=license,
        results=results,
        facts=yaml.safe_dump(shown, sort_keys=False) if shown else "",
    )
    card.save(folder / "README.md")


def drop_repeated_arguments(path: Path) -> None:
    """Takes num_classes out of the model_args of timm's config.json, which says it once more at its top.

    timm takes either; transformers passes both, and its models end in "multiple values for num_classes".
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_args", {}).pop("num_classes", None) is not None:
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def without_places(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without absolute paths: where files lay on one machine says nothing to others."""
    return {
        key: without_places(value) if isinstance(value, Mapping) else value
        for key, value in facts.items()
        if not (isinstance(value, str) and Path(value).is_absolute())
    }
