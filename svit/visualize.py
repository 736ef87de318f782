"""Draws a model's super tokens on an image. The figures need matplotlib (the extra `visualize`).

    with watch(model) as layers:
        logits = model(image)  # (1, 3, H, W), preprocessed for the model
    figure = draw_super_tokens(photo, last_of_stages(layers), point=(0.5, 0.5))
    figure.savefig("super_tokens.png")

`svit visualize` makes a page of the figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from svit.errors import InputError
from svit.layers import SuperTokenAttention
from svit.ops import sample
from svit.ops.reference import from_cells, spread
from svit.profiling import evaluating

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Association",
    "WatchedLayer",
    "attention_weights",
    "batch_attention_weights",
    "borders",
    "check_point",
    "draw_attention",
    "draw_iterations",
    "draw_super_tokens",
    "last_of_stages",
    "mean_colours",
    "watch",
]

Point = tuple[float, float]

PANEL = 2.6  # width in inches
TEXT = 9  # points
ZOOM = 7  # cells: the 3 x 3 that hold a share, and 2 around


@dataclass
class Association:
    """The soft association of one attention layer on one image.

    Attributes:
        q: (hh, ww, 9, P), each pixel's shares in the 3 x 3 super tokens around its cell. They sum to 1 over the 9.
        cell: height and width of a cell.
        size: height and width of the feature map.
    """

    q: torch.Tensor
    cell: tuple[int, int]
    size: tuple[int, int]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Upsamples values (hh, ww) of the super tokens to pixels (H, W), weighted by each pixel's shares."""
        return spread(values[None, ..., None], self.q[None], self.cell, self.size)[0, ..., 0]

    def weights(self, row: int, col: int) -> torch.Tensor:
        """(H, W): every pixel's share in super token (row, col). It is 0 outside the 3 x 3 cells around that."""
        hh, ww = self.q.shape[:2]
        if not (0 <= row < hh and 0 <= col < ww):
            raise ValueError(f"(row, col): expected a super token of the {hh} x {ww} grid, got ({row}, {col})")
        chosen = self.q.new_zeros(hh, ww)
        chosen[row, col] = 1
        return self.spread(chosen)

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

    def partition(self, size: tuple[int, int]) -> torch.Tensor:
        """(height, width) int64: the super token of each pixel of the image, numbered as in `assignment`.

        The shares are interpolated between the centres of the map's pixels (bilinear), and the largest one wins.

        Args:
            size: height and width of the image that the feature map is of.
        """
        hh, ww = self.q.shape[:2]
        rows, columns = (interpolation(n, m) for n, m in zip(self.size, size, strict=True))
        best = torch.full(size, -1.0)
        labels = torch.zeros(size, dtype=torch.long)
        for row in range(hh):
            # The tokens of a row of cells have shares in that row and its neighbours alone.
            shares = torch.stack([self.weights(row, col) for col in range(ww)])  # (ww, H, W)
            near = shares.sum((0, 2)).nonzero().flatten()
            band = (rows[:, near] > 0).any(1).nonzero().flatten()
            largest, col = (rows[band][:, near] @ shares[:, near] @ columns.T).max(0)
            better = largest > best[band]
            labels[band] = torch.where(better, row * ww + col, labels[band])
            best[band] = torch.where(better, largest, best[band])
        return labels

    def cells(self) -> torch.Tensor:
        """(H, W) int64: the cell of each pixel, numbered as the super tokens of `assignment`."""
        hh, ww = self.q.shape[:2]
        labels = torch.arange(hh * ww).view(1, hh, ww, 1, 1).expand(-1, -1, -1, self.q.shape[3], -1)
        return from_cells(labels, self.cell, self.size)[0, ..., 0]

    def owner(self, point: Point) -> tuple[int, int]:
        """(row, col) of the super token in which the pixel at a point has its largest share.

        Args:
            point: x and y as fractions of the width and the height, from the top left.

        Raises:
            ValueError: the point lies outside the image.
        """
        check_point(point)
        H, W = self.size
        x, y = min(int(point[0] * W), W - 1), min(int(point[1] * H), H - 1)
        return divmod(int(self.assignment()[y, x]), self.q.shape[1])


@dataclass
class WatchedLayer:
    """An attention layer and its input for one image.

    Attributes:
        name: of the layer in the model.
        layer: the layer.
        x: its input, (1, C, H, W).
    """

    name: str
    layer: SuperTokenAttention
    x: torch.Tensor

    @property
    def samples(self) -> bool:
        """Whether the layer has super tokens, that is, cells of more than one pixel."""
        return self.layer.cell != (1, 1)

    @torch.no_grad()
    def sample(self, n_iter: int | None = None) -> tuple[torch.Tensor, Association]:
        """Returns the super tokens (1, C, hh, ww) before they attend, and the association.

        With cells of one pixel the super tokens are the pixels, and each pixel has all of its share in itself.

        Args:
            n_iter: rounds of association, None for the layer's own number.
        """
        layer, size = self.layer, (self.x.shape[2], self.x.shape[3])
        if not self.samples:
            q = torch.zeros(*size, 9, 1)
            q[:, :, 4] = 1
            return self.x, Association(q, layer.cell, size)
        n_iter = layer.n_iter if n_iter is None else n_iter
        s, q = sample(self.x.permute(0, 2, 3, 1), layer.cell, n_iter, backend=layer.backend)
        return s.permute(0, 3, 1, 2), Association(q[0].float().cpu(), layer.cell, size)

    def association(self, n_iter: int | None = None) -> Association:
        """The association alone."""
        return self.sample(n_iter)[1]

    def attention(self, row: int, col: int) -> torch.Tensor:
        """(heads, hh, ww): the attention of super token (row, col) to all super tokens. It sums to 1 in each head."""
        s, _ = self.sample()
        hh, ww = s.shape[-2:]
        weights = attention_weights(self.layer, s, [row * ww + col])
        return weights.float().cpu().reshape(-1, hh, ww)


@torch.no_grad()
def attention_weights(
    layer: SuperTokenAttention, tokens: torch.Tensor, queries: Sequence[int] | None = None
) -> torch.Tensor:
    """Computes the attention weights of `layer.attend`: (heads, queries, N), which sum to 1 over the N tokens.

    Args:
        layer: the attention layer.
        tokens: its tokens, (1, C, hh, ww), N = hh * ww.
        queries: which tokens attend, None for all. For a large image, all N x N weights take much memory.
    """
    return batch_attention_weights(layer, tokens, queries)[0]


def batch_attention_weights(
    layer: SuperTokenAttention, tokens: torch.Tensor, queries: Sequence[int] | None = None
) -> torch.Tensor:
    """Computes the weights of `attention_weights` for several images, with gradients: (B, heads, queries, N).

    Args:
        layer: the attention layer.
        tokens: its tokens, (B, C, hh, ww), N = hh * ww.
        queries: which tokens attend, None for all.
    """
    B, _, hh, ww = tokens.shape
    heads, d = layer.num_heads, layer.dim // layer.num_heads
    q, k, _ = layer.qkv(tokens).reshape(B, heads, 3, d, hh * ww).unbind(2)  # (B, heads, d, N) each
    if queries is not None:
        q = q[..., list(queries)]
    return (q.transpose(-1, -2) * d**-0.5 @ k).softmax(-1)


@contextmanager
def watch(model: nn.Module) -> Iterator[list[WatchedLayer]]:
    """Collects the inputs of the model's `SuperTokenAttention` layers, in the order of the forward pass.

    Inside the block the model is in eval mode and records no gradients.

    Raises:
        ValueError: the model got more than one image at once.
    """
    watched: list[WatchedLayer] = []

    def watcher(name: str) -> Callable[[SuperTokenAttention, tuple[torch.Tensor]], None]:
        def hook(layer: SuperTokenAttention, args: tuple[torch.Tensor]) -> None:
            if len(args[0]) != 1:
                raise ValueError(f"watch: expected one image at a time, got {len(args[0])}")
            watched.append(WatchedLayer(name, layer, args[0]))

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for name, layer in model.named_modules():
            if isinstance(layer, SuperTokenAttention):
                stack.callback(layer.register_forward_pre_hook(watcher(name)).remove)
        yield watched


def last_of_stages(layers: Sequence[WatchedLayer]) -> dict[str, WatchedLayer]:
    """The last layer of each stage, as 'stage 1' and so on.

    The stage is the part of the layer's name before '.blocks.', such as 'stages.0' in 'stages.0.blocks.2.attn'.
    """
    stages = groupby(layers, key=lambda watched: watched.name.partition(".blocks.")[0])
    return {f"stage {number}": list(stage)[-1] for number, (_, stage) in enumerate(stages, 1)}


def check_point(point: Point) -> None:
    """Raises an InputError unless both coordinates are fractions between 0 and 1."""
    if not all(0 <= value <= 1 for value in point):
        raise InputError(f"point: expected two fractions between 0 and 1, got {point[0]:g} {point[1]:g}")


def interpolation(n: int, size: int) -> torch.Tensor:
    """(size, n) weights of linear interpolation from n pixels to `size`, both over the same length."""
    place = ((torch.arange(size) + 0.5) * n / size - 0.5).clamp(0, n - 1)
    return (1 - (place[:, None] - torch.arange(n)).abs()).clamp(min=0)


def mean_colours(photo: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each pixel in the mean colour of all pixels with its label.

    Args:
        photo: (H, W, 3).
        labels: (h, w) int64, of any size. They are stretched over the photo.

    Returns:
        (H, W, 3), the dtype of `photo`.
    """
    rows, cols = ((2 * torch.arange(n) + 1) * m // (2 * n) for n, m in zip(photo.shape, labels.shape, strict=False))
    label = labels[rows[:, None], cols].flatten()
    colours = photo.new_zeros(int(label.max()) + 1, photo.shape[2]).index_add_(0, label, photo.flatten(0, 1))
    return (colours / label.bincount()[:, None])[label].reshape(photo.shape)


def borders(labels: torch.Tensor) -> torch.Tensor:
    """The edges between pixels of different labels (H, W), in pixels: (N, 2, 2), from (x, y) to (x, y)."""
    y, x = (labels[:, 1:] != labels[:, :-1]).nonzero().unbind(1)
    upright = torch.stack([x + 1, y, x + 1, y + 1], 1)
    y, x = (labels[1:] != labels[:-1]).nonzero().unbind(1)
    level = torch.stack([x, y + 1, x + 1, y + 1], 1)
    return torch.cat([upright, level]).reshape(-1, 2, 2)


def draw_super_tokens(photo: torch.Tensor, layers: Mapping[str, WatchedLayer], point: Point = (0.5, 0.5)) -> "Figure":
    """Draws a row for each layer: cells, borders and mean colours of super tokens, and shares in the one at the point.

    The shares are shown close up, since they are 0 outside the 3 x 3 cells around the super token. Layers with cells of
    one pixel are left out.

    Args:
        photo: (H, W, 3) in 0 ... 1, the full image at any size.
        layers: titles and layers, as `last_of_stages` finds them.
        point: x and y as fractions of the width and the height.

    Raises:
        ValueError: the point lies outside the image, or none of the layers has larger cells.
    """
    layers = {title: watched for title, watched in layers.items() if watched.samples}
    if not layers:
        raise InputError("layers: expected at least one with cells of more than one pixel, got none")
    figure, axes = _panels(photo, len(layers), 4)
    for (title, watched), row in zip(layers.items(), axes, strict=True):
        found = watched.association()
        hh, ww = found.q.shape[:2]
        owner = found.owner(point)
        labels = found.assignment()
        share = found.weights(*owner)
        row[0].set_ylabel(title, size=TEXT)
        _title(row[0], f"{hh} x {ww} cells")
        _outline(row[0], photo, found.cells())
        _title(row[1], "super tokens")
        _outline(row[1], photo, labels)
        _title(row[2], "their mean colours")
        row[2].images[0].set_data(mean_colours(photo, labels).numpy())
        _title(row[3], f"share in the marked one: 0 to {share.max():.2f}")
        _overlay(row[3], photo, share)
        for ax in row:
            _outline(ax, photo, labels == owner[0] * ww + owner[1], "cyan", 1.2)
        _zoom(row[3], photo, ((owner[1] + 0.5) / ww, (owner[0] + 0.5) / hh), ZOOM / min(hh, ww))
    return figure


def draw_attention(photo: torch.Tensor, layers: Mapping[str, WatchedLayer], point: Point = (0.5, 0.5)) -> "Figure":
    """Draws the photo, and for each layer the attention of the super token at the point: the mean over the heads,
    upsampled to pixels.

    Arguments as in `draw_super_tokens`. With cells of one pixel it is the attention of that pixel.
    """
    figure, axes = _panels(photo, 1, 1 + len(layers))
    _title(axes[0, 0], "photo")
    _mark(axes[0, 0], photo, point)
    for (title, watched), ax in zip(layers.items(), axes[0, 1:], strict=True):
        found = watched.association()
        attention = found.spread(watched.attention(*found.owner(point)).mean(0))
        _title(ax, f"{title}: 0 to {100 * attention.max():.3g}%")
        _overlay(ax, photo, attention)
        _mark(ax, photo, point)
    return figure


def draw_iterations(photo: torch.Tensor, watched: WatchedLayer, n_iter: int) -> "Figure":
    """Draws the super tokens' borders after 1 ... n_iter rounds of association, and the share of pixels that moved."""
    figure, axes = _panels(photo, 1, n_iter)
    before = None
    for rounds, ax in enumerate(axes[0], 1):
        labels = watched.association(rounds).assignment()
        title = f"{rounds} round" if rounds == 1 else f"{rounds} rounds"
        if before is not None:
            title += f": {(labels != before).float().mean():.1%} moved"
        if rounds == watched.layer.n_iter:
            title += " (the model's)"
        _title(ax, title)
        _outline(ax, photo, labels)
        before = labels
    return figure


def _panels(photo: torch.Tensor, rows: int, columns: int) -> tuple["Figure", Any]:
    """A figure, and its panels (rows, columns), each with the photo."""
    from matplotlib.figure import Figure  # pyplot would keep figures and choose a window system

    H, W = photo.shape[:2]
    size = (columns * PANEL, rows * (PANEL * H / W + 0.25))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.imshow(photo.numpy(), extent=(0, W, H, 0))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def _title(ax: "Axes", text: str) -> None:
    ax.set_title(text, size=TEXT)


def _outline(ax: "Axes", photo: torch.Tensor, labels: torch.Tensor, colour: str = "yellow", width: float = 0.4) -> None:
    """Draws the borders of labels (h, w) over the photo."""
    from matplotlib.collections import LineCollection

    (H, W), (h, w) = photo.shape[:2], labels.shape
    lines = borders(labels) * torch.tensor([W / w, H / h])
    ax.add_collection(LineCollection(list(lines.numpy()), colors=colour, linewidths=width, capstyle="projecting"))


def _overlay(ax: "Axes", photo: torch.Tensor, values: torch.Tensor) -> None:
    """Turns the photo grey and lays values (h, w) over it, the more opaque the larger."""
    H, W = photo.shape[:2]
    top = values.max().clamp(min=1e-12)
    ax.images[0].set_data(photo.mean(-1, keepdim=True).expand(-1, -1, 3).numpy())
    opacity = 0.2 + 0.55 * values / top
    ax.imshow(values.numpy(), cmap="inferno", alpha=opacity.numpy(), vmin=0, vmax=top.item(), extent=(0, W, H, 0))


def _mark(ax: "Axes", photo: torch.Tensor, point: Point) -> None:
    H, W = photo.shape[:2]
    ax.plot(point[0] * W, point[1] * H, "o", color="cyan", markeredgecolor="black", markersize=5)


def _zoom(ax: "Axes", photo: torch.Tensor, centre: Point, part: float) -> None:
    """Shows the part of the photo (its side to the photo's, at most 1) around a point, as far as it lies inside."""
    H, W = photo.shape[:2]
    half = min(part, 1) / 2
    x, y = (min(max(value, half), 1 - half) for value in centre)
    ax.set(xlim=((x - half) * W, (x + half) * W), ylim=((y + half) * H, (y - half) * H))
