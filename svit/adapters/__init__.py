"""SViT, and any hierarchical model of timm, in MMDetection, MMSegmentation and other packages that build on mmengine.

Importing this package registers `TimmBackbone`, `LayerDecayOptimWrapperConstructor`, `CheckImagesHook` and
`FiniteCheckpointHook` in mmengine's root registries, so that configs of all these packages find them by name. It
imports neither mmdet nor mmseg. It also lets `torch.load` read mmengine's checkpoints without executing code from them,
and lets mmengine read safetensors and its FLOP counter count attention.
"""

from .backbone import TimmBackbone
from .checkpoints import allow_mmengine_checkpoints, allow_safetensors, to_safetensors
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
    "to_safetensors",
]

allow_mmengine_checkpoints()
allow_safetensors()
register_flop_handles()
