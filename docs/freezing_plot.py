"""Draws docs/freezing.png from the numbers of benchmarks/freezing.py: `python docs/freezing_plot.py`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

DOCS = Path(__file__).parent
NAMES = {
    "none": "nothing frozen",
    "gradual": "gradual: block by block",
    "bn_stats": "statistics frozen",
    "weights": "weights frozen, BN adapts",
    "mistake": "THE MISTAKE: parameters frozen,\nstatistics moving",
    "backbone": "whole backbone frozen",
}  # from the top


def draw(source: Path, target: Path) -> None:
    """A dot for each seed: what fine-tuning gained on its own classes, and what it did to those of before."""
    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, (new, old) = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for height, case in enumerate(reversed(NAMES)):
        mine = [row for row in rows if row["freeze"] == case]
        colour = "tab:red" if case == "mistake" else "tab:blue"
        for axes, field in ((new, "new_accuracy"), (old, "old_accuracy")):
            axes.plot([float(row[field]) for row in mine], [height] * len(mine), "o", color=colour, alpha=0.6)
    before = [float(row["old_accuracy_before"]) for row in rows]
    old.axvspan(min(before) - 0.002, max(before) + 0.002, color="tab:green", alpha=0.3, label="before fine-tuning")
    old.legend(loc="lower left", frameon=False)
    new.set_yticks(range(len(NAMES)), list(reversed(NAMES.values())))
    for label in new.get_yticklabels():
        label.set_color("tab:red" if "MISTAKE" in label.get_text() else "black")
    new.set_title("what was asked for:\nthe two new classes", fontsize=10)
    old.set_title(
        "what was not: the eight old classes, by their\nvalidated head on the fine-tuned backbone", fontsize=10
    )
    for axes in (new, old):
        axes.set_xlabel("test accuracy")
        axes.grid(axis="x", alpha=0.3)
    old.set_xlim(0, 1)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    paths = [Path(word) for word in sys.argv[1:]]
    draw(*(paths or [DOCS / "data/freezing.csv", DOCS / "freezing.png"]))
