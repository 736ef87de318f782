"""A model of timm as a backbone of mmengine's."""

import logging
import warnings
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from timm.models import adapt_input_conv, group_parameters
from torch import nn
from torch.hub import download_url_to_file, get_dir
from torch.nn.modules.batchnorm import _BatchNorm

import svit.models  # noqa: F401  registers the models
from svit.convert import CheckpointError, check_finite, differences, listing, read_state_dict, summary
from svit.models.original import from_original, is_original
from svit.names import did_you_mean

from .checkpoints import allow_mmengine_checkpoints

__all__ = ["TimmBackbone"]


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Returns the feature maps of a hierarchical model of timm, such as SViT, for detectors and segmentors.

    The weights are under "model", with timm's names. The norms of the outputs are under "norm0", "norm1" and so on.

    Args:
        arch: name of a model in timm, such as 'svit_small'. A tag of weights ('convnext_tiny.fb_in1k') is ignored.
        in_channels: channels of the image.
        out_indices: which of the model's feature maps (timm's `feature_info`) to return, in rising order. A SViT has
            four, one for each stage, of stride 4, 8, 16 and 32.
        frozen_stages: -1 for none, 0 for the stem, i for the stem and the first i stages, as the model's coarse
            `group_matcher` counts them. Frozen parameters are not trained, their BatchNorms use running statistics, and
            their dropout is off.
        norm_eval: every BatchNorm uses its running statistics in training. Its weight and bias still train.
        with_cp: recompute blocks in the backward pass instead of storing their activations.
        out_norm: apply a LayerNorm over the channels of each returned map.
        drop_path_rate: stochastic depth of the last block, rising from 0 in the first. None for the model's default.
        stoken_size: SViT's cells, one value for each stage. None for the model's default.
        convert_weights: accept checkpoints with the key names of SViT's authors, too.
        model_args: further keywords of `timm.create_model`, such as `dict(strict_img_size=False)` for a Swin.
        pretrained: deprecated: path of a checkpoint. Use `init_cfg`.
        init_cfg: `dict(type='Pretrained', checkpoint=...)` with a path or an http(s) address of a checkpoint: one of
            ours, of SViT's authors, of a model as timm saves it, or of a whole detector or segmentor. An entry `prefix`
            names the backbone in it; "backbone." needs none. None: the model's own initial values.

    Shape: (B, in_channels, H, W) to a tuple of maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])),
    contiguous in this order. SViT takes any H and W.

    Attributes:
        channels: of the maps returned, a tuple.
        strides: of the maps returned, a tuple.

    Raises:
        ValueError: an unknown model, one without feature maps, or an argument out of range.
    """

    def __init__(
        self,
        arch: str,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_norm: bool = True,
        drop_path_rate: float | None = None,
        stoken_size: Sequence[int | tuple[int, int]] | None = None,
        convert_weights: bool = True,
        model_args: dict[str, Any] | None = None,
        pretrained: str | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if pretrained is not None:
            if init_cfg is not None:
                raise ValueError(f"pretrained: expected None beside init_cfg, got {pretrained!r}")
            warnings.warn(
                "pretrained is deprecated; use init_cfg=dict(type='Pretrained', checkpoint=...)",
                DeprecationWarning,
                stacklevel=2,
            )
            init_cfg = dict(type="Pretrained", checkpoint=pretrained)
        check_init_cfg(init_cfg)
        super().__init__(init_cfg)
        self.arch = arch
        self.norm_eval = norm_eval
        self.convert_weights = convert_weights

        options = {"drop_path_rate": drop_path_rate, "stoken_size": stoken_size, **(model_args or {})}
        model = create_model(arch, in_channels, {k: v for k, v in options.items() if v is not None})
        self.out_indices = check_out_indices(out_indices, model, arch)
        info = [model.feature_info[i] for i in self.out_indices]
        self.channels = tuple(i["num_chs"] for i in info)
        self.strides = tuple(i["reduction"] for i in info)

        # Remove modules that the maps do not need, so that every parameter gets a gradient. Checkpoints may hold them.
        self.pruned_keys = set(model.state_dict())
        model.prune_intermediate_layers(list(self.out_indices), prune_norm=True, prune_head=True)
        self.pruned_keys -= set(model.state_dict())
        del model.num_classes  # mmdet's NumClassCheckHook treats every module with this attribute as a head
        self.model = model
        if with_cp:
            model.set_grad_checkpointing(True)
        for i, dim in enumerate(self.channels):
            self.add_module(f"norm{i}", LayerNorm2d(dim, eps=1e-6) if out_norm else nn.Identity())

        # Layers from the input on: stages for freezing, blocks for the decay of the learning rate.
        stages = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        self.depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        if not -1 <= frozen_stages <= max(stages.values()):
            raise ValueError(f"frozen_stages: expected -1 to {max(stages.values())} for {arch}, got {frozen_stages!r}")
        self.frozen_modules = self.freeze({name for name, stage in stages.items() if stage <= frozen_stages})

    def freeze(self, names: set[str]) -> list[str]:
        """Freezes the named parameters. Returns the names of the modules that are frozen with them.

        Of these the parameters are all frozen, or they have none and come before the first child that learns.
        """
        for name, param in self.model.named_parameters():
            if name in names:
                param.requires_grad = False
        frozen = []
        for name, module in self.model.named_modules():
            params = list(module.parameters())
            if params and not any(p.requires_grad for p in params):
                frozen.append(name)
        for name, module in self.model.named_children():  # in the order of the forward pass
            if any(p.requires_grad for p in module.parameters()):
                break
            if not list(module.parameters()):
                frozen.append(name)  # the dropout behind a frozen stem
        return frozen

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Sets training or eval mode. Frozen stages stay in eval mode, and with `norm_eval` all BatchNorms do."""
        super().train(mode)
        for name in self.frozen_modules:  # by name: a conversion to SyncBN replaces modules
            self.model.get_submodule(name).eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.model.forward_intermediates(
            x, indices=list(self.out_indices), output_fmt="NCHW", intermediates_only=True
        )
        return tuple(getattr(self, f"norm{i}")(m).contiguous() for i, m in enumerate(maps))

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Returns the layer of a parameter, counted from 0 for the stem, and the number of layers.

        The last layer is everything after the model: the norms of the outputs, and all names that do not begin with
        `prefix`, the name of the backbone in the detector or segmentor.
        """
        num_layers = max(self.depths.values()) + 2
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix) or not name.startswith("model."):
            return num_layers - 1, num_layers
        return self.depths[name.removeprefix("model.")], num_layers

    def init_weights(self) -> None:
        """Loads the checkpoint of `init_cfg`. Without one, the model keeps timm's initial values.

        Raises:
            CheckpointError: there is no such file, it cannot be read, it does not fit the model, or its numbers are not
                finite.
        """
        # The parent's method would call the model's own init_weights() after the weights are loaded.
        self._is_init = True
        if not self.init_cfg:
            return
        self.load(self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))

    def load(self, checkpoint: str, prefix: str | None = None) -> None:
        """Loads the weights of a file or an address into the model. See `init_cfg` and `init_weights`."""
        file = find_checkpoint(checkpoint, self.arch)
        allow_mmengine_checkpoints()  # again: a `torch.serialization.safe_globals` elsewhere undoes it at its end
        state_dict = select(read_state_dict(file), prefix)
        if self.convert_weights and is_original(state_dict):
            state_dict = from_original(state_dict)
        expected = self.model.state_dict()
        state_dict = {k: v for k, v in state_dict.items() if k not in self.pruned_keys}
        # For another number of channels, the weight of the first convolution is summed or repeated, as in timm.
        first = self.model.pretrained_cfg.get("first_conv")
        key = f"{first}.weight"
        if key in state_dict and key in expected and state_dict[key].shape[1:2] == (3,):
            state_dict[key] = adapt_input_conv(expected[key].shape[1], state_dict[key])

        if not set(state_dict) & set(expected):
            raise CheckpointError(f"{checkpoint}: holds no weight of {self.arch}; it has {listing(state_dict)}")
        problems = summary(differences(state_dict, expected))
        if problems:
            raise CheckpointError(f"{checkpoint}: is not of {self.arch}; {problems}")
        check_finite(checkpoint, state_dict)
        self.model.load_state_dict(state_dict)
        print_log(f"{self.arch}: loaded {len(state_dict)} tensors from {checkpoint}", "current", logging.INFO)


def create_model(arch: str, in_channels: int, options: dict[str, Any]) -> Any:
    """Creates a model of timm. Raises a ValueError if it has no feature maps."""
    if not timm.is_model(arch):
        raise ValueError(f"arch: no model {arch!r} in timm{did_you_mean(arch, timm.list_models())}")
    try:
        model = timm.create_model(arch.partition(".")[0], in_chans=in_channels, **options)
    except TypeError as error:  # not every model has every option
        raise ValueError(f"arch: {arch} does not take {', '.join(options)}: {error}") from error
    needed = ("feature_info", "forward_intermediates", "prune_intermediate_layers", "group_matcher")
    missing = [name for name in needed if not hasattr(model, name)]
    if missing:
        raise ValueError(f"arch: expected a model with feature maps, {arch} has no {', '.join(missing)}")
    return model


def check_out_indices(out_indices: Sequence[int], model: Any, arch: str) -> tuple[int, ...]:
    indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    known = range(len(model.feature_info))
    if not indices or any(i not in known for i in indices) or list(indices) != sorted(set(indices)):
        maps = ", ".join(f"{i} of stride {info['reduction']}" for i, info in enumerate(model.feature_info))
        raise ValueError(f"out_indices: expected rising numbers of {arch}'s feature maps ({maps}), got {out_indices!r}")
    return indices


def check_init_cfg(init_cfg: Any) -> None:
    if not init_cfg:
        return
    good = isinstance(init_cfg, dict) and init_cfg.get("type") in ("Pretrained", PretrainedInit)
    if not good or not isinstance(init_cfg.get("checkpoint"), str):
        raise ValueError(f"init_cfg: expected dict(type='Pretrained', checkpoint=...), got {init_cfg!r}")


def is_address(checkpoint: str) -> bool:
    return checkpoint.startswith(("http://", "https://"))


def find_checkpoint(checkpoint: str, arch: str) -> Path:
    """The file of a path or an address. A downloaded file is stored in PyTorch's cache folder."""
    if is_address(checkpoint):
        # The last part of an address names many files: model.safetensors is that of every model on the Hub.
        name = checkpoint.rpartition("/")[2].partition("?")[0]
        file = Path(get_dir(), "checkpoints", f"{sha256(checkpoint.encode()).hexdigest()[:16]}-{name}")
        file.parent.mkdir(parents=True, exist_ok=True)
        problem = None
        for mine in (is_main_process(), True):  # first the main process, then the processes on other machines
            if mine and not file.exists():
                try:
                    download_url_to_file(checkpoint, str(file))
                except OSError as error:
                    problem = error
            barrier()
        if not file.exists():
            raise CheckpointError(f"{checkpoint}: cannot be fetched ({problem})")
        return file
    file = Path(checkpoint).expanduser()
    if not file.is_file():
        raise CheckpointError(f"{checkpoint}: no such file. {how_to_get_weights(arch)}")
    return file


def how_to_get_weights(arch: str) -> str:
    """Text: where a model's ImageNet weights are, how to name them in a config, and how to train without them."""
    name = arch.partition(".")[0]
    published = {"svit_small", "svit_base", "svit_large"}
    if name in published:
        theirs = f"stvit-{name.removeprefix('svit_')}-224.pth"
        where = f"ImageNet weights: get {theirs} from the links at https://github.com/hhb072/STViT, convert it or not,"
    else:
        where = f"Train {name} for classification, or save weights that timm has, to get such a file,"
    return (
        f"{where} and point to it with --cfg-options model.backbone.init_cfg.checkpoint=FILE. "
        "To train from scratch on purpose: --cfg-options model.backbone.init_cfg=None model.backbone.norm_eval=False"
    )


def select(state_dict: dict[str, torch.Tensor], prefix: str | None) -> dict[str, torch.Tensor]:
    """The backbone's weights in a checkpoint, under the model's own names."""
    if prefix is None and any(k.startswith("backbone.") for k in state_dict):
        prefix = "backbone"
    if prefix:
        start = prefix.removesuffix(".") + "."
        state_dict = {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
    if any(k.startswith("model.") for k in state_dict):  # of a TimmBackbone; its output norms are dropped
        state_dict = {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}
    return state_dict
