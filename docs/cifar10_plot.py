"""Draws docs/images/cifar10-curve.svg from the log of the training: python docs/cifar10_plot.py"""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent

with open(DOCS / "benchmarks" / "2026-11-23-cifar10.csv", newline="") as file:
    rows = list(csv.DictReader(file))
epochs = [int(row["epoch"]) + 1 for row in rows]

plt.rcParams.update({"font.size": 9, "svg.hashsalt": "svit", "svg.fonttype": "none"})
fig, (loss, accuracy) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
for key, label in (("train_loss", "training, labels smoothed"), ("val_loss", "test")):
    loss.plot(epochs, [float(row[key]) for row in rows], label=label)
loss.set(xlabel="epoch", ylabel="cross entropy", ylim=0)
loss.legend(frameon=False)
accuracy.plot(epochs, [float(row["top1"]) for row in rows], color="C1")
accuracy.set(xlabel="epoch", ylabel="top-1 on the test images, %", ylim=(55, 100))
accuracy.annotate(f"{float(rows[-1]['top1']):.2f}", (epochs[-1], float(rows[-1]["top1"])), (-6, 6),
                  textcoords="offset points", ha="right")  # fmt: skip
for axes in (loss, accuracy):
    axes.spines[["top", "right"]].set_visible(False)
fig.savefig(DOCS / "images" / "cifar10-curve.svg", metadata={"Date": None})
