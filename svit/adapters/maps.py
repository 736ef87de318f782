"""Checks that the neck and the heads of a detector or segmentor fit their feature maps."""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from .backbone import TimmBackbone
from .configs import ConfigError

__all__ = ["check_maps"]


class Maps(NamedTuple):
    """Channels and strides of feature maps, and their source, for messages."""

    channels: list[int]
    strides: list[int]
    source: str


def check_maps(model: Config, backbone: TimmBackbone) -> None:
    """Compares the maps that the neck and the heads expect with those that they get.

    Args:
        model: the config's `model`.
        backbone: built from it.

    Raises:
        ConfigError: channels, strides or numbers of maps contradict each other, or neck or model cannot be built.
    """
    indices = ", ".join(map(str, backbone.out_indices))
    maps = Maps(list(backbone.channels), list(backbone.strides), f"{backbone.arch}'s maps {indices}")
    if model.get("neck"):
        behind_neck = through_neck(model["neck"], maps)
        if behind_neck is None:
            return
        maps = behind_neck
    # Only the heads matter, so the smallest backbone will do.
    light = deepcopy(dict(model))
    light["backbone"] = dict(type="TimmBackbone", arch="test_svit")
    built = build(light, "model", "meta", "cpu")  # on "meta" the weights take no memory
    for name in ("rpn_head", "bbox_head", "mask_head"):
        if isinstance(getattr(built, name, None), nn.Module) and isinstance(model.get(name), dict):
            check_dense_head(getattr(built, name), f"model.{name}", maps)
    if isinstance(model.get("roi_head"), dict):
        check_roi_head(built.get_submodule("roi_head"), maps)
    for name in ("decode_head", "auxiliary_head"):
        heads = model.get(name) or []
        for i, head in enumerate(heads if isinstance(heads, (list, tuple)) else [heads]):
            where = f"model.{name}.{i}" if isinstance(heads, (list, tuple)) else f"model.{name}"
            check_decode_head(head, where, maps)


def build(part: dict[str, Any], where: str, *devices: str) -> nn.Module:
    """Builds a part of the model on the first device that works."""
    errors = []
    for device in devices:
        try:
            with torch.device(device):
                return MODELS.build(deepcopy(part))
        except Exception as error:  # mmdet and mmseg mostly raise bare assertions
            errors.append(error)
    reason = f"{type(errors[-1]).__name__}: {errors[-1]}" if str(errors[-1]) else type(errors[-1]).__name__
    raise ConfigError(f"{where}: cannot be built ({reason})") from errors[-1]


def through_neck(neck: Any, maps: Maps) -> Maps | None:
    """The maps after a neck, or several in a row. None if a neck needs other inputs than the backbone's maps."""
    several = isinstance(neck, (list, tuple))
    size = 8 * max(maps.strides)
    tensors = tuple(
        torch.zeros(1, channels, size // stride, size // stride)
        for channels, stride in zip(maps.channels, maps.strides, strict=True)
    )
    for i, part in enumerate(neck if several else [neck]):
        where = f"model.neck.{i}" if several else "model.neck"
        expected = [tensor.shape[1] for tensor in tensors]
        given = part.get("in_channels")
        source = maps.source if i == 0 else f"the maps of model.neck.{i - 1}"
        if isinstance(given, (list, tuple)) and list(given) != expected:
            raise ConfigError(f"{where}.in_channels: expected {expected}, the channels of {source}, got {list(given)}")
        if isinstance(given, int) and len(set(expected)) == 1 and given != expected[0]:
            raise ConfigError(f"{where}.in_channels: expected {expected[0]}, the channels of {source}, got {given}")
        levels = len(expected) - part.get("start_level", 0)
        if part.get("end_level", -1) in (-1, len(expected) - 1) and part.get("num_outs", levels) < levels:
            raise ConfigError(f"{where}.num_outs: expected {levels} or more, one a map, got {part['num_outs']}")
        module = build(part, where, "cpu").eval()
        try:
            with torch.no_grad():
                tensors = module(tensors)
        except Exception:  # it may need other inputs
            return None
        if not isinstance(tensors, (list, tuple)) or not all(torch.is_tensor(t) and t.ndim == 4 for t in tensors):
            return None
    return Maps([t.shape[1] for t in tensors], [size // t.shape[-1] for t in tensors], "the neck's maps")


def mismatch(what: str, expected: Any, maps: Maps, given: Any) -> ConfigError:
    return ConfigError(f"{what}: expected {expected}, the channels of {maps.source}, got {given}")


def check_dense_head(head: nn.Module, where: str, maps: Maps) -> None:
    """Checks a head that runs at every position of all maps."""
    given = getattr(head, "in_channels", None)
    if isinstance(given, int) and len(set(maps.channels)) == 1 and given != maps.channels[0]:
        raise mismatch(f"{where}.in_channels", maps.channels[0], maps, given)
    strides = getattr(getattr(head, "prior_generator", None), "strides", None)
    if strides is None:
        return
    strides = [int(stride[0]) if isinstance(stride, (list, tuple)) else int(stride) for stride in strides]
    # If the stride of a map is no power of two, it is known only approximately.
    fits = all(2 / 3 < ours / theirs < 3 / 2 for ours, theirs in zip(strides, maps.strides, strict=False))
    if len(strides) != len(maps.strides) or not fits:
        raise ConfigError(
            f"{where}: expected anchors or points of the strides {maps.strides}, those of {maps.source}, got {strides}"
        )


def check_roi_head(head: nn.Module, maps: Maps) -> None:
    """Checks a head that runs on regions: the strides and channels of its extractors, and its input channels."""
    for kind in ("bbox", "mask"):
        extractors = modules(getattr(head, f"{kind}_roi_extractor", None))
        heads = modules(getattr(head, f"{kind}_head", None))
        for extractor in extractors:
            where = f"model.roi_head.{kind}_roi_extractor"
            strides, channels = getattr(extractor, "featmap_strides", None), getattr(extractor, "out_channels", None)
            if strides is not None and list(strides) != maps.strides[: len(strides)]:
                raise ConfigError(
                    f"{where}.featmap_strides: expected {maps.strides}, of {maps.source}, or the first of them, "
                    f"got {list(strides)}"
                )
            used = maps.channels[: len(strides or ())]
            if isinstance(channels, int) and used and any(channels != expected for expected in used):
                raise mismatch(f"{where}.out_channels", used[0], maps, channels)
        for part in heads if extractors else []:
            given, expected = getattr(part, "in_channels", None), getattr(extractors[0], "out_channels", None)
            if isinstance(given, int) and isinstance(expected, int) and given != expected:
                where = f"model.roi_head.{kind}_head.in_channels"
                raise ConfigError(f"{where}: expected {expected}, as {kind}_roi_extractor.out_channels, got {given}")


def modules(part: Any) -> list[nn.Module]:
    """The heads of a cascade, or the only one."""
    return list(part) if isinstance(part, nn.ModuleList) else [part] if isinstance(part, nn.Module) else []


def check_decode_head(head: dict[str, Any], where: str, maps: Maps) -> None:
    """Checks a head of a segmentor, which names its input maps."""
    channels, indices = head.get("in_channels"), head.get("in_index", -1)
    if not isinstance(channels, (int, list, tuple)):
        return
    one = isinstance(channels, int)
    if not one and isinstance(indices, int):  # as many as there are
        indices = list(range(len(maps.channels)))
    wanted = [indices] if isinstance(indices, int) else list(indices)
    if any(not -len(maps.channels) <= i < len(maps.channels) for i in wanted):
        count = len(maps.channels)
        raise ConfigError(f"{where}.in_index: expected numbers of {maps.source}, below {count}, got {indices}")
    expected = [maps.channels[i] for i in wanted]
    given = [channels] if isinstance(channels, int) else list(channels)
    if given != expected:
        right = expected[0] if one and len(expected) == 1 else expected
        raise mismatch(f"{where}.in_channels", right, maps, channels)
