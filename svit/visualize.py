"""Pictures of the super tokens that a model forms on an image. Needs matplotlib (`pip install svit[visualize]`)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from svit.files import replacing
from svit.layers import SuperTokenAttention
from svit.ops import sample
from svit.ops.reference import from_cells
from svit.profiling import evaluating

__all__ = ["Association", "associations", "draw"]


@dataclass
class Association:
    """The soft association of one attention layer on one image.

    Attributes:
        layer: name of the layer in the model.
        q: (hh, ww, 9, P), each pixel's share in the 3 x 3 super tokens around its cell; sums to 1 over the 9.
        cell: height and width of a cell.
        size: height and width of the feature map.
    """

    layer: str
    q: torch.Tensor
    cell: tuple[int, int]
    size: tuple[int, int]

    def weights(self, row: int, col: int) -> torch.Tensor:
        """(H, W): every pixel's share in super token (row, col); 0 outside the 3 x 3 cells around it."""
        hh, ww = self.q.shape[:2]
        if not (0 <= row < hh and 0 <= col < ww):
            raise ValueError(f"(row, col): expected a super token of the {hh} x {ww} grid, got ({row}, {col})")
        h, w = self.cell
        out = self.q.new_zeros(hh * h, ww * w)
        for y in range(max(row - 1, 0), min(row + 2, hh)):
            for x in range(max(col - 1, 0), min(col + 2, ww)):
                neighbour = 3 * (row - y + 1) + (col - x + 1)
                out[y * h : (y + 1) * h, x * w : (x + 1) * w] = self.q[y, x, neighbour].reshape(h, w)
        return out[: self.size[0], : self.size[1]]

    def assignment(self) -> torch.Tensor:
        """(H, W) int64: the super token, as row * ww + col, in which each pixel has its largest share."""
        hh, ww = self.q.shape[:2]
        near = torch.arange(9)
        row = torch.arange(hh).view(hh, 1, 1) + near // 3 - 1
        col = torch.arange(ww).view(1, ww, 1) + near % 3 - 1
        inside = (row >= 0) & (row < hh) & (col >= 0) & (col < ww)  # (hh, ww, 9)
        nearest = self.q.masked_fill(~inside[..., None], -1).argmax(2)  # (hh, ww, P)
        labels = (row * ww + col).gather(2, nearest)
        return from_cells(labels[None, ..., None], self.cell, self.size)[0, ..., 0]


def associations(model: nn.Module, image: torch.Tensor) -> list[Association]:
    """The association in every attention layer with cells of more than one pixel, in the order of the layers.

    Args:
        model: any model with `SuperTokenAttention` layers.
        image: (3, H, W) or (1, 3, H, W), preprocessed for the model.
    """
    found = []

    def record(name: str):
        def hook(layer: SuperTokenAttention, args: tuple[torch.Tensor]) -> None:
            x = args[0]
            q = sample(x.permute(0, 2, 3, 1), layer.cell, layer.n_iter)[1]
            found.append(Association(name, q[0].float().cpu(), layer.cell, tuple(x.shape[-2:])))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SuperTokenAttention) and m.cell != (1, 1)]
    hooks = [layer.register_forward_pre_hook(record(name)) for name, layer in layers]
    try:
        with evaluating(model), torch.no_grad():
            model(image if image.dim() == 4 else image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def draw(model: nn.Module, images: torch.Tensor, path: str | Path, layer: int = 0, dpi: int = 120) -> None:
    """Writes a picture, one row an image: the image, its super tokens' borders, the share of its pixels in one of them.

    The super token shown is that of the grid's centre. The file appears whole or not at all.

    Args:
        images: (B, C, H, W), preprocessed for the model; shown stretched to their own range, C of 1 or 3.
        path: the file; its suffix names the format.
        layer: which of the layers that `associations` finds.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = ("image", "cells", "super tokens", "share in the marked one")
    fig, axes = plt.subplots(
        len(images), len(columns), figsize=(2.2 * len(columns), 2.3 * len(images)), squeeze=False, layout="constrained"
    )
    for image, row in zip(images, axes, strict=True):
        found = associations(model, image)[layer]
        H, W = image.shape[-2:]
        hh, ww = found.q.shape[:2]
        cells = torch.arange(hh * ww).reshape(hh, ww)
        cells = cells.repeat_interleave(found.cell[0], 0).repeat_interleave(found.cell[1], 1)
        share = found.weights(hh // 2, ww // 2)

        shown = image.float().cpu().permute(1, 2, 0).numpy()
        shown = (shown - shown.min()) / max(shown.max() - shown.min(), 1e-6)
        extent = (0, W, H, 0)
        for ax in row[:3]:
            ax.imshow(shown, cmap="gray", extent=extent)
        _borders(row[1], cells[: found.size[0], : found.size[1]], extent)
        _borders(row[2], found.assignment(), extent)
        row[3].imshow(shown.mean(-1), cmap="gray", extent=extent)
        row[3].imshow(share.numpy(), cmap="inferno", alpha=0.75, vmin=0, extent=extent)
        # The cell of that super token, in pixels of the image.
        scale_y, scale_x = H / found.size[0], W / found.size[1]
        corner = (ww // 2 * found.cell[1] * scale_x, hh // 2 * found.cell[0] * scale_y)
        row[3].add_patch(
            plt.Rectangle(corner, found.cell[1] * scale_x, found.cell[0] * scale_y, fill=False, edgecolor="cyan")
        )
        for ax in row:
            ax.axis("off")
    for ax, text in zip(axes[0], columns, strict=True):
        ax.set_title(text, fontsize=9)

    try:
        with replacing(Path(path)) as part:
            fig.savefig(part, dpi=dpi)
    finally:
        plt.close(fig)


def _borders(ax, labels: torch.Tensor, extent: tuple[int, int, int, int]) -> None:
    """Draws the edges between pixels of different labels (H, W) into `extent`."""
    from matplotlib.collections import LineCollection

    H, W = labels.shape
    _, right, bottom, _ = extent
    y, x = bottom / H, right / W
    lines = []
    for i, j in (labels[:, 1:] != labels[:, :-1]).nonzero().tolist():
        lines.append([((j + 1) * x, i * y), ((j + 1) * x, (i + 1) * y)])
    for i, j in (labels[1:] != labels[:-1]).nonzero().tolist():
        lines.append([(j * x, (i + 1) * y), ((j + 1) * x, (i + 1) * y)])
    ax.add_collection(LineCollection(lines, colors="yellow", linewidths=0.8))
