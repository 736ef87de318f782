"""What a config asks for, looked at before a long run: checkpoints, folders, annotations, numbers of classes."""

import inspect
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from svit.convert import CheckpointError, differences, listing, read_state_dict, summary

from .backbone import TimmBackbone, is_address
from .checkpoints import allow_mmengine_checkpoints
from .configs import ConfigError

__all__ = ["check_backbone", "check_checkpoint", "check_data"]


def check_backbone(config: Config) -> None:
    """Builds the backbone and loads the file that it starts from, to see whether that works.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is of another model; says where to get the
            weights and how to do without.
        ValueError: an argument of the backbone is wrong; names it.
    """
    arguments = dict(config.model.get("backbone", {}))
    if arguments.pop("type", None) in ("TimmBackbone", TimmBackbone):
        try:
            backbone = TimmBackbone(**arguments)
        except TypeError as error:
            raise ConfigError(f"model.backbone: {error}") from error
        if not is_address((backbone.init_cfg or {}).get("checkpoint", "")):
            backbone.init_weights()


def check_checkpoint(config: Config, file: str, backbone_only: bool = False) -> None:
    """Whether a checkpoint holds the config's whole model; mmengine would leave out, and only log, what does not fit.

    Args:
        config: as `load_config` gives it.
        file: path of the checkpoint; an address is not looked at.
        backbone_only: the rest may differ, as in fine-tuning.

    Raises:
        CheckpointError: there is no such file, it cannot be read, or it is of another model.
    """
    if is_address(file):
        return
    if not Path(file).is_file():
        raise CheckpointError(f"{file}: no such checkpoint")
    allow_mmengine_checkpoints()
    start = "backbone." if backbone_only else ""
    found = {k: v for k, v in read_state_dict(Path(file)).items() if k.startswith(start)}
    with torch.device("meta"):
        expected = MODELS.build(deepcopy(config.model)).state_dict()  # mmdet writes into what it builds from
    expected = {k: v for k, v in expected.items() if k.startswith(start)}
    problems = summary(differences(found, expected))
    if problems:
        raise CheckpointError(f"{file}: is not of this config's {'backbone' if backbone_only else 'model'}; {problems}")


def check_data(config: Config, *splits: str) -> None:
    """Whether folders and annotations of the splits ('train', 'val', 'test') are there and can be read.

    Raises:
        ConfigError: a folder or file is missing, annotations are no JSON or not COCO's, a class is not in
            them, or a head has another number of classes.
    """
    for split in splits:
        loader = config.get(f"{split}_dataloader") or {}
        for dataset in datasets(loader.get("dataset")):
            check_dataset(dataset, f"{split}_dataloader.dataset")
            if classes_of(dataset):
                check_heads(config.model, classes_of(dataset))
        evaluators = config.get(f"{split}_evaluator") if split != "train" else None
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators or {}]:
            if evaluator.get("ann_file"):
                check_annotations(Path(evaluator["ann_file"]), f"{split}_evaluator.ann_file")


def datasets(dataset: dict | None) -> Iterator[dict]:
    """A data set, or those that it wraps."""
    if dataset is None:
        return
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from datasets(part)


def check_dataset(dataset: dict, where: str) -> None:
    if "://" in str(dataset.get("data_root")):  # a store of another kind is left alone
        return
    root = Path(dataset.get("data_root") or "")
    if not root.is_dir():
        raise ConfigError(f"{where}.data_root: no such folder: {root}. Give yours with --data-root")
    suffixes = {"img_path": "img_suffix", "seg_map_path": "seg_map_suffix"}  # of mmseg, which lists the folders
    for key, prefix in (dataset.get("data_prefix") or {}).items():
        folder = root / prefix
        if prefix and not folder.is_dir():
            raise ConfigError(f"{where}.data_prefix.{key}: no such folder: {folder}")
        suffix = option(dataset, suffixes[key]) if key in suffixes else None
        if suffix and next(folder.rglob(f"*{suffix}"), None) is None:
            raise ConfigError(f"{where}.data_prefix.{key}: no file that ends in {suffix} in {folder}")
    if dataset.get("ann_file"):
        file = root / dataset["ann_file"]
        found = check_annotations(file, f"{where}.ann_file")
        classes = classes_of(dataset)
        unknown = [name for name in classes if found is not None and name not in found]
        if unknown:  # mmdet would train without them and fail at the first evaluation
            has = listing(sorted(found))
            raise ConfigError(f"{where}.metainfo.classes: {listing(unknown)} no category of {file}, which has {has}")


def classes_of(dataset: dict) -> Sequence[str]:
    """The classes of a data set: the config's own, else those of its type, else none."""
    own = (dataset.get("metainfo") or {}).get("classes")
    return own or getattr(type_of(dataset), "METAINFO", {}).get("classes", ())


def option(dataset: dict, name: str) -> Any:
    """An argument of a data set: the config's own, else its type's default, else None."""
    default = inspect.signature(type_of(dataset)).parameters.get(name)
    return dataset.get(name, default.default if default else None)


def type_of(dataset: dict) -> type:
    if not isinstance(dataset["type"], str):
        return dataset["type"]
    with DATASETS.switch_scope_and_registry(None) as registry:  # that of the config's package
        found = registry.get(dataset["type"])
    if found is None:
        raise ConfigError(f"dataset.type: no data set {dataset['type']!r} in {registry.scope}")
    return found


def check_heads(model: Any, classes: Sequence[str], name: str = "model") -> None:
    """Whether every head that tells the data's classes apart has an output for each."""
    heads = ("bbox_head", "mask_head", "decode_head", "auxiliary_head")
    if isinstance(model, dict):
        outputs = model.get("num_classes")
        if outputs not in (None, len(classes)) and name.rstrip(".0123456789").endswith(heads):
            raise ConfigError(f"{name}.num_classes: expected {len(classes)}, the classes of the data, got {outputs}")
        for key, value in model.items():
            check_heads(value, classes, f"{name}.{key}")
    elif isinstance(model, (list, tuple)):
        for i, value in enumerate(model):
            check_heads(value, classes, f"{name}.{i}")


def check_annotations(file: Path, where: str) -> set[str] | None:
    """Names of the categories in a file of COCO's format; None for a file that is no JSON by its name."""
    if not file.is_file():
        raise ConfigError(f"{where}: no such file: {file}")
    if file.suffix != ".json":
        return None
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:  # also bytes that are no text
        raise ConfigError(f"{where}: {file} is not JSON ({error})") from error
    wanted = ("images", "annotations", "categories")
    missing = [key for key in wanted if not isinstance(content, dict) or key not in content]
    if missing:
        raise ConfigError(f"{where}: {file} is not in COCO's format, it has no {', '.join(missing)}")
    return {category["name"] for category in content["categories"]}
