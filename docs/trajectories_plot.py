"""Draws docs/trajectories.png: one job at several world sizes. Takes some minutes of two cores.

python docs/trajectories_plot.py                            train, and draw
python docs/trajectories_plot.py DIRECTORY TARGET           draw the runs of a directory that it has made before
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

ROOT = Path(__file__).parents[1]
JOB = ("precision=fp64", "duration=8ep", "eval_every=10", "tracker=none", "tracker.report=false")
RUNS = {
    "one": (1, (), "1 process", {"color": "black", "linewidth": 5, "alpha": 0.25}),
    "two": (2, (), "2 ranks", {"color": "tab:blue", "linewidth": 2.5}),
    "four": (4, (), "4 ranks", {"color": "tab:orange", "linewidth": 1, "linestyle": "--"}),
    "local": (4, ("bn.sync=false",), "4 ranks, each with statistics of its own", {"color": "tab:red", "linewidth": 1}),
}
"""Name of the run, ranks, overrides, label, style."""


def train(directory: Path) -> None:
    """Makes the runs in `directory`/outputs."""
    for name, (num_ranks, overrides, *_) in RUNS.items():
        launch = ("torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", num_ranks)
        command = [sys.executable, "-m", *map(str, launch), str(ROOT / "train.py"), *JOB, *overrides, f"run={name}"]
        subprocess.run(command, cwd=directory, check=True, timeout=900)


def draw(directory: Path, target: Path) -> None:
    """Validation loss over steps, a line for each run."""
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for name, (_, _, label, style) in RUNS.items():
        lines = (directory / "outputs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        points = [(record["step"], record["val/loss"]) for record in map(json.loads, lines) if "val/loss" in record]
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        draw(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as made:
            train(Path(made))
            draw(Path(made), Path(__file__).parent / "trajectories.png")
