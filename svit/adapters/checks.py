"""Checks a config before a long run: checkpoints, folders, annotations, numbers of classes."""

import inspect
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, MODELS
from PIL import Image

from svit.convert import CheckpointError, check_finite, differences, find_state_dict, listing, load, summary
from svit.folders import walk
from svit.images import EXTENSIONS

from .annotations import AnnotationFiles, check_classes, check_filter, read_annotations
from .backbone import TimmBackbone, is_address
from .checkpoints import allow_mmengine_checkpoints
from .configs import ConfigError
from .images import Sizes, is_turned
from .maps import check_maps

__all__ = ["check_backbone", "check_checkpoint", "check_data"]


def check_backbone(config: Config) -> None:
    """Builds the backbone, loads its checkpoint, and checks that neck and heads fit its maps.

    Raises:
        ConfigError: the neck or a head expects other maps. The message names it.
        CheckpointError: the file does not exist, cannot be read, or is of another model. The message says where to get
            the weights and how to train without them.
        ValueError: an argument of the backbone is wrong. The message names it.
    """
    arguments = dict(config.model.get("backbone", {}))
    if arguments.pop("type", None) in ("TimmBackbone", TimmBackbone):
        try:
            backbone = TimmBackbone(**arguments)
        except TypeError as error:
            raise ConfigError(f"model.backbone: {error}") from error
        check_maps(config.model, backbone)
        if not is_address((backbone.init_cfg or {}).get("checkpoint", "")):
            backbone.init_weights()


def check_checkpoint(config: Config, file: str, backbone_only: bool = False, resumes: bool = False) -> None:
    """Checks that a checkpoint holds all weights of the config's model. mmengine would only log what does not fit.

    Args:
        config: the result of `load_config`.
        file: path of the checkpoint. An address is not checked.
        backbone_only: the other weights may differ, as in fine-tuning.
        resumes: a training is to go on from it, so weights alone are not enough.

    Raises:
        CheckpointError: the file does not exist, cannot be read, is of another model, or its numbers are not finite.
    """
    if is_address(file):
        return
    if not Path(file).is_file():
        raise CheckpointError(f"{file}: no such checkpoint")
    allow_mmengine_checkpoints()
    start = "backbone." if backbone_only else ""
    whole = load(Path(file))
    meta = whole.get("meta") if isinstance(whole, dict) else None
    if resumes and not (isinstance(meta, dict) and {"epoch", "iter"} <= set(meta)):
        raise CheckpointError(f"{file}: holds no state of a training to go on from; set load_from to start from it")
    found = {k: v for k, v in find_state_dict(whole, Path(file)).items() if k.startswith(start)}
    with torch.device("meta"):
        expected = MODELS.build(deepcopy(config.model)).state_dict()  # a copy, since mmdet changes its argument
    expected = {k: v for k, v in expected.items() if k.startswith(start)}
    problems = summary(differences(found, expected))
    if problems:
        raise CheckpointError(f"{file}: is not of this config's {'backbone' if backbone_only else 'model'}; {problems}")
    check_finite(file, found)


def check_data(config: Config, *splits: str) -> None:
    """Checks the folders and annotations of the splits ('train', 'val', 'test'), and adapts the config to them.

    Corrected annotations in COCO's format (`check_annotations`) are written to `work_dir`, or to a temporary folder if
    the config has none. The config then names that file, and a warning lists the corrections. A segmentor's pipelines
    get a `CheckMask` behind each `LoadAnnotations`. A test split without annotations gets an evaluator that writes the
    results to `work_dir`, and a warning names the folder.

    Raises:
        ConfigError: a folder or file is missing, annotations are no JSON, are not in COCO's format or have errors, a
            class is not in them, no image is left, or a head has another number of classes.
    """
    for split in splits:
        loader = config.get(f"{split}_dataloader") or {}
        evaluators = config.get(f"{split}_evaluator") if split != "train" else None
        evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators or {}]
        files = AnnotationFiles(split, config.get("work_dir"))
        parts = list(datasets(loader.get("dataset")))
        without = []
        for dataset in parts:
            found = check_dataset(dataset, f"{split}_dataloader.dataset", files, evaluates_masks(evaluators))
            if not found and split != "test":
                raise ConfigError(f"{split}_dataloader.dataset: expected annotations, {source(dataset)} has none")
            without += [] if found else [dataset]
            if classes_of(dataset):
                check_heads(config.model, classes_of(dataset))
        if without:
            write_results_only(config, without, evaluators)
        for evaluator in evaluators:
            if evaluator.get("ann_file"):
                check_evaluator(evaluator, f"{split}_evaluator", parts, files)
        add_mask_checks(parts, config.model)
        files.write()


def datasets(dataset: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A data set, or the data sets that it wraps."""
    if dataset is None:
        return
    inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from datasets(part)


def check_dataset(dataset: dict[str, Any], where: str, files: AnnotationFiles, needs_masks: bool) -> bool:
    """Checks a data set. Returns whether it has annotations."""
    if "://" in str(dataset.get("data_root")):  # a remote store is not checked
        return True
    root = Path(dataset.get("data_root") or "")
    if not root.is_dir():
        raise ConfigError(f"{where}.data_root: no such folder: {root}. Give yours with --data-root")
    if "img_suffix" in parameters(dataset):  # a data set of mmseg, which lists folders
        return check_folders(dataset, where)
    for key, prefix in (dataset.get("data_prefix") or {}).items():
        if prefix and not (root / prefix).is_dir():
            raise ConfigError(f"{where}.data_prefix.{key}: no such folder: {root / prefix}")
    if not dataset.get("ann_file"):
        return True
    file = root / dataset["ann_file"]
    if file.suffix != ".json":
        if not file.is_file():
            raise ConfigError(f"{where}.ann_file: no such file: {file}")
        return True
    classes = classes_of(dataset)
    if not is_coco(type_of(dataset)):
        content = read_annotations(file, f"{where}.ann_file")
        check_classes(content, file, f"{where}.metainfo.classes", classes, in_order=False)
        return "annotations" in content
    needs_masks = needs_masks or any(step.get("with_mask") for step in steps(dataset))
    size_of = size_reader(dataset, root)
    content = files.check(
        dataset, file, f"{where}.ann_file", f"{where}.metainfo.classes", classes, needs_masks, size_of
    )
    if content.get("annotations") and not dataset.get("test_mode"):
        check_filter(content, file, where, classes, dataset.get("filter_cfg") or {})
    return bool(content.get("annotations"))


def source(dataset: dict[str, Any]) -> str:
    """Where a data set's annotations should be."""
    return str(Path(dataset.get("data_root") or "", dataset.get("ann_file") or masks_folder(dataset) or "."))


def is_coco(kind: type) -> bool:
    """Whether a type of data set reads files in COCO's format as CocoDataset does."""
    try:
        from mmdet.datasets import CocoDataset
    except ImportError:
        return False
    return issubclass(kind, CocoDataset) and all(
        getattr(kind, name) is getattr(CocoDataset, name) for name in ("load_data_list", "parse_data_info", "COCOAPI")
    )


def size_reader(dataset: dict[str, Any], root: Path) -> Callable[[str], tuple[int, int] | None]:
    """A function from the name of an image to its width and height in the pipeline, or None if it cannot be read."""
    loader = next((step for step in steps(dataset) if name_of(step) == "LoadImageFromFile"), {})
    turned = is_turned(loader.get("color_type", "color"), loader.get("imdecode_backend", "cv2"))
    folder = root / ((dataset.get("data_prefix") or {}).get("img") or "")

    def size_of(name: str) -> tuple[int, int] | None:
        with suppress(Exception), Image.open(folder / name) as image:
            return Sizes.of(image)[turned]
        return None

    return size_of


def steps(part: Any) -> Iterator[dict[str, Any]]:
    """The transforms in a data set's pipeline, nested ones included."""
    if isinstance(part, dict):
        if "type" in part and "pipeline" not in part:
            yield part
        part = list(part.values())
    if isinstance(part, (list, tuple)):
        for inner in part:
            yield from steps(inner)


def name_of(part: dict[str, Any]) -> str:
    """The name of a part's type, without its package."""
    kind = part["type"]
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def check_folders(dataset: dict[str, Any], where: str) -> bool:
    """Checks the folders of images and masks of a data set of mmseg. Returns whether it has masks."""
    prefixes = dataset.get("data_prefix") or {}
    root = Path(dataset.get("data_root") or "")
    images = root / (prefixes.get("img_path") or "")
    if not images.is_dir():
        raise ConfigError(f"{where}.data_prefix.img_path: no such folder: {images}")
    names_of_images(dataset, f"{where}.data_prefix.img_path")
    if (masks := masks_folder(dataset)) is None:
        return False
    folder, where = root / masks, f"{where}.data_prefix.seg_map_path"
    suffix = option(dataset, "seg_map_suffix")
    if folder.is_dir() and any(entry.name.endswith(suffix) for entry in walk(folder)):
        return True
    if where.startswith("test"):
        return False
    raise ConfigError(f"{where}: no {f'file that ends in {suffix} in' if folder.is_dir() else 'such folder:'} {folder}")


def masks_folder(dataset: dict[str, Any]) -> str | None:
    """The `seg_map_path` of a data set of mmseg, None if it has none."""
    default = parameters(dataset).get("data_prefix")
    prefixes = dataset.get("data_prefix") or (default.default if default else {})
    return prefixes.get("seg_map_path")


def names_of_images(dataset: dict[str, Any], where: str) -> list[str]:
    """The images of a data set of mmseg, relative to their folder: those in its `ann_file`, else all in the folder.

    Raises:
        ConfigError: there are none, a link leads in a circle, or mmseg would read hidden files or files of the system.
    """
    root, suffix = Path(dataset.get("data_root") or ""), option(dataset, "img_suffix")
    folder = root / ((dataset.get("data_prefix") or {}).get("img_path") or "")
    if dataset.get("ann_file"):
        file = root / dataset["ann_file"]
        if not file.is_file():
            raise ConfigError(f"{where.removesuffix('data_prefix.img_path')}ann_file: no such file: {file}")
        names = [line.strip() + suffix for line in file.read_text().splitlines()]
        if not names:
            raise ConfigError(f"{where.removesuffix('data_prefix.img_path')}ann_file: {file} lists no images")
        return names
    left_out: Counter[str] = Counter()
    entries = list(walk(folder, left_out))
    files = [os.path.relpath(entry.path, folder) for entry in entries]
    for what in left_out:
        if "link" in what:
            raise ConfigError(f"{where}: {folder} holds a {what}, which MMSegmentation would follow again and again")
    names = [name for name in files if name.endswith(suffix)]
    if not names:
        raise ConfigError(f"{where}: no file that ends in {suffix} in {folder}")
    broken = [entry.path for entry in entries if entry.name.endswith(suffix) and not entry.is_file()]
    if broken:
        raise ConfigError(f"{where}: links that lead nowhere, which MMSegmentation would leave out: {listing(broken)}")
    if any(what.endswith("/") for what in left_out):
        stray = set(list_dir_or_file(str(folder), list_dir=False, suffix=suffix, recursive=True)) - set(names)
        if stray:
            raise ConfigError(
                f"{where}: MMSegmentation would read {len(stray)} files in folders of {folder} that are hidden or a "
                f"system's: {listing(sorted(stray))}. Remove them"
            )
    others = sorted(name for name in set(files) - set(names) if Path(name).suffix.lower() in EXTENSIONS)
    if others:
        warnings.warn(
            f"{where}: {len(others)} images in {folder} do not end in img_suffix={suffix!r} and are left out: "
            f"{listing(others)}",
            stacklevel=2,
        )
    return names


def evaluates_masks(evaluators: Sequence[dict[str, Any]]) -> bool:
    return any("segm" in (evaluator.get("metric") or ()) for evaluator in evaluators)


def check_evaluator(evaluator: dict[str, Any], where: str, parts: list[dict[str, Any]], files: AnnotationFiles) -> None:
    """Checks that an evaluator's annotations can be used and cover the split's images."""
    file = Path(evaluator["ann_file"])
    if "://" in str(evaluator["ann_file"]):
        return
    if name_of(evaluator) != "CocoMetric" or file.suffix != ".json":
        if not file.is_file():
            raise ConfigError(f"{where}.ann_file: no such file: {file}")
        return
    images = {image["id"] for content in files.contents.values() for image in content["images"]}
    classes = next((classes_of(dataset) for dataset in parts), ())
    size_of = next((size_reader(part, Path(part.get("data_root") or "")) for part in parts), lambda name: None)
    name = f"{where}.ann_file"
    content = files.check(evaluator, file, name, name, classes, evaluates_masks([evaluator]), size_of)
    missing = images - {image["id"] for image in content["images"]}
    if missing:
        raise ConfigError(
            f"{where}.ann_file: {file} lacks {len(missing)} images of the data set that is evaluated, by their ids: "
            f"{listing(sorted(missing, key=str))}"
        )


def write_results_only(config: Config, without: list[dict[str, Any]], evaluators: Sequence[dict[str, Any]]) -> None:
    """Lets the evaluators of a test split without annotations write the results and compute no metrics."""
    folder = Path(config.get("work_dir") or tempfile.mkdtemp(prefix="results-"), "results").resolve()
    annotations = source(without[0])
    for evaluator in filter(None, evaluators):
        kind = name_of(evaluator)
        if kind == "CocoMetric":
            own = dict(outfile_prefix=str(folder / Path(annotations).stem))
            evaluator["ann_file"] = annotations  # has the images and categories of this split
        elif kind == "IoUMetric":
            own = dict(output_dir=str(folder))
        else:
            raise ConfigError(f"test_evaluator: {kind} needs annotations, {annotations} has none")
        evaluator.update({key: evaluator.get(key) or value for key, value in own.items()}, format_only=True)
    for dataset in without:
        if "img_suffix" in parameters(dataset):
            check_names(dataset)
            dataset["data_prefix"] = dict(img_path=(dataset.get("data_prefix") or {}).get("img_path") or "")
            dataset["pipeline"] = with_mask_check(dataset["pipeline"], None)
    warnings.warn(f"{annotations} has no annotations: results are written to {folder}, no metrics", stacklevel=2)


def check_names(dataset: dict[str, Any]) -> None:
    """Checks that image names are distinct: IoUMetric names results after the images, without their folders."""
    names = names_of_images(dataset, "test_dataloader.dataset.data_prefix.img_path")
    twice = [name for name, count in Counter(Path(name).stem for name in names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"test_dataloader.dataset: several images have the same name, {listing(twice)}; the results of one would "
            "replace the other's"
        )


def add_mask_checks(parts: list[dict[str, Any]], model: dict[str, Any]) -> None:
    """Puts a `CheckMask` behind the `LoadAnnotations` of mmseg's data sets."""
    for dataset in parts:
        classes = classes_of(dataset)
        if "reduce_zero_label" in parameters(dataset) and classes and "pipeline" in dataset:
            head = model.get("decode_head")
            head = head[-1] if isinstance(head, (list, tuple)) else head or {}
            ignored = dataset.get("ignore_index", head.get("ignore_index", 255))
            if ignored != 255:
                dataset["ignore_index"] = ignored
            check = dict(type="CheckMask", num_classes=len(classes), ignore_index=ignored)
            dataset["pipeline"] = with_mask_check(dataset["pipeline"], check)


def with_mask_check(pipeline: Sequence[Any], check: dict[str, Any] | None) -> list[Any]:
    """The pipeline with `check` after each `LoadAnnotations`, also inside nested pipelines. None removes both."""
    found: list[Any] = []
    for step in pipeline:
        if isinstance(step, (list, tuple)):
            found.append(with_mask_check(step, check))
            continue
        name = name_of(step)
        if name == "TestTimeAug":  # each list in it holds alternatives
            lists = []
            for choice in step["transforms"]:
                lists += [[part] for part in with_mask_check(choice, check)] if len(choice) == 1 else [choice]
            step = type(step)({**step, "transforms": lists})
        elif step.get("transforms"):
            step = type(step)({**step, "transforms": with_mask_check(step["transforms"], check)})
        if name != "CheckMask" and (check or name != "LoadAnnotations"):
            found.append(step)
        if check and name == "LoadAnnotations":
            found.append(dict(check))
    return found


def classes_of(dataset: dict[str, Any]) -> Sequence[str]:
    """The classes of a data set: the config's own, else those of its type, else ()."""
    own = (dataset.get("metainfo") or {}).get("classes")
    return own or getattr(type_of(dataset), "METAINFO", {}).get("classes", ())


def option(dataset: dict[str, Any], name: str) -> Any:
    """An argument of a data set: the config's own, else its type's default, else None."""
    default = parameters(dataset).get(name)
    return dataset.get(name, default.default if default else None)


def parameters(dataset: dict[str, Any]) -> Mapping[str, inspect.Parameter]:
    """The arguments of a data set's type and of its base classes, with their defaults."""
    kinds: list[Any] = [kind for kind in reversed(type_of(dataset).__mro__) if kind is not object]
    return {name: value for kind in kinds for name, value in inspect.signature(kind.__init__).parameters.items()}


def type_of(dataset: dict[str, Any]) -> type:
    if not isinstance(dataset["type"], str):
        return dataset["type"]
    with DATASETS.switch_scope_and_registry(None) as registry:  # that of the config's package
        found = registry.get(dataset["type"])
    if found is None:
        raise ConfigError(f"dataset.type: no data set {dataset['type']!r} in {registry.scope}")
    return found


def check_heads(model: Any, classes: Sequence[str], name: str = "model") -> None:
    """Checks that every head that predicts classes has as many outputs as the data has classes."""
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
