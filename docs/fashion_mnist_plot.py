"""The learning curve of `experiment=fashion_mnist`.

python docs/fashion_mnist_plot.py collect RUN ... > docs/data/fashion_mnist.csv
python docs/fashion_mnist_plot.py                              draws docs/fashion-mnist.png
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

DOCS = Path(__file__).parent
FIELDS = ["seed", "epoch", "train_loss", "val_loss", "val_accuracy", "test_accuracy"]


def collect(runs: list[Path]) -> list[dict[str, object]]:
    """A row per epoch and run; the last one of a run also has the test accuracy, of the best weights."""
    rows = []
    for run in runs:
        seed = OmegaConf.load(run / "config.yaml").seed
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        loss = 0.0
        for record in records:
            loss = record.get("train/loss", loss)
            if "val/accuracy" in record:
                values = (record["epoch"], loss, record["val/loss"], record["val/accuracy"])
                rows.append(dict(zip(FIELDS, [seed, *(f"{value:.4f}" for value in values), ""], strict=True)))
        rows[-1]["test_accuracy"] = f"{records[-1]['test/accuracy']:.4f}"
    return rows


def draw(source: Path, target: Path) -> None:
    """Losses, and validation accuracy, by epoch; a line for each seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for number, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
        mine = [row for row in rows if row["seed"] == seed]
        epochs = [float(row["epoch"]) for row in mine]
        for field, colour, label in (("train_loss", "tab:gray", "training"), ("val_loss", "tab:blue", "validation")):
            left.plot(epochs, [float(row[field]) for row in mine], color=colour, label=None if number else label)
        right.plot(epochs, [100 * float(row["val_accuracy"]) for row in mine], color="tab:blue",
                   label=None if number else "validation")  # fmt: skip
        right.plot(epochs[-1], 100 * float(mine[-1]["test_accuracy"]), "o", color="tab:red",
                   label=None if number else "test, once")  # fmt: skip
    left.set(xlabel="epoch", ylabel="loss", ylim=(0.1, 0.6))
    right.set(xlabel="epoch", ylabel="accuracy, %", ylim=(84, 95))
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(collect([Path(word) for word in sys.argv[2:]]))
    else:
        draw(DOCS / "data/fashion_mnist.csv", DOCS / "fashion-mnist.png")
