from .attention import SuperTokenAttention
from .conv import ConvFFN, Downsample, FinalConv, ResidualDepthwiseConv, Stem
from .scale import LayerScale

__all__ = ["ConvFFN", "Downsample", "FinalConv", "LayerScale", "ResidualDepthwiseConv", "Stem", "SuperTokenAttention"]
