from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ["LayerDecayOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Smaller learning rates for earlier layers: those of layer i of n get lr * layer_decay_rate^(n - 1 - i).

    Which layer a parameter belongs to is the backbone's to say, by `get_layer_depth`; what follows the backbone trains
    at the full rate. All options of mmengine's own constructor work beside it. In a config:

        optim_wrapper = dict(
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.8, norm_decay_mult=0.0))

    Raises:
        ValueError: `layer_decay_rate` is missing or not in (0, 1], or the model's backbone has no `get_layer_depth`.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg.layer_decay_rate: expected a number in (0, 1], got {rate!r}")
        self.layer_decay_rate = rate

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """The parent's, one group a parameter, called by it for every module again, and each group's rate."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        depth = getattr(getattr(module, "backbone", None), "get_layer_depth", None)
        if depth is None:
            raise ValueError(f"model: expected a backbone with get_layer_depth, got {type(module).__name__}")
        names = {id(param): name for name, param in module.named_parameters()}
        for group in params:
            layer, num_layers = depth(names[id(group["params"][0])], "backbone.")
            group["lr"] = group.get("lr", self.base_lr) * self.layer_decay_rate ** (num_layers - 1 - layer)
