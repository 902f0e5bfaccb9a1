"""What freezing preserves and what it costs, on Fashion-MNIST: docs/freezing.md, docs/data/freezing.csv.

python benchmarks/freezing.py --out outputs/freezing --csv docs/data/freezing.csv [--seeds 0 1 2]

For each seed it runs three commands, and prints them: a network is trained on eight classes; its backbone is
fine-tuned on the other two, shirts and T-shirts, once for each of six choices of `freeze`; and the network of the eight
classes is evaluated with each of these backbones in place of its own, with their running statistics and with population
statistics of images of the eight classes. Two seeds run at a time, one thread each. Accuracies are on the test set, of
the weights with the best validation accuracy.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = ("none", "bn_stats", "weights", "gradual", "mistake", "backbone")  # choices of freeze=
COMMON = ["data=fashion_mnist", "model.width=8", "batch_size=128", "tracker=none"]
FIELDS = ("seed", "freeze", "new_accuracy", "drift", "old_accuracy_before", "old_accuracy", "old_accuracy_precise")
Row = dict[str, str]


def train(out: Path, *words: str) -> None:
    """Runs train.py with these arguments in the directory `out`; a RuntimeError with its output if it fails."""
    print("python train.py", shlex.join(words), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout)


def measure(seed: int, out: Path, overrides: list[str]) -> list[Row]:
    """Runs the three commands of a seed, resuming interrupted runs, and returns a row per case."""
    same = [*COMMON, f"seed={seed}", *overrides]
    old, new, _ = directories(seed)
    train(out, "experiment=pretrain", "data.classes=[1,2,3,4,5,7,8,9]", "duration=4ep", f"run={old}", *same)
    train(out, "-m", "experiment=finetune", f"freeze={','.join(CASES)}", "data.classes=[0,6]",
          f"init.backbone.path=outputs/{old}", f"run={new}", *same)  # fmt: skip
    judge(seed, out)
    return list(collect(seed, out))


def judge(seed: int, out: Path) -> None:
    """Runs the third command: evaluates the network of the eight classes with each fine-tuned backbone."""
    old, new, judged = directories(seed)
    backbones = ",".join(f"outputs/{new}/{number}" for number in range(len(CASES)))
    train(out, "-m", "task=eval", f"load=outputs/{old}", f"init.backbone.path={backbones}", "eval.precise_bn=50",
          f"run={judged}")  # fmt: skip


def directories(seed: int) -> tuple[str, str, str]:
    """The names of the runs of a seed's three commands."""
    return f"eight-{seed}", f"two-{seed}", f"eight-again-{seed}"


def collect(seed: int, out: Path) -> Iterator[Row]:
    """Yields a row for each case, from the files of the runs."""
    old, new, judged = (out / "outputs" / name for name in directories(seed))
    before = summary(old)
    for number, case in enumerate(CASES):
        tuned = summary(new / str(number))
        after = json.loads((judged / str(number) / "metrics.jsonl").read_text().splitlines()[-1])
        numbers = [tuned["test/accuracy"], tuned["drift/backbone"], before["test/accuracy"], after["test/accuracy"],
                   after["precise/test/accuracy"]]  # fmt: skip
        yield dict(zip(FIELDS, (str(seed), case, *(f"{number:.4f}" for number in numbers)), strict=True))


def summary(run_dir: Path) -> dict[str, float]:
    """The final metrics of a training run."""
    metrics: dict[str, float] = json.loads((run_dir / "summary.json").read_text())["metrics"]
    return metrics


def table(rows: list[Row]) -> Iterator[str]:
    """Yields lines of Markdown: mean and standard deviation over the seeds."""

    def cell(field: str, case: str | None) -> str:
        values = [float(row[field]) for row in rows if case in (None, row["freeze"])]
        values = values if case else values[:: len(CASES)]  # without a case: the same in all, so one per seed
        spread = statistics.stdev(values) if len(set(values)) > 1 else 0
        return f"{statistics.mean(values):.3f} ± {spread:.3f}"

    yield "| `freeze=` | accuracy: the two new classes | drift | the eight old ones | these with precise statistics |"
    yield "|---|---|---|---|---|"
    yield f"| before fine-tuning | | | {cell('old_accuracy_before', None)} | |"
    for case in CASES:
        cells = [cell(field, case) for field in ("new_accuracy", "drift", "old_accuracy", "old_accuracy_precise")]
        yield f"| `{case}` | {' | '.join(cells)} |"


def main() -> None:
    """Runs the commands of all seeds, writes the CSV file, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a directory for the runs")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as two:
        measured = two.map(lambda seed: measure(seed, arguments.out, arguments.overrides), arguments.seeds)
        rows = [row for one_seed in measured for row in one_seed]
    with arguments.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with arguments.csv.open(encoding="utf-8") as file:
        print("\n".join(table(list(csv.DictReader(file)))))


if __name__ == "__main__":
    main()
