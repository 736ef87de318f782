"""The published figures: what is read of them, and that no table, page or config says another."""

import re
from pathlib import Path

import pytest

from svit import published

ROOT = Path(__file__).parent.parent
SVIT = {"SViT-S": "svit_small", "SViT-B": "svit_base", "SViT-L": "svit_large"}
SIZES = {"ImageNet-1K": "224x224", "UPerNet 160k": "512x2048"}  # 800x1280 in detection


def printed(model: str, setting: str, *metrics: str, img_size: str | None = None) -> str:
    """Figures as the source prints them, " / " between, "-" for one that it lacks, "" or "-" for none at all."""
    img_size = img_size or SIZES.get(setting, "800x1280")
    found = {
        row["metric"]: row["value"]
        for row in published.rows()
        if (row["model"], row["setting"], row["img_size"]) == (model, setting, img_size)
    }
    return " / ".join(found.get(metric, "-") for metric in metrics) if {*metrics} & found.keys() else "-"


def table(document: str, heading: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the table whose header row begins with `heading`."""
    (block,) = re.findall(
        rf"^{re.escape(heading)}.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / document).read_text(), re.MULTILINE
    )
    rows = [[cell.strip(" *`") for cell in line.strip("| ").split(" |")] for line in block.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_rows():
    """Each figure stands once, is a number and has a source."""
    rows = published.rows()
    assert len(rows) > 150
    assert len({tuple(row[key] for key in ("model", "setting", "img_size", "metric")) for row in rows}) == len(rows)
    for row in rows:
        assert float(row["value"]) > 0
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}|hhb072/STViT", row["source"]), row
        assert f"`{row['metric']}`" in published.__doc__


def test_value():
    assert published.value("svit_base", "ImageNet-1K", (384, 384), "top1") == 86.0
    assert published.value("svit_large", "UPerNet 160k", (512, 2048), "layers_gmacs") == 1151
    assert published.value("svit_small", "ImageNet-1K", (256, 256), "top1") is None
    assert published.value(None, "ImageNet-1K", (224, 224), "top1") is None


@pytest.mark.parametrize("document", ["README.md", "docs/zoo.md"])
def test_accuracy_of_the_models(document):
    rows = table(document, "| model | channels" if document == "docs/zoo.md" else "| model | params")
    for model, timm_name in SVIT.items():
        at_both = [printed(model, "ImageNet-1K", "top1", img_size=size) for size in ("224x224", "384x384")]
        assert " / ".join(at_both) in " | ".join(rows[timm_name])


def test_zoo():
    rows = table("docs/zoo.md", "| model | params | GMACs | top-1 |")
    for model in {row["model"]: None for row in published.rows()}:
        params, gmacs, top1 = (printed(model, "ImageNet-1K", metric) for metric in ("params_m", "gmacs", "top1"))
        (timm_name,) = {row["timm_name"] for row in published.rows() if row["model"] == model}
        assert rows.pop(model) == [
            f"{params} M",
            gmacs,
            top1,
            printed(model, "Mask R-CNN 1x", "box_ap", "mask_ap"),
            printed(model, "UPerNet 160k", "miou", "miou_multi_scale"),
            "here" if model in SVIT else timm_name or "no",
        ]
    assert not rows


@pytest.mark.parametrize(("document", "heading"), [("docs/zoo.md", "| backbone | Mask R-CNN 1x")])
def test_detection_and_segmentation(document, heading):
    rows = table(document, heading)
    for model in SVIT:
        settings = ("Mask R-CNN 1x", "Mask R-CNN 3x", "Cascade Mask R-CNN 3x")
        found = [printed(model, setting, "box_ap", "mask_ap") for setting in settings]
        assert [cell or "-" for cell in rows[model]] == [
            *found,
            printed(model, "UPerNet 160k", "miou", "miou_multi_scale"),
        ]


CONFIGS = {
    "mask-rcnn_svit-{}_fpn_1x_coco": "Mask R-CNN 1x",
    "mask-rcnn_svit-{}_fpn_ms-3x_coco": "Mask R-CNN 3x",
    "cascade-mask-rcnn_svit-{}_fpn_ms-3x_coco": "Cascade Mask R-CNN 3x",
    "svit-{}_upernet_8xb2-160k_ade20k-512x512": "UPerNet 160k",
}


@pytest.mark.parametrize("model", SVIT)
@pytest.mark.parametrize("pattern", CONFIGS)
def test_configs(pattern, model):
    """The rows of docs/detection.md and docs/segmentation.md, and the comments at the top of the configs."""
    name, setting = pattern.format(model[-1].lower()), CONFIGS[pattern]
    page, metrics = (
        ("segmentation", ("miou", "miou_multi_scale"))
        if setting == "UPerNet 160k"
        else ("detection", ("box_ap", "mask_ap"))
    )
    (row,) = [cells for cell, cells in table(f"docs/{page}.md", "| config ").items() if cell.startswith(f"[{name}]")]
    accuracy, gmacs = printed(model, setting, *metrics), printed(model, setting, "layers_gmacs")
    assert [cell or "-" for cell in row[:3]] == [model, accuracy, gmacs]
    (config,) = (ROOT / "mm_configs").glob(f"*/{name}.py")
    comment = config.read_text()
    if accuracy != "-":
        for figure in (*accuracy.split(" / "), f"{gmacs} GFLOPs"):
            assert f" {figure} " in comment
    else:
        assert "The paper has no such figure." in comment


def test_prose():
    def of_all(metric: str, img_size: str, separator: str) -> str:
        return separator.join(printed(model, "ImageNet-1K", metric, img_size=img_size) for model in SVIT)

    def text(document: str) -> str:
        return " ".join((ROOT / document).read_text().split())

    top1 = of_all("top1", "224x224", ", ").rsplit(", ", 1)
    assert f"{top1[0]} and {top1[1]} top-1" in text("docs/training.md")
    flops = text("docs/flops.md")
    at_224, at_384 = (of_all("gmacs", size, " / ") for size in ("224x224", "384x384"))
    assert f"{at_224} G at 224 and {at_384} G at 384" in flops
    for model, timm_name in SVIT.items():
        counted = [printed(model, "ImageNet-1K", "fvcore_gmacs", img_size=size) for size in ("224x224", "384x384")]
        assert re.search(
            rf"\| `{timm_name}` [^a-wyz]*\| {counted[0]} [^a-wyz]*384 x 384 [^a-wyz]*\| {counted[1]} \|", flops
        )
