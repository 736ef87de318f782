"""Outputs of the authors' implementation (tests/data/goldens) and the stand-in weights that they were computed with."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "data" / "goldens"
sys.path.insert(0, str(FOLDER))

from make_weights import image as _image  # noqa: E402
from make_weights import tensor  # noqa: E402

STA_CASES = range(6)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def image(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(_image(seed, shape))


def state_dict(variant: str) -> dict[str, torch.Tensor]:
    """The authors' state dict of 'small', 'base' or 'large', float64."""
    keys = json.loads((FOLDER / f"stvit_{variant}_keys.json").read_text())
    return {name: torch.from_numpy(np.array(tensor(name, tuple(shape)))) for name, shape in keys.items()}


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """max|a - b| / max|b|."""
    return float(np.abs(actual.detach().double().numpy() - expected).max() / np.abs(expected).max())


def statistics(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the forward files hold of a feature map (B, C, H, W)."""
    return {
        "shape": torch.tensor(x.shape),
        "mean": x.mean((0, 2, 3)),
        "std": x.transpose(0, 1).flatten(1).std(1),
        "corner": x[:, :8, :6, :6],
        "end": x[:, -8:, -6:, -6:],
    }
