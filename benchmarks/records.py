"""Bytes that the default job's tracking takes per logged step and per evaluation, and so for a million steps.

python benchmarks/records.py [--steps 100]          half a minute; nothing is trained, the network is looked at once

The layers of the default network are logged again and again, with histograms and tables at every step and at none.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from syncbn.stats.monitor import Monitor
from syncbn.training.config.parsing import parse
from syncbn.training.config.run import TrackerConfig
from syncbn.training.launch.resolvers import register_resolvers
from syncbn.training.models.build import build_network
from syncbn.training.tracking import tracker

ROOT = Path(__file__).parents[1]
EVERY, NONE = 10**9, 0  # values of tracker.DENSITY
STEPS_PER_EPOCH, LOG_EVERY, MILLION = 23, 50, 10**6  # of the default job
PROGRESS = {"epoch": 2 / 3, "train/loss": 0.98836535, "train/lr": 0.09912345, "train/samples_per_second": 1583.23456}
VALIDATION = {"epoch": 2 / 3, "val/accuracy": 0.98888885, "val/loss": 0.04876543}


def main() -> None:
    """Prints the bytes of each kind of record, and those of a million steps."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--steps", type=int, default=100)
    steps = arguments.parse_args().steps
    os.environ["WANDB_MODE"] = "offline"
    layers, shipped = default_layers(), tracker.DENSITY
    sizes = {
        (kind, density): size_of(kind, density, steps, layers)
        for kind in ("logged step", "evaluation")
        for density in (EVERY, NONE)
    }
    total = {"wandb": 0.0, "metrics.jsonl": 0.0}
    for kind, interval in (("logged step", LOG_EVERY), ("evaluation", STEPS_PER_EPOCH)):
        in_full, without = sizes[kind, EVERY][0] / steps, sizes[kind, NONE][0] / steps
        records = sizes[kind, NONE][1] / steps
        print(f"{kind}: wandb {in_full:.0f} bytes in full, {without:.0f} without; metrics.jsonl {records:.0f}")
        chosen = times_in_full(interval, shipped)
        total["wandb"] += MILLION // interval * without + chosen * (in_full - without)
        total["metrics.jsonl"] += MILLION // interval * records
        print(f"  in a million steps {MILLION // interval}, {chosen} of them in full")
    print("a million steps: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in total.items()))


def default_layers() -> dict[str, object]:
    """What the layers of the default network hold and see in one training step on random images."""
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = parse(compose("train"))
    model = build_network(config.model, config.bn, 1, 10).train()
    monitor = Monitor(model)
    with monitor.watch(True):
        model(torch.randn(64, 1, 8, 8))
    return dict(monitor.snapshot())


def size_of(kind: str, density: int, steps: int, layers: dict[str, object]) -> tuple[int, int]:
    """Bytes of wandb's directory and of metrics.jsonl after so many records of a kind."""
    tracker.DENSITY = density
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name)
        with tracker.Tracker(TrackerConfig("offline", "syncbn", None, 30.0), run_dir, {}, active=True) as records:
            records.start()
            for step in range(1, steps + 1):
                if kind == "logged step":
                    records.log(step, PROGRESS, layers)  # type: ignore[arg-type]
                else:
                    records.log(step, VALIDATION)
                    records.show_layers(step, layers)  # type: ignore[arg-type]
        files = [path for path in (run_dir / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
        return sum(path.stat().st_size for path in files), (run_dir / "metrics.jsonl").stat().st_size


def times_in_full(interval: int, density: int) -> int:
    """How often a million steps are logged in full, at this interval."""
    count: int = 0
    last: int | None = None
    for step in range(interval, MILLION + 1, interval):
        if last is None or (step - last) * density >= step:
            count, last = count + 1, step
    return count


if __name__ == "__main__":
    main()
