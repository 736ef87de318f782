"""Models by name, with the weights and the preprocessing of a checkpoint; and writing such checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import safetensors
import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from svit.convert import CheckpointError, check_finite, differences, read_state_dict, summary, write_safetensors
from svit.errors import InputError
from svit.files import check_utf8
from svit.images import channel_values
from svit.models.original import from_original, is_original
from svit.names import did_you_mean, distinct

__all__ = [
    "adapt_preprocessing",
    "class_names",
    "create_model",
    "has_fixed_size",
    "load_weights",
    "names_weights",
    "pretrained_cfg",
    "read_metadata",
    "read_weights",
    "save_model",
    "size_argument",
    "start_from",
    "trained_arguments",
]

# What a checkpoint tells of its model, as timm's pretrained_cfg names it.
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")

# Arguments of `timm.create_model` that do not make it another model; neither do those that drop something in training.
NOT_THE_MODEL = ("num_classes", "backend", "differentiable_association")


def create_model(
    name: str,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    ema: bool = False,
    **arguments: Any,
) -> nn.Module:
    """A model of timm with the weights of a checkpoint, in eval mode.

    A checkpoint of ours (`save_model`) says how many classes it has, what they are called and how images are
    preprocessed; the model then has these in its `pretrained_cfg`, where `timm.data.resolve_data_config` looks. One of
    `svit train` says the recipe's `model_args` too.

    Args:
        name: any model of timm; `hf-hub:` and `local-dir:` names work too.
        checkpoint: `.safetensors` or a file of `torch.save`; loaded strictly.
        pretrained: download timm's weights; not together with a checkpoint.
        ema: take the moving average from a file that holds both.
        arguments: of `timm.create_model`, such as num_classes; they go before what the checkpoint says.

    Raises:
        InputError: no such model (near names are listed), it does not take the arguments, or timm's weights of it
            cannot be had.
        CheckpointError: the checkpoint cannot be read or does not fit the model.
    """
    if "/" not in name and ":" not in name and not timm.is_model(name):
        raise InputError(f"model: no model {name!r} in timm{did_you_mean(name, timm.list_models())}")
    if checkpoint is not None:
        if pretrained:
            raise InputError("pretrained: expected False together with a checkpoint, got True")
        metadata = read_metadata(checkpoint)
        arguments = {**metadata["facts"].get("recipe", {}).get("model_args", {}), **arguments}
        cfg = metadata["pretrained_cfg"]
        arguments.setdefault("pretrained_cfg_overlay", cfg)
        if "num_classes" in cfg:
            arguments.setdefault("num_classes", cfg["num_classes"])
    elif ema:
        raise InputError("ema: expected a checkpoint that holds the moving average, got none")
    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # timm, the model and the download can raise nearly anything
        shown = {key: value for key, value in arguments.items() if key != "pretrained_cfg_overlay"}
        given = f" with {shown}" if shown else ""
        raise InputError(f"model: {name} cannot be made{given}: {' '.join(str(error).split())}") from error
    adapt_preprocessing(model, arguments.get("in_chans"))
    if pretrained:
        check_finite(name, model.state_dict())
    if checkpoint is not None:
        load_weights(model, checkpoint, ema)
    return model.eval()


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """The `pretrained_cfg` of a model of timm, which the type `nn.Module` does not list."""
    return cast(dict[str, Any], model.pretrained_cfg)


def adapt_preprocessing(model: nn.Module, in_chans: int | None) -> None:
    """Makes input size, mean and standard deviation in `pretrained_cfg` those of the model's channels.

    timm leaves them as they are for three. `in_chans` is its argument; None: what `pretrained_cfg` says.
    """
    cfg = pretrained_cfg(model)
    channels, *size = cfg.get("input_size") or (3, 224, 224)
    in_chans = channels if in_chans is None else in_chans
    if in_chans != channels:
        cfg["input_size"] = (in_chans, *size)
    for key in ("mean", "std"):
        if cfg.get(key) and len(cfg[key]) != in_chans:
            cfg[key] = channel_values(cfg[key], in_chans)


def load_weights(model: nn.Module, checkpoint: str | Path, ema: bool = False) -> None:
    """Loads a checkpoint strictly; the authors' files work for their models.

    Raises:
        CheckpointError: it cannot be read, does not fit, or its numbers are not finite.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: no such file")
    state_dict = read_weights(path, ema)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        problems = summary(differences(state_dict, model.state_dict())) or error
        raise CheckpointError(f"{checkpoint}: does not fit the model; {problems}") from error


def trained_arguments(checkpoint: str | Path) -> dict[str, Any]:
    """The `model_args` that a checkpoint of `svit train` was trained with, as far as they make the model another one.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not Path(checkpoint).is_file():
        raise CheckpointError(f"checkpoint: no such file: {checkpoint}")
    arguments = read_metadata(checkpoint)["facts"].get("recipe", {}).get("model_args", {})
    return {key: value for key, value in arguments.items() if "drop" not in key and key not in NOT_THE_MODEL}


def start_from(model: nn.Module, checkpoint: str | Path, arguments: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Loads a checkpoint to fine-tune from; a head of another number of classes is left as it is.

    Args:
        model: made with `arguments`.
        checkpoint: the file.
        arguments: of `timm.create_model`, which must be those that the checkpoint tells. The shapes of many weights do
            not depend on them: other cells would go unnoticed.

    Raises:
        CheckpointError: it cannot be read, is of another model, or its numbers are not finite.
    """
    trained = trained_arguments(checkpoint)
    trained.pop("img_size", None)  # fine-tuning may change it
    for key, value in trained.items():
        given = json.loads(json.dumps(arguments.get(key)))  # lists for tuples
        if given != value:
            raise CheckpointError(
                f"checkpoint: {checkpoint} was trained with model_args {key}: {value}, the model is made with "
                f"{given if key in arguments else 'its default'}; leave it out of model_args to take the checkpoint's"
            )
    weights, expected = read_weights(Path(checkpoint)), model.state_dict()
    classifier = pretrained_cfg(model).get("classifier") or ()
    for name in (classifier,) if isinstance(classifier, str) else classifier:
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in weights and key in expected and weights[key].shape != expected[key].shape:
                weights[key] = expected[key]
    problems = summary(differences(weights, expected))
    if problems:
        raise CheckpointError(f"checkpoint: {checkpoint} does not fit the model; {problems}")
    model.load_state_dict(weights)


def read_weights(path: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    """The weights in a file under our names. Our models take the authors' names too, but errors name our keys.

    Raises:
        CheckpointError: the file cannot be read, or its numbers are not finite.
    """
    state_dict = read_state_dict(path, ema)
    check_finite(path, state_dict)
    return from_original(state_dict) if is_original(state_dict) else state_dict


def save_model(
    path: Path,
    model: nn.Module,
    name: str,
    classes: list[str] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    **facts: Any,
) -> None:
    """Writes the weights as safetensors that `create_model` and timm's `checkpoint_path=` read; whole or not at all.

    Args:
        path: the file.
        model: of timm; its `pretrained_cfg` says how images are preprocessed.
        name: its name in timm.
        classes: names of the classes, in the order of the logits.
        weights: the model's own; another state dict of it, say a moving average, goes before.
        facts: further values that `read_metadata` returns under "facts", such as the accuracy.

    Raises:
        OSError: the file cannot be written; an older one is left as it was.
    """
    cfg = {key: value for key, value in pretrained_cfg(model).items() if key in PREPROCESSING}
    # A model on a hub or in a folder is known there alone by that name.
    cfg.update(architecture=pretrained_cfg(model).get("architecture", name) if ":" in name else name)
    cfg.update(num_classes=model.num_classes)
    if classes:
        cfg["label_names"] = classes
    metadata = {"pretrained_cfg": json.dumps(cfg), "facts": json.dumps(facts)}
    write_safetensors(path, weights or model.state_dict(), metadata)


def read_metadata(checkpoint: str | Path) -> dict[str, Any]:
    """What `save_model` wrote beside the weights: "pretrained_cfg" and "facts", both empty in files without such.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: no such file")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        check_utf8(str(checkpoint), str(checkpoint))
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        return {key: json.loads(metadata.get(key, "{}")) for key in ("pretrained_cfg", "facts")}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read; it is damaged or cut short ({error})") from error


def class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes: those of its checkpoint, ImageNet's where it has 1000 of them, else numbers.

    Folders of ImageNet are named by WordNet ("n01440764"); such names are put into words ("tench, Tinca tinca"). No two
    are the same: ImageNet's cranes are "crane (n02012849)", the bird, and "crane (n03126707)".
    """
    names, info = pretrained_cfg(model).get("label_names"), timm.data.ImageNetInfo()
    num_classes = cast(int, model.num_classes)
    if not names or len(names) != num_classes:
        if num_classes != 1000:
            return [str(index) for index in range(num_classes)]
        names = info.label_names()
    try:
        words = [info.label_name_to_description(name) for name in names]
    except KeyError:  # not WordNet's
        words = names
    return distinct(words, names)


def has_fixed_size(name: str) -> bool:
    """Whether a model of timm is made for one size of image, which its argument `img_size` sets.

    Raises:
        InputError: no such model, or it has no weights of the name behind the dot.
    """
    if ":" in name:
        return bool(pretrained_cfg(create_model(name)).get("fixed_input_size"))
    cfg = find_cfg(name)
    return cfg is not None and bool(cfg.fixed_input_size)


def size_argument(name: str, img_size: int | tuple[int, int] | None) -> dict[str, Any]:
    """What `timm.create_model` needs to make a model for images of that size: `img_size` if the model has one alone."""
    return {"img_size": img_size} if img_size and has_fixed_size(name) else {}


def names_weights(name: str) -> bool:
    """Whether a name says where weights are: on a hub, in a folder, or by a tag (`svit_nano.photos20`).

    Raises:
        InputError: the model has no weights of the name behind the dot.
    """
    if ":" in name:
        return True
    cfg = find_cfg(name) if "." in name else None
    return cfg is not None and bool(cfg.has_weights)


def find_cfg(name: str) -> PretrainedCfg | None:
    """What timm knows of a model and its weights; None of a model on a hub, in a folder or of no name of timm's."""
    try:
        return timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as error:
        raise InputError(f"model: {error}") from error
