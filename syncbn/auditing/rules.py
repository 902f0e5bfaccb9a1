"""Findings of an audit, the rules that they come from, and their formatting as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

SEVERITIES = ("error", "warning", "info")  # the most severe first


@dataclass(frozen=True)
class Finding:
    """One mistake found in one layer."""

    layer: str
    """Dotted name of the layer without the prefixes of wrappers; empty for the model itself."""
    rule: str
    severity: str
    """"error" (results are wrong, or the job will fail), "warning" (probably not what was meant), or "info"."""
    remedy: str
    why: str = ""
    difference: float | None = None
    """Of `parity`: how far the layer's results are from those of one process, relative; None where it is no number."""

    def as_dict(self) -> dict[str, str | float]:
        """The finding as a dictionary, for JSON; without `difference` where there is none."""
        texts = {name: getattr(self, name) for name in ("layer", "rule", "severity", "why", "remedy")}
        return texts if self.difference is None else {**texts, "difference": self.difference}


@dataclass(frozen=True)
class Rule:
    """A classic mistake; `why` and `remedy` may have format fields, which `found` fills."""

    severity: str
    why: str
    remedy: str

    @classmethod
    def error(cls, why: str, remedy: str) -> Rule:
        """A rule whose findings are errors."""
        return cls("error", why, remedy)

    @classmethod
    def warning(cls, why: str, remedy: str) -> Rule:
        """A rule whose findings are warnings."""
        return cls("warning", why, remedy)


# By name, in the order of docs/audit.md, which says when each one applies.
RULES = {
    "parameters-frozen-statistics-moving": Rule.error(
        "its parameters are frozen, but its running statistics move with every training forward: the layer changes",
        "freeze the statistics too: syncbn.freeze(model, match) on converted layers, stats: true in a freeze rule",
    ),
    "frozen-at-initial-values": Rule.error(
        "its statistics are frozen at mean 0 and variance 1, which it has never updated: it does not normalize",
        "load its running statistics before freezing, or let them move",
    ),
    "never-updated": Rule.error(
        "its running statistics are still mean 0 and variance 1 after 0 batches: evaluation does not normalize",
        "load the running statistics with the weights, train, or gather them with syncbn.precise_bn(model, batches)",
    ),
    "missing-statistics": Rule.error(
        "the checkpoint lacks {missing} of this layer: after loading it evaluates with the values of a fresh layer",
        "save model.state_dict(), which has buffers, rather than parameters alone",
    ),
    "invalid-statistics": Rule.error(
        "its running statistics hold {what}: evaluation gives NaN or noise",
        "go back to a checkpoint before the bad batch, or gather new ones with syncbn.precise_bn(model, batches)",
    ),
    "no-running-statistics": Rule.warning(
        "it keeps no running statistics: evaluation normalizes with the batch, so a prediction depends on its"
        " neighbours in the batch",
        "build it with track_running_stats=True",
    ),
    "statistics-switched-off": Rule.warning(
        "track_running_stats was set to False on a layer that has statistics: training normalizes with the batch,"
        " evaluation with statistics that never move",
        "to freeze it, set it back to True and use syncbn.freeze(model, match)",
    ),
    "momentum-zero": Rule.warning(
        "momentum 0: training normalizes with the batch, evaluation with running statistics that never move",
        "use a momentum above 0, or freeze the statistics so that training uses them too",
    ),
    "momentum-cumulative": Rule(
        "info",
        "momentum None: every batch since the beginning has the same weight, those of early weights too",
        "use a number such as 0.1, or gather the statistics anew at the end with syncbn.precise_bn(model, batches)",
    ),
    "few-values-per-channel": Rule.warning(
        "its statistics are those of {observed}: they are noisy, and differ from those of evaluation",
        "raise the batch size, synchronize over more ranks (syncbn.convert_sync_batchnorm), or freeze the statistics",
    ),
    "dropout-before-bn": Rule.warning(
        "dropout in front of it raises the variance in training and not in evaluation (by 1/(1-p) for centred inputs)",
        "move the dropout behind the last batch normalization, or gather the statistics without it: syncbn.precise_bn",
    ),
    "updated-twice": Rule.warning(
        "it runs under activation checkpointing: the second forward moves its running statistics again, so that a"
        " momentum m acts like 1-(1-m)^2",
        "convert it with syncbn.convert_sync_batchnorm, whose layers move once",
    ),
    "plain-bn-in-distributed-job": Rule.warning(
        "it normalizes with this rank's samples alone, so results depend on the number of ranks",
        "convert it with syncbn.convert_sync_batchnorm (bn.sync=true)",
    ),
    "torch-syncbn": Rule.warning(
        "it is a torch.nn.SyncBatchNorm, built or put there by torch's converter{detail}",
        "call syncbn.convert_sync_batchnorm instead of torch's converter, or on its result; for a plain layer,"
        " syncbn.revert_sync_batchnorm(model, default=torch.nn.BatchNorm2d)",
    ),
    "ranks-differ-in-statistics": Rule.error(
        "its running statistics differ between ranks that share them: each rank evaluates another model",
        "load the same checkpoint on every rank, or pool them: syncbn.precise_bn, or DDP's init_sync at the start",
    ),
    "ranks-differ-in-mode": Rule.error(
        "its class, mode, frozen switches or momentum differ between ranks: their collectives do not match, and hang",
        "build, convert, freeze and switch modes alike on every rank",
    ),
    "train-eval-gap": Rule.warning(
        "the batch is far from the running statistics: {gap:.2g} nats (divergence of normals, median over channels)",
        "gather them anew with syncbn.precise_bn(model, batches); compare the preprocessing with that of training",
    ),
    "activation-range": Rule.warning("its input has {observed}", "{remedy}"),
    "frozen-parameter-updated": Rule.error(
        "a frozen parameter still has a gradient and is in the optimizer: momentum and weight decay move it",
        "freeze with syncbn.freeze, or set the gradient of what is frozen to None",
    ),
    "affine-not-optimized": Rule.warning(
        "weight or bias are trainable but in no parameter group of the optimizer: they never change",
        "build the optimizer from model.parameters() after the model is complete; freeze what is not to train",
    ),
}


def new_finding(rule: str, layer: str, *, severity: str | None = None, **details: object) -> Finding:
    """A finding of `rule` with its severity, unless another is given; `details` fill the format fields of its texts."""
    entry = RULES[rule]
    return Finding(layer, rule, severity or entry.severity, entry.remedy.format(**details), entry.why.format(**details))


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by severity, the most severe first, and only one for each layer and rule."""
    unique = {(finding.layer, finding.rule): finding for finding in reversed([*findings])}
    first_seen = [*unique.values()][::-1]
    return sorted(first_seen, key=lambda finding: SEVERITIES.index(finding.severity))


def table(findings: Iterable[Finding], width: int = 110) -> str:
    """Findings as text of `width` columns: a block for each kind, with its layers, why it matters, and the remedy."""
    kinds: dict[tuple[str, str, str, str], list[str]] = {}
    for one in ordered(findings):
        size = "" if one.difference is None else f" (differs by {one.difference:.2g})"
        layer = f"{one.layer or '(the model)'}{size}"
        kinds.setdefault((one.severity, one.rule, one.why, one.remedy), []).append(layer)
    if not kinds:
        return "no findings"
    lines = []
    for (severity, rule, why, remedy), layers in kinds.items():
        lines.append(f"{severity:8} {rule}")
        for label, text in (("layer", ", ".join(layers)), ("why", why), ("remedy", remedy)):
            head = f"  {label:7}"
            lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)
