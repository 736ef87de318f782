"""Published figures of the paper and of its peers. They stand in published.csv, one figure a row, with its source.

The metrics, and their units:

- `params_m`: parameters of the classifier, in millions.
- `gmacs`: multiply-accumulates of one image in 10^9, as the source counts them.
- `fvcore_gmacs`: the same, as fvcore counts them on the authors' code. The source names that code.
- `layers_gmacs`: convolutions and linear layers alone, of a whole detector or segmentor.
- `top1`: on the validation set, in per cent.
- `img_per_s`: images a second on a V100 at batch 16.
- `box_ap`, `mask_ap`: on COCO val2017, in per cent.
- `miou`, `miou_multi_scale`: on ADE20K val, in per cent.

`img_size` is the image that is classified. For a detector or segmentor it is the image whose cost is counted.
"""

import csv
from functools import cache
from importlib import resources

__all__ = ["rows", "value"]

KEY = ("timm_name", "setting", "img_size", "metric")


@cache
def rows() -> tuple[dict[str, str], ...]:
    """Every figure: model, timm_name, setting, img_size (HxW), metric, value, source. All are text, as printed."""
    text = resources.files("svit").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


def value(timm_name: str | None, setting: str, img_size: tuple[int, int], metric: str) -> float | None:
    """One figure, or None if none is published.

    Args:
        timm_name: of the model or backbone, without a tag, such as "svit_small".
        setting: "ImageNet-1K", "Mask R-CNN 1x", "Mask R-CNN 3x", "Cascade Mask R-CNN 3x" or "UPerNet 160k".
        img_size: (H, W).
        metric: one of those above.
    """
    wanted = (timm_name, setting, f"{img_size[0]}x{img_size[1]}", metric)
    found = [row["value"] for row in rows() if wanted == tuple(row[key] for key in KEY)]
    return float(found[0]) if found else None
