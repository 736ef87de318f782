from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

__all__ = ["LayerDecayOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Sets smaller learning rates for earlier layers: layer i of n gets lr * layer_decay_rate^(n - 1 - i).

    The backbone's `get_layer_depth` gives the layer of a parameter. All modules after the backbone train at the full
    rate. All options of mmengine's own constructor work too. In a config:

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
        """Calls the parent's method, which recurses and makes one group for each parameter. Then sets each rate."""
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
