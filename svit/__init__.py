"""Super Token Vision Transformer for timm. Importing the package registers its models."""

from . import models

__all__ = ["models"]
__version__ = "0.1.0"
