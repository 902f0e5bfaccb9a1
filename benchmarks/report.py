"""Time and memory that the report of a long run takes: both its records, read as they are drawn, and its page.

python benchmarks/report.py [--records 100000] [--layers 9]         half a minute, and 0.7 GB on the disk meanwhile

The records are made up: those of a run that logs every 50 steps, with all the numbers of each layer.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from syncbn.report.write import write_report

LOG_EVERY = 50
OF_LAYER = (
    "running_mean_abs", "running_var", "batch_mean_abs", "batch_var", "drift", "between_rank_share", "weight_abs",
    "bias", "values_per_channel", "dead_channels", "stats_frozen", "affine_frozen",
)  # fmt: skip
OF_RUN = ("epoch", "train/loss", "train/lr", "train/samples_per_second")


def main() -> None:
    """Writes a report of made-up records, and prints seconds and the peak of the memory."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--records", type=int, default=100_000)
    arguments.add_argument("--layers", type=int, default=9)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        records, report = Path(name) / "metrics.jsonl", Path(name) / "report.html"
        make(records, given.records, given.layers)
        size = records.stat().st_size
        began, used = time.perf_counter(), time.process_time()
        write_report([records.parent], report)
        took, used = time.perf_counter() - began, time.process_time() - used
        page = report.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{given.records} records, {size / 1e6:.0f} MB: {took:.1f} s ({used:.1f} s of a core), {peak:.0f} MB at most;"
    )
    print(f"the report has {page / 1e6:.1f} MB")


def make(path: Path, num_records: int, num_layers: int) -> None:
    """Writes records as the trainer does, with random numbers."""
    numbers = random.Random(0)
    layers = [f"backbone.layer{number // 4 + 1}.{number // 2 % 2}.bn{number % 2 + 1}" for number in range(num_layers)]
    keys = [*OF_RUN, *(f"bn/{layer}/{key}" for layer in layers for key in OF_LAYER)]
    with path.open("w", encoding="utf-8") as file:
        for step in range(LOG_EVERY, LOG_EVERY * num_records + 1, LOG_EVERY):
            file.write(json.dumps({"step": step} | {key: numbers.random() for key in keys}) + "\n")


if __name__ == "__main__":
    main()
