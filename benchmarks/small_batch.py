"""The effect of small batches on local statistics: the tables and the figure of docs/small-batch.md.

python train.py -m experiment=small_batch run=small_batch             trains all runs
python benchmarks/small_batch.py collect outputs/small_batch/*        runs to docs/data/small_batch*.csv
python benchmarks/small_batch.py tables                               prints the tables of the page
python benchmarks/small_batch.py plot docs/small-batch.png            needs matplotlib
python benchmarks/small_batch.py worlds outputs/world_1 outputs/world_2 ...     compares runs with the first one
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from syncbn.training.checkpoint import files
from syncbn.training.config.parsing import parse
from syncbn.training.config.schema import Config
from syncbn.training.data import dataset, registry
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.trainer.build import build_model

DATA = Path(__file__).parents[1] / "docs/data"
CURVES, FINAL = DATA / "small_batch.csv", DATA / "small_batch_final.csv"
CASES = {
    "synchronized": "synchronized: 32",
    "local_8": "local: 8",
    "local_4": "local: 4",
    "local_2": "local: 2",
    "group_norm": "GroupNorm",
}  # with their names on the page
Row = dict[str, Any]


def case_of(config: Config) -> str:
    """The case to which a run belongs, by its configuration."""
    if config.model.norm == "group":
        return "group_norm"
    if config.bn.sync:
        return "synchronized"
    return f"local_{config.batch_size // config.bn.virtual_ranks}"


def collect(runs: Iterable[Path]) -> tuple[list[Row], list[Row]]:
    """Rows of the validation curves and of the final results, sorted by length, case and seed, of finished runs."""
    curves: list[Row] = []
    ends: list[Row] = []
    data: dataset.Data | None = None
    for run in runs:
        if not (run / "summary.json").exists():
            continue
        content = files.read(files.by_step(run / "checkpoints")[-1], "load")
        config = parse(content["config"])
        data = data or registry.load_data(config.data)
        key = {"steps": content["step"], "case": case_of(config), "seed": config.seed}
        records: dict[int, Row] = {}
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            records.setdefault(record["step"], {}).update(record)
        curves += [
            {**key, "step": step, "train_loss": f"{record['train/loss']:.4f}",
             "val_accuracy": f"{record['val/accuracy']:.4f}", "val_loss": f"{record['val/loss']:.4f}"}
            for step, record in sorted(records.items()) if "val/accuracy" in record
        ]  # fmt: skip
        final = json.loads((run / "summary.json").read_text())["metrics"]
        best = {"best_val_accuracy": f"{final['val/accuracy']:.4f}", "test_accuracy": f"{final['test/accuracy']:.4f}"}
        ends.append(key | best | of_both_modes(config, content, data))
        print(*ends[-1].values(), flush=True)
    order = list(CASES)
    for rows in (curves, ends):
        rows.sort(key=lambda row: (row["steps"], order.index(row["case"]), row["seed"], row.get("step", 0)))
    return curves, ends


@torch.no_grad()
def of_both_modes(config: Config, content: dict[str, Any], data: dataset.Data) -> Row:
    """Accuracy and loss of the last weights on the validation images, in evaluation and in training mode.

    Batches are as large as in training. In evaluation mode they are normalized by running statistics, in training mode
    each group of samples by its own statistics.
    """
    context = RankContext(0, 1, torch.device("cpu"), torch.float32)
    model = build_model(config, data, context)
    found: Row = {}
    for mode, training in (("eval", False), ("train", True)):
        model.load_state_dict(content["model"])
        model.train(training)
        correct, loss = 0, 0.0
        for index in torch.arange(len(data.val)).split(config.batch_size):
            images, labels = data.eval_batch(data.val, index, torch.float32)
            outputs = model(images)
            correct += int((outputs.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        found |= {f"{mode}_accuracy": f"{correct / len(data.val):.4f}", f"{mode}_loss": f"{loss / len(data.val):.4f}"}
    return found


def write(path: Path, rows: list[Row]) -> None:
    """Writes the rows as CSV."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> dict[int, dict[str, list[dict[str, str]]]]:
    """The rows of a CSV file by the length of their run in steps, then by case, in the order of CASES."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[int, dict[str, list[dict[str, str]]]] = {}
    for steps in sorted({int(row["steps"]) for row in rows}):
        of_length = [row for row in rows if int(row["steps"]) == steps]
        by_case = {case: [row for row in of_length if row["case"] == case] for case in CASES}
        found[steps] = {case: of_case for case, of_case in by_case.items() if of_case}
    return found


def mean_and_std(rows: list[dict[str, str]], column: str, scale: float) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of a column over seeds, times `scale`."""
    values = [scale * float(row[column]) for row in rows]
    return statistics.mean(values), statistics.stdev(values)


def accuracy_table(final: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """Yields a Markdown table of accuracies by case, with the test accuracy's difference to synchronized per seed."""
    yield "| normalized over | seeds | best validation accuracy, % | last, % | test accuracy, % | less synchronized |"
    yield "|---|---|---|---|---|---|"
    reference = {row["seed"]: row for row in final["synchronized"]}
    for case, rows in final.items():
        columns = ("best_val_accuracy", "eval_accuracy", "test_accuracy")
        cells = [f"{mean:.2f} +- {std:.2f}" for mean, std in (mean_and_std(rows, column, 100.0) for column in columns)]
        pairs = [100 * (float(row["test_accuracy"]) - float(reference[row["seed"]]["test_accuracy"])) for row in rows]
        against = f"{statistics.mean(pairs):+.2f} +- {statistics.stdev(pairs):.2f}" if case != "synchronized" else ""
        yield f"| {CASES[case]} | {len(rows)} | {' | '.join(cells)} | {against} |"


def mode_table(final: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """Yields a Markdown table of the last weights' loss and accuracy in both modes (see `of_both_modes`)."""
    yield "| normalized over | loss, running statistics | loss, those of the batch | accuracy, running, % | batch, % |"
    yield "|---|---|---|---|---|"
    columns = (("eval_loss", 1.0, 3), ("train_loss", 1.0, 3), ("eval_accuracy", 100.0, 2), ("train_accuracy", 100.0, 2))
    for case, rows in final.items():
        found = [(*mean_and_std(rows, column, scale), digits) for column, scale, digits in columns]
        cells = [f"{mean:.{digits}f} +- {std:.{digits}f}" for mean, std, digits in found]
        yield f"| {CASES[case]} | {' | '.join(cells)} |"


def tables() -> list[str]:
    """The tables of the page: for each length of the runs, accuracies and modes."""
    return ["\n".join(table(final)) for final in read(FINAL).values() for table in (accuracy_table, mode_table)]


def plot(path: Path) -> None:
    """Plots validation accuracy over steps and test accuracy of the shortest runs: mean and one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (whole, end) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2), layout="constrained")
    colors = ("black", "tab:blue", "tab:orange", "tab:red", "tab:green")
    curves, final = (next(iter(read(path).values())) for path in (CURVES, FINAL))
    for (case, rows), color in zip(curves.items(), colors, strict=True):
        steps = sorted({int(row["step"]) for row in rows})
        found = [mean_and_std([r for r in rows if int(r["step"]) == step], "val_accuracy", 100.0) for step in steps]
        means = [mean for mean, _ in found]
        dashes = "--" if case == "group_norm" else "-"
        whole.plot(steps, means, dashes, color=color, label=CASES[case])
        low, high = ([m + sign * s for m, s in found] for sign in (-1, 1))
        whole.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    for number, (rows, color) in enumerate(zip(final.values(), colors, strict=True)):
        mean, std = mean_and_std(rows, "test_accuracy", 100.0)
        end.errorbar([number], [mean], [std], fmt="o", capsize=4, color=color)
        end.plot([number + 0.18] * len(rows), [100 * float(r["test_accuracy"]) for r in rows], "_", color=color)
    end.set_xticks(range(len(CASES)), [name.replace(": ", "\n") for name in CASES.values()], fontsize=8)
    end.set_xlim(-0.5, len(CASES) - 0.5)
    end.set_ylabel("test accuracy, %")
    whole.set_ylim(bottom=65)  # hides the first validation, when training has hardly begun
    whole.set_xlabel("steps of 32 images")
    whole.set_ylabel("validation accuracy, %")
    whole.legend(fontsize=8, title="images that share statistics", title_fontsize=8)
    for axes in (whole, end):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def worlds(runs: list[Path]) -> Iterator[str]:
    """Yields a Markdown table of the largest absolute differences between the first run and each of the others."""
    yield "| run | train loss | weights | running means | running variances |"
    yield "|---|---|---|---|---|"
    losses, model = _trajectory(runs[0])
    for run in runs[1:]:
        other_losses, other = _trajectory(run)
        furthest = {"loss": max(abs(a - b) for a, b in zip(losses, other_losses, strict=True))}
        for name, value in model.items():
            kind = name.rpartition(".")[2] if "running" in name else "weights"
            furthest[kind] = max(furthest.get(kind, 0.0), float((value - other[name]).abs().max()))
        cells = [f"{furthest[kind]:.1e}" for kind in ("loss", "weights", "running_mean", "running_var")]
        yield f"| {run.name} | {' | '.join(cells)} |"


def _trajectory(run: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The logged training losses of a run, and the state dict of its last checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    model = files.read(files.by_step(run / "checkpoints")[-1], "load")["model"]
    return [record["train/loss"] for record in records if "train/loss" in record], model


def main() -> None:
    """Runs the command that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tables")
    for name in ("collect", "worlds"):
        commands.add_parser(name).add_argument("runs", nargs="+", type=Path)
    commands.add_parser("plot").add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "collect":
        for path, rows in zip((CURVES, FINAL), collect(arguments.runs), strict=True):
            write(path, rows)
    elif arguments.command == "plot":
        plot(arguments.path)
    else:
        print(*(tables() if arguments.command == "tables" else ["\n".join(worlds(arguments.runs))]), sep="\n\n")


if __name__ == "__main__":
    main()
