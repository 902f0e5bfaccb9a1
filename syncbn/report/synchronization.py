"""What synchronization changes in a run, and what it would save to leave it out: from the shares that were recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.report.metric_names import BETWEEN_RANK_SHARE
from syncbn.report.records import Series
from syncbn.report.runs import Run
from syncbn.report.tables import safe, table

# Samples up to which statistics of one rank alone are too few, whatever the share: those of the audit's rule
# few-values-per-channel, with its source.
FEW_SAMPLES = 4
_SHOWN = 12  # rows that are not folded
# What the profiler calls a training step, and the layers in it; their times include that of their collectives.
_STEP, _LAYERS = "ProfilerStep*", ("NormalizeByBatch", "NormalizeByBatchBackward")


@dataclass(frozen=True)
class SampleSpread:
    """How the samples of one forward pass are spread over the ranks that sum their statistics.

    Attributes:
        num_ranks: the number of those ranks.
        num_samples: their samples together.
        num_passes: forward and backward passes per step (`accumulate`).
    """

    num_ranks: int
    num_samples: int
    num_passes: int

    @property
    def by_chance(self) -> float:
        """The expected share if samples are dealt at random and the values of one sample are all alike.

        Of n independent values over W ranks, a part of (W - 1) / (n - 1) of their variance lies between the means of
        the ranks; more independent values than samples make it smaller.
        """
        return (self.num_ranks - 1) / (self.num_samples - 1)


def synchronization(run: Run) -> str:
    """The section about one run, as HTML."""
    shares = {layer: keys[BETWEEN_RANK_SHARE] for layer, keys in run.by_layer.items() if BETWEEN_RANK_SHARE in keys}
    means = {layer: _finite(series) for layer, series in shares.items()}
    means = {layer: values for layer, values in means.items() if values}
    if not means:
        return (
            f'<p class="absent">No share of variance between ranks was recorded (bn/LAYER/{BETWEEN_RANK_SHARE}).'
            " It needs several ranks, layers that synchronize (bn.sync=true) and a logging step (log_every).</p>"
        )
    ranks = _ranks(run)
    parts = [f"<p>{safe(_verdict(means, ranks))}</p>", _rows(means, ranks)]
    absent = [layer for layer in run.layers if layer not in means]
    if absent:
        parts.append(f"<p>Without a record of it (frozen, or not synchronized): {safe(', '.join(absent))}.</p>")
    parts.append(f"<p>{safe(_profile(run.operators))}</p>")
    return "".join(parts)


def _verdict(means: dict[str, list[float]], ranks: SampleSpread | None) -> str:
    if ranks is None:
        return (
            "How many ranks and samples were summed over is not on record (ranks in environment.json; batch_size,"
            " accumulate and bn.group, as a number or world, in config.yaml), so that nothing says what chance alone"
            " would give."
        )
    local = ranks.num_samples / ranks.num_ranks
    if local <= FEW_SAMPLES:
        return (
            f"Every layer needs synchronization: a rank alone has {local:.3g} sample(s) per pass, and statistics of"
            f" {FEW_SAMPLES} or fewer are noise, whatever lies between the ranks."
        )
    without = [layer for layer, values in means.items() if needs_none(values, ranks)]
    per_step = 2 * ranks.num_passes
    return (
        f"{ranks.num_ranks} ranks with {local:.3g} samples each would differ by a share of up to"
        f" {ranks.by_chance:.3g} if samples were dealt at random. {len(without)} of {len(means)} layers show no more:"
        f" they need no synchronization for what their ranks see. Without it a step has {per_step * len(without)} of"
        f" {per_step * len(means)} collectives less, one forward and one backward for each layer and pass. To leave"
        " them out: convert_sync_batchnorm(model, exclude=[...]); bn.sync=false leaves out all. What that does to"
        " accuracy is not on record; a run with bn.sync=false beside this one tells."
    )


def needs_none(values: Sequence[float], ranks: SampleSpread) -> bool:
    """Whether the mean of the recorded shares is not above what chance gives."""
    return sum(values) / len(values) <= ranks.by_chance


def _rows(means: dict[str, list[float]], ranks: SampleSpread | None) -> str:
    judged = ranks is not None and ranks.num_samples > FEW_SAMPLES * ranks.num_ranks
    rows = []
    for layer, values in sorted(means.items(), key=lambda item: -sum(item[1]) / len(item[1])):
        verdict = "" if ranks is None else "needed" if not judged or not needs_none(values, ranks) else "not needed"
        rows.append([safe(layer), f"{sum(values) / len(values):.3g}", f"{max(values):.3g}", verdict])
    headers = ("layer", "share between ranks, mean", "largest", "synchronization")
    shown = table(headers, rows[:_SHOWN])
    if len(rows) <= _SHOWN:
        return shown
    rest = f"{len(rows) - _SHOWN} layers with smaller shares"
    return f"{shown}<details><summary>{rest}</summary>{table(headers, rows[_SHOWN:])}</details>"


def _ranks(run: Run) -> SampleSpread | None:
    """None where the run does not say, or has too few samples for a share."""
    config = run.flat_config()
    group = config.get("bn.group", "world")
    try:
        world, passes = int(run.environment["ranks"]), int(config.get("accumulate", "1"))
        num_ranks = world if group == "world" else int(group)
        samples = int(config["batch_size"]) * num_ranks // (world * passes)
    except (KeyError, ValueError, ZeroDivisionError):
        return None
    return SampleSpread(num_ranks, samples, passes) if num_ranks > 1 and samples > num_ranks and passes > 0 else None


def _profile(operators: str) -> str:
    """The share of a step that the layers take, by the profiler's table of operators."""
    if not operators:
        return (
            "Which share of a step batch normalization takes is not on record; debug=profile measures it"
            " (profile/operators.txt)."
        )
    lines = [line.rstrip() for line in operators.splitlines()]
    header = next((line for line in lines if line.lstrip().startswith("Name ")), "")
    if "CUDA" in header or "CPU total %" not in header:
        return "A profile is there, of a device: profile/operators.txt has its times by operator."
    end = header.index("CPU total %") + len("CPU total %")  # columns are aligned on the right
    shares = {line.split()[0]: line[:end].split()[-1].rstrip("%") for line in lines if line[:end].endswith("%")}
    try:
        numbers = {name: float(shares[name]) for name in (_STEP, *_LAYERS) if name in shares}
        share = sum(numbers[name] for name in _LAYERS if name in numbers) / numbers[_STEP]
    except (KeyError, ValueError, ZeroDivisionError):
        share = 0.0
    if not share:
        return "The profile does not name the layers' operators among those that take longest (profile/operators.txt)."
    return (
        f"By the profile, layers that normalize by the batch take {share:.0%} of a step on rank 0, with the waiting for"
        " their collectives (profile/operators.txt); profiling itself takes time, most of all of small operators."
    )


def _finite(series: Series) -> list[float]:
    return [value for value in series.points.values() if math.isfinite(value)]
