from .reference import depthwise3x3, sample, spread

__all__ = ["depthwise3x3", "sample", "spread"]
