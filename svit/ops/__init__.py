"""Functions without parameters; the maths is in README.md beside this file."""

from . import onednn
from .reference import depthwise3x3, sample, spread

__all__ = ["depthwise3x3", "onednn", "sample", "spread"]
