"""Draws docs/zoo.svg, accuracy against cost, from the published figures in svit/published.csv.

Run it by hand after a change of these: `python docs/zoo_plot.py`. It needs matplotlib, and svit installed.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke

from svit import published

HERE = Path(__file__).parent
# Of each family: colour, mark, and where the names of its models stand, in points from the mark to the text's middle.
STYLE = {
    "Swin": ("#8a8a00", "*", [(0, -16), (4, -16), (28, -9)]),
    "ConvNeXt V2": ("#6f6f6f", "X", [(-13, 0), (50, 9)]),
    "MaxViT": ("#0b9aa8", "P", [(11, -7), (11, -8), (6, -14)]),
    "CAFormer": ("#8c564b", "v", [(-17, -4), (0, 12), (-4, 12)]),
    "BiFormer": ("#8250b4", "D", [(-13, 0), (32, -16)]),
    "TransNeXt": ("#2a8f2a", "^", [(-2, 11), (13, -5), (48, 7)]),
    "RMT": ("#1f6fb4", "s", [(-12, 3), (-4, 11), (6, 12)]),
    "SViT": ("#d62728", "o", [(3, -16), (-14, 3), (12, 14)]),
}


def models() -> dict[str, dict[str, dict[str, float]]]:
    """Family -> size -> metric -> figure, of ImageNet-1K at 224 x 224."""
    found: dict = {}
    for row in published.rows():
        if (row["setting"], row["img_size"]) == ("ImageNet-1K", "224x224"):
            family, _, size = row["model"].rpartition("-")
            found.setdefault(family, {}).setdefault(size, {})[row["metric"]] = float(row["value"])
    return found


def main() -> None:
    families = models()
    assert families.keys() == STYLE.keys()
    plt.rcParams.update({"font.size": 11, "svg.hashsalt": "svit", "svg.fonttype": "path"})  # the same file at each run
    fig, ax = plt.subplots(figsize=(9, 6.2), layout="constrained")
    for family, (color, mark, offsets) in STYLE.items():
        sizes = families[family]
        points = [(figures["gmacs"], figures["top1"]) for figures in sizes.values()]
        ours = family == "SViT"
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=color, lw=2.6 if ours else 1.1, alpha=1 if ours else 0.7)
        ax.plot(x, y, mark, color=color, ms=12 if mark == "*" else 9, mec="white", mew=0.7, zorder=3)
        for size, point, offset in zip(sizes, points, offsets, strict=True):
            ax.annotate(
                f"{family}-{size}" if size == [*sizes][-1] else size,
                point,
                offset,
                textcoords="offset points",
                ha="center",
                va="center",
                color=color,
                weight="bold" if ours else "normal",
                path_effects=[withStroke(linewidth=3, foreground="white")],  # readable across a line
                zorder=4,
            )
    ax.set(xlabel="GMACs at 224 x 224", ylabel="top-1 on ImageNet-1K, %", xlim=(2.6, 25.4), ylim=(80.9, 85.8))
    ax.set_title("Published figures: 224 x 224, no other training data than ImageNet-1K", fontsize=11)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(HERE / "zoo.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
