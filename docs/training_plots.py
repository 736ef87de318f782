"""Draws the curves of docs/cifar10.md, photos20.md and bccd.md into docs/images, from the logs of the trainings.

python docs/training_plots.py
"""

import csv
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent


def read(name: str) -> list[dict[str, str]]:
    with open(DOCS / "benchmarks" / name, newline="") as file:
        return list(csv.DictReader(file))


def top1(rows: list[dict[str, str]]) -> list[float]:
    return [float(row["top1"]) for row in rows]


def save(figure: plt.Figure, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "images" / name, metadata={"Date": None})


plt.rcParams.update({"font.size": 9, "svg.hashsalt": "svit", "svg.fonttype": "none"})


def draw_training(log: str, picture: str, images: str, least: float) -> None:
    """Loss and accuracy by epoch. `images` names those of the evaluation; the axis of accuracy starts at `least`."""
    rows = read(log)
    epochs = [int(row["epoch"]) + 1 for row in rows]
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    for key, label in (("train_loss", "training, labels smoothed"), ("val_loss", images)):
        loss.plot(epochs, [float(row[key]) for row in rows], label=label)
    loss.set(xlabel="epoch", ylabel="cross entropy", ylim=0)
    loss.legend(frameon=False)
    accuracy.plot(epochs, top1(rows), color="C1")
    accuracy.set(xlabel="epoch", ylabel=f"top-1 on the {images} images, %", ylim=(least, 100))
    end = top1(rows)[-1]
    accuracy.annotate(f"{end:.2f}", (epochs[-1], end), (-6, 6), textcoords="offset points", ha="right")
    save(figure, picture)


draw_training("2026-11-23-cifar10.csv", "cifar10-curve.svg", "test", 55)
draw_training("2026-11-27-photos20.csv", "photos20-curve.svg", "validation", 20)

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for model, rows in groupby(read("2026-11-23-cifar10-peers.csv"), key=lambda row: row["model"]):
    rows = list(rows)
    minutes = [float(row["seconds"]) / 60 for row in rows]
    axes.plot(minutes, top1(rows), marker=".", label=f"{model}: {top1(rows)[-1]:.2f}")
axes.set(xlabel="minutes of training", ylabel="top-1 on the test images, %", xlim=0)
axes.legend(frameon=False, loc="lower right")
save(figure, "cifar10-peers.svg")

rows = read("2026-11-27-bccd.csv")
epochs = [int(row["epoch"]) for row in rows]
figure, (loss, precision) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
for key, label in (("loss", "sum"), ("loss_cls", "classes"), ("loss_bbox", "boxes")):
    loss.plot(epochs, [float(row[key]) for row in rows], label=label)
loss.set(xlabel="epoch", ylabel="training loss", ylim=0)
loss.legend(frameon=False)
evaluated = [row for row in rows if row["AP"]]
for key in ("AP50", "AP"):
    precision.plot([int(row["epoch"]) for row in evaluated], [float(row[key]) for row in evaluated], label=key)
precision.set(xlabel="epoch", ylabel="on the validation images", ylim=(0, 1), xlim=0)
precision.legend(frameon=False, loc="lower right")
save(figure, "bccd-curve.svg")
