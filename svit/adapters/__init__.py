"""SViT, and any hierarchical model of timm, in MMDetection, MMSegmentation and whatever else builds on mmengine.

Importing the package registers `TimmBackbone`, `LayerDecayOptimWrapperConstructor`, `CheckImagesHook` and
`FiniteCheckpointHook` in mmengine's root registries, so that configs of every such package find them by name; neither
mmdet nor mmseg is imported. It also lets `torch.load` read mmengine's checkpoints without executing what they hold, and
makes mmengine's FLOP counter know attention.
"""

from .backbone import TimmBackbone
from .checkpoints import allow_mmengine_checkpoints
from .configs import ConfigError, config_names, find_config, load_config
from .counting import register_flop_handles
from .images import CheckImagesHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .saving import FiniteCheckpointHook

__all__ = [
    "CheckImagesHook",
    "ConfigError",
    "FiniteCheckpointHook",
    "LayerDecayOptimWrapperConstructor",
    "TimmBackbone",
    "config_names",
    "find_config",
    "load_config",
]

allow_mmengine_checkpoints()
register_flop_handles()
