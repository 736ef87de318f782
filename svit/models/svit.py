"""Super Token Vision Transformer (SViT).

Paper: Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, https://arxiv.org/abs/2211.11167

image -> stem -> 4 stages -> final convolution -> head. A stage is a sequence of blocks: conditional positional encoding
(CPE), super-token attention, conv-FFN. Every stage but the first begins with a downsampling convolution. The output of
a stage is its feature map.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.layers.helpers import get_device_dtype
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    reparameterize_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from svit.layers import (
    ConvFFN,
    Downsample,
    FinalConv,
    LayerScale,
    ResidualDepthwiseConv,
    Stem,
    SuperTokenAttention,
    folding,
)
from svit.layers.checks import plain_ints
from svit.layers.fusing import DROPS, Expected, dropout_inactive, runs_stock_forward
from svit.ops import _dispatch
from svit.ops._dispatch import Plan

from .original import from_original, is_original

__all__ = ["SViT"]

LayerType = str | type[nn.Module]


class Block(nn.Module):
    """CPE, super-token attention and conv-FFN, each with a residual: (B, dim, H, W) to the same shape."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stoken_size: int | tuple[int, int],
        n_iter: int = 1,
        differentiable_association: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale_init: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: LayerType = nn.BatchNorm2d,
        act_layer: LayerType = nn.GELU,
        backend: str | None = None,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_embed = ResidualDepthwiseConv(dim, backend, dilation, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-6, **dd)
        self.attn = SuperTokenAttention(
            dim,
            num_heads,
            stoken_size,
            n_iter=n_iter,
            differentiable_association=differentiable_association,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            backend=backend,
            **dd,
        )
        self.ls1 = nn.Identity() if layer_scale_init is None else LayerScale(dim, layer_scale_init, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = ConvFFN(dim, int(dim * mlp_ratio), proj_drop, norm_layer, act_layer, backend, dilation, **dd)
        self.ls2 = nn.Identity() if layer_scale_init is None else LayerScale(dim, layer_scale_init, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pos_embed(x)
        if torch.jit.is_scripting():
            x = x + self.scale_attention(self.attn(self.norm1(x)))
            return x + self.scale_ffn(self.mlp(x))
        else:
            plan = self.choose_attention(x)
            scales = isinstance(self.ls1, LayerScale) or isinstance(self.drop_path1, DropPath)
            if plan is None:
                x = x + self.scale_attention(self.attn(self.norm1(x)))
            elif plan.backend == "reference":
                y = self.attn(self.norm1(x), "reference")
                x = x + (self.scale_attention(y) if scales else y)
            else:
                x = self.attn.forward_residual(x, self.norm1, self.scale_attention if scales else None, plan)
            plan = self.choose_ffn(x)
            if plan is None:
                return x + self.scale_ffn(self.mlp(x))
            if plan.op == "conv_ffn":
                return self.mlp.forward_fused(x, plan, residual=x)
            return x + self.mlp(x, plan.op)

    def scale_attention(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path1(self.ls1(x))

    def scale_ffn(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop_path2(self.ls2(x))

    @torch.jit.ignore
    def choose_attention(self, x: torch.Tensor) -> Plan | None:
        """Chooses what runs norm, attention and residual. None if a module is changed, so that each must run itself."""
        norm, attn = self.norm1, self.attn
        # Layer scale and drop path follow the attention. As factors they may move before the upsampling.
        factors: Expected = {self.ls1: (LayerScale, nn.Identity), self.drop_path1: (DropPath, nn.Identity)}
        if not isinstance(x, torch.Tensor) or not runs_stock_forward(
            {norm: LayerNorm2d, attn: SuperTokenAttention, **factors}
        ):
            return None
        return None if norm.weight is None or norm.bias is None else attn.choose_plan(x, norm)

    @torch.jit.ignore
    def choose_ffn(self, x: torch.Tensor) -> Plan | None:
        """Chooses what runs conv-FFN and residual. None if the conv-FFN must choose for itself or is another module."""
        layers: Expected = {self.mlp: ConvFFN, self.ls2: nn.Identity, self.drop_path2: DROPS}
        if not runs_stock_forward(layers):
            return None
        if not isinstance(self.drop_path2, nn.Identity) and not dropout_inactive(self.drop_path2):
            return None
        return self.mlp.choose_plan(x, residual=True)

    @torch.no_grad()
    def replacements(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name, part, kind, conv, drop in (
            ("ls1", "attn", SuperTokenAttention, "proj", "proj_drop"),
            ("ls2", "mlp", ConvFFN, "fc2", "drop2"),
        ):
            if not isinstance(getattr(self, name), LayerScale):
                continue
            scale = folding.expect_stock(self, name, LayerScale).gamma.flatten()
            module = copy.deepcopy(folding.expect_stock(self, part, kind))
            folding.expect_stock(self, f"{part}.{drop}", *DROPS)  # a factor commutes with dropout
            setattr(module, conv, folding.folded_after(self, f"{part}.{conv}", scale))
            found |= {part: module, name: nn.Identity()}
        return found

    def fuse(self) -> "Block":
        """Folds the layer scales, for inference, into the 1x1 convolutions before them.

        Raises:
            ValueError: one of these modules is hooked, parametrized, pruned or wrapped. Nothing has changed then.
        """
        folding.replace(self, self.replacements())
        return self


class Stage(nn.Module):
    """A downsampling convolution, but not in the first stage, and blocks. The output is the stage's feature map."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint_block(block, x)
        else:
            x = self.blocks(x)
        return x


class SViT(nn.Module):
    """Super Token Vision Transformer.

    A sequence has one value for each stage. Where a single value is allowed too, it holds for all stages.

    Args:
        in_chans: channels of the image.
        num_classes: classes, 0 for no classifier.
        global_pool: timm's name of the pooling before the classifier, '' for none.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        stoken_size: height and width of each stage's cells in pixels: an int or a pair for each stage. With 1 the stage
            has plain global attention.
        n_iter: rounds of association, a single value or one for each stage. It has no effect if cells are single
            pixels.
        differentiable_association: pass gradients through the association too. The paper does not.
        layer_scale_init: initial value of the layer scale, None for no layer scale; a single value or one for each
            stage. `timm.create_model` drops keywords that are None: give it (None, None, None, None).
        mlp_ratio: hidden channels of the conv-FFN, divided by the channels of the stage.
        head_width: channels of the 1x1 convolution before the pooling, None or 0 for no such convolution.
            `timm.create_model` drops keywords that are None: give it 0.
        stem_stride: stride of the first stage's map: 1, 2 or 4.
        output_stride: the largest stride of a map: 8, 16 or 32. Downsampling convolutions that would exceed it have
            stride 1, and the convolutions after them are dilated, as in timm's ConvNeXt. Weights do not change. Cells
            keep their size in pixels of the map.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the stem, inside the conv-FFN and after the attention's projection.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 in the first.
        norm_layer: norm of stem, conv-FFN, downsampling and final convolution. The attention has LayerNorm.
        act_layer: activation of stem and conv-FFN.
        backend: of super-token attention, depthwise convolutions and stem: None for the best backend that serves the
            input, or the name of one.

    Shape: (B, in_chans, H, W), any H and W of at least 1, to (B, num_classes).

    Raises:
        ValueError: an argument out of range, or an input of another shape.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        stoken_size: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        n_iter: int | Sequence[int] = 1,
        differentiable_association: bool = False,
        layer_scale_init: float | Sequence[float | None] | None = None,
        mlp_ratio: float = 4.0,
        head_width: int | None = 1024,
        stem_stride: int = 4,
        output_stride: int = 32,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType = nn.BatchNorm2d,
        act_layer: LayerType = nn.GELU,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_stages = len(embed_dims)
        if layer_scale_init is None or isinstance(layer_scale_init, (int, float)):
            layer_scale_init = (layer_scale_init,) * num_stages
        n_iter = cast(Sequence[int], (n_iter,) * num_stages if isinstance(n_iter, Integral) else n_iter)
        per_stage = {
            "depths": depths,
            "num_heads": num_heads,
            "stoken_size": stoken_size,
            "n_iter": n_iter,
            "layer_scale_init": layer_scale_init,
        }
        for name, value in per_stage.items():
            if not isinstance(value, Sequence) or len(value) != num_stages:
                raise ValueError(f"{name}: expected one value for each of the {num_stages} stages, got {value!r}")

        embed_dims, depths, num_heads = map(plain_ints, (embed_dims, depths, num_heads))
        in_chans, num_classes, head_width, stem_stride = plain_ints((in_chans, num_classes, head_width, stem_stride))
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes

        self.stem = Stem(in_chans, embed_dims[0], stem_stride, norm_layer, act_layer, backend, **dd)
        self.stem_drop = nn.Dropout(proj_drop_rate)

        drop_path_rates = cast(
            list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        )
        self.feature_info = []
        stages = []
        reduction, dilation = stem_stride, 1
        for i, dim in enumerate(embed_dims):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                stride = 2 if reduction < output_stride else 1
                # A convolution that loses its stride keeps its dilation. Those after it had every second pixel before.
                downsample = Downsample(
                    embed_dims[i - 1], dim, norm_layer, backend, stride, dilation if stride == 1 else 1, **dd
                )
                reduction, dilation = reduction * stride, dilation * 2 // stride
            block = partial(
                Block,
                dim,
                num_heads[i],
                stoken_size[i],
                n_iter=n_iter[i],
                differentiable_association=differentiable_association,
                mlp_ratio=mlp_ratio,
                layer_scale_init=layer_scale_init[i],
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=norm_layer,
                act_layer=act_layer,
                backend=backend,
                dilation=dilation,
                **dd,
            )
            stages.append(Stage(downsample, [block(drop_path=rate) for rate in drop_path_rates[i]]))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)

        self.final_conv: nn.Module = FinalConv(embed_dims[-1], head_width, norm_layer, backend, **dd)
        self.num_features = head_width or embed_dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

        self.register_load_state_dict_pre_hook(translate_original_keys)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Sets parameters and buffers to initial values. `needs_reset=False` skips those that layers set themselves."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if needs_reset and reset is not None:
                reset()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the stem to the head, for layer-wise learning-rate decay."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)" if coarse else [*fine, (r"^final_conv", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass instead of storing its activations."""
        for stage in cast(Iterable[Stage], self.stages):
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new classifier of `num_classes` (0: none). `global_pool` changes the pooling too."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def fuse(self) -> "SViT":
        """Folds norms and layer scales into convolutions, in place and for inference only. Returns the model.

        It folds what folds exactly: the BatchNorms of conv-FFN, downsampling and final convolution, and the layer
        scales. Norms of another class (LayerNorm, BatchNorm with an activation) stay, and so does a BatchNorm without
        running statistics.

        On a CPU the convolutions then keep their weights in oneDNN's layout, unless the backend is 'reference'. They
        notice a changed weight. After a change of single values through `weight.data`, call `fuse()` again.

        Raises:
            ValueError: a BatchNorm is in train mode, or a module that folds is hooked, parametrized, pruned, wrapped
                or of another class. The message names it, and the model is as it was.
        """
        for name, module in self.named_modules():
            if (replacements := getattr(module, "replacements", None)) is not None:
                try:
                    folding.expect_eval(module, replacements())
                except ValueError as error:
                    raise ValueError(f"{name}.{error}") from None
        reparameterize_model(self, inplace=True)
        return self

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Computes the final features and the stages' feature maps.

        Args:
            x: image (B, in_chans, H, W).
            indices: which stages: the last n for an int, a list of indices, or None for all.
            norm: has no effect, as a stage ends without a norm.
            stop_early: skip the stages after the last requested one.
            output_fmt: 'NCHW' only.
            intermediates_only: return the list of maps only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got '{output_fmt}'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1

        intermediates = []
        x = self.stem_drop(self.stem(x))
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:  # TorchScript knows no break here
                x = stage(x)
                if i in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last:
            x = self.final_conv(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes modules that `forward_intermediates(indices=...)` does not need. Returns the indices as a list."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        # The final convolution feeds no feature map, so it is removed with the head.
        ends_at_tap = prune_norm or prune_head or max_index < len(self.stages) - 1
        self.stages = cast(nn.Sequential, self.stages[: max_index + 1])
        if ends_at_tap:
            self.final_conv = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Unpooled features (B, num_features, H', W')."""
        x = self.stem_drop(self.stem(x))
        x = self.stages(x)
        return self.final_conv(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pools features and classifies them. With `pre_logits` it returns the pooled features."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        return self.forward_head(x)


def checkpoint_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Runs a block without storing its activations. The second run, in backward, updates no BatchNorm statistics."""
    if _dispatch.transformed():
        return block(x)  # torch.func and forward-mode AD refuse the hooks of a checkpoint
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)  # the compiler recomputes values, not updates
    known = dict(_dispatch.failures)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), Repetition(block, known)))


class Repetition(ExitStack):
    """Around a further run of a block: the same steps, even if a backend failed since, and no update of statistics.

    There is one such run for each backward over the same forward, so it may be entered again.
    """

    def __init__(self, block: nn.Module, known: dict[tuple[Any, ...], str]) -> None:
        super().__init__()
        self.block, self.known = block, known

    def __enter__(self) -> "Repetition":
        self.enter_context(_dispatch.choosing_by(self.known))
        self.enter_context(frozen_statistics(self.block))
        return super().__enter__()


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalises with batch statistics as in training, without updating the running ones.

    The running statistics still go into the call. Otherwise it would save fewer tensors for backward than the first
    one.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def translate_original_keys(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: renames the authors' keys to ours, so that a strict `load_state_dict` takes their files."""
    if is_original(state_dict, prefix):
        theirs = {k.removeprefix(prefix): state_dict.pop(k) for k in list(state_dict) if k.startswith(prefix)}
        state_dict.update({prefix + k: v for k, v in from_original(theirs).items()})


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """timm's filter for pretrained weights. It takes the authors' key names too."""
    state_dict = state_dict.get("model", state_dict)
    return from_original(state_dict) if is_original(state_dict) else state_dict


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.layers.0",
        "classifier": "head.fc",
        "fixed_input_size": False,
        "paper_name": "Vision Transformer with Super Token Sampling",
        "paper_ids": "arXiv:2211.11167",
        "origin_url": "https://github.com/hhb072/STViT",
        **kwargs,
    }


WEIGHTS = Path(__file__).parents[1] / "weights"

_cfg_384 = partial(_cfg, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "svit_small.in1k": _cfg(),
        "svit_small.in1k_384": _cfg_384(),
        "svit_base.in1k": _cfg(),
        "svit_base.in1k_384": _cfg_384(),
        "svit_large.in1k": _cfg(),
        "svit_large.in1k_384": _cfg_384(),
        "svit_tiny.untrained": _cfg(license="mit", origin_url=None),
        # These weights come with the package. docs/photos20.md and docs/cifar10.md say how they were trained.
        "svit_nano.photos20": _cfg(
            license="mit",  # of the weights; the photographs are ImageNet's
            origin_url=None,
            file=str(WEIGHTS / "svit_nano.photos20.safetensors"),
            input_size=(3, 128, 128),
            pool_size=(4, 4),
            crop_pct=1.0,
            num_classes=20,
            label_names=[
                "australian_terrier",
                "beagle",
                "border_terrier",
                "cassette_player",
                "chain_saw",
                "church",
                "dingo",
                "english_foxhound",
                "english_springer",
                "french_horn",
                "garbage_truck",
                "gas_pump",
                "golden_retriever",
                "golf_ball",
                "old_english_sheepdog",
                "parachute",
                "rhodesian_ridgeback",
                "samoyed",
                "shih_tzu",
                "tench",
            ],
        ),
        # The star, after what has weights, makes it the default: `svit_nano` means 224 pixels and 1000 classes.
        "svit_nano.untrained*": _cfg(license="mit", origin_url=None),
        "svit_nano_32.cifar10": _cfg(
            license="mit",
            origin_url=None,
            file=str(WEIGHTS / "svit_nano_32.cifar10.safetensors"),
            input_size=(3, 32, 32),
            pool_size=(2, 2),
            crop_pct=1.0,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            num_classes=10,
            label_names=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        ),
        "test_svit.untrained": _cfg(
            license="mit", origin_url=None, input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0
        ),
    }
)


def _create_svit(variant: str, pretrained: bool, **kwargs: Any) -> SViT:
    if pretrained:
        _require_weights(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["embed_dims"]))))
    return build_model_with_cfg(
        SViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **kwargs,
    )


# Libraries that ask for weights by default, too.
_UNTRAINED = "pretrained=False (encoder_weights=None in segmentation_models_pytorch)"


def _require_weights(variant: str, cfg: str | dict[str, Any] | None, overlay: dict[str, Any] | None) -> None:
    """Raises a RuntimeError that says where the weights are, if timm would find none."""
    found = resolve_pretrained_cfg(variant, cfg, overlay)
    if found.url or found.file or found.hf_hub_id or found.state_dict or found.source:
        return
    name = f"{variant}.{found.tag}" if found.tag else variant
    if found.origin_url is None:
        others = [f"{variant}.{tag}" for tag, cfg in default_cfgs[variant].cfgs.items() if cfg.has_weights]
        which = f"name its weights, {' or '.join(others)}, or" if others else "no pretrained weights exist;"
        raise RuntimeError(f"{name}: {which} use {_UNTRAINED}.")
    size = "384" if found.input_size[-1] == 384 else "224"
    theirs = f"{variant.replace('svit_', 'stvit-')}-{size}.pth"
    raise RuntimeError(
        f"{name}: the weights cannot be downloaded automatically. Get {theirs} from the links at {found.origin_url}, "
        f"then run `svit convert {theirs} {name}.safetensors` and pass "
        f"checkpoint_path='{name}.safetensors' instead of pretrained=True. For random weights use {_UNTRAINED}."
    )


@register_model
def svit_small(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-S of the paper."""
    args = dict(embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8))
    return _create_svit("svit_small", pretrained, **dict(args, **kwargs))


@register_model
def svit_base(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-B of the paper."""
    args = dict(
        embed_dims=(96, 192, 384, 512),
        depths=(4, 6, 14, 6),
        num_heads=(2, 3, 6, 8),
        layer_scale_init=(None, None, 1e-6, 1e-6),
    )
    return _create_svit("svit_base", pretrained, **dict(args, **kwargs))


@register_model
def svit_large(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-L of the paper."""
    args = dict(
        embed_dims=(96, 192, 448, 640),
        depths=(4, 7, 19, 8),
        num_heads=(2, 3, 7, 10),
        layer_scale_init=(None, None, 1e-6, 1e-6),
    )
    return _create_svit("svit_large", pretrained, **dict(args, **kwargs))


@register_model
def svit_tiny(pretrained: bool = False, **kwargs: Any) -> SViT:
    """A smaller SViT-S; not in the paper."""
    args = dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 6, 2), num_heads=(1, 2, 5, 8))
    return _create_svit("svit_tiny", pretrained, **dict(args, **kwargs))


@register_model
def svit_nano(pretrained: bool = False, **kwargs: Any) -> SViT:
    """An SViT of at most 3 M parameters; not in the paper."""
    args = dict(embed_dims=(24, 48, 96, 160), depths=(1, 2, 4, 2), num_heads=(1, 2, 4, 5), head_width=640)
    return _create_svit("svit_nano", pretrained, **dict(args, **kwargs))


@register_model
def svit_nano_32(pretrained: bool = False, **kwargs: Any) -> SViT:
    """For images of about 32 pixels: a stem of stride 2 and cells that keep a 4 x 4 grid; not in the paper."""
    args = dict(
        embed_dims=(48, 96, 160, 192),
        depths=(1, 2, 4, 2),
        num_heads=(1, 2, 4, 6),
        stoken_size=(4, 2, 1, 1),
        head_width=512,
        stem_stride=2,
    )
    return _create_svit("svit_nano_32", pretrained, **dict(args, **kwargs))


@register_model
def test_svit(pretrained: bool = False, **kwargs: Any) -> SViT:
    """Every kind of layer at the smallest size, for tests."""
    args = dict(
        embed_dims=(8, 16, 24, 32),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 3, 4),
        stoken_size=(4, 2, 1, 1),
        layer_scale_init=(None, None, 0.1, 0.1),
        head_width=64,
    )
    return _create_svit("test_svit", pretrained, **dict(args, **kwargs))


register_model_deprecations(
    __name__,
    {
        "stvit_small": "svit_small",
        "stvit_base": "svit_base",
        "stvit_large": "svit_large",
    },
)
