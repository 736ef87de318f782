import torch
from torch import nn


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor, x * gamma: (B, dim, H, W) to the same shape.

    gamma is (1, dim, 1, 1), as in the authors' code. It is no vector, so it gets weight decay, as in their training.
    """

    def __init__(
        self, dim: int, init: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.empty(1, dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma
