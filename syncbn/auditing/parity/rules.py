"""The causes that parity tells apart, and their remedies."""

from __future__ import annotations

from syncbn.auditing.rules import Finding, Rule

# By name, in the order of docs/parity.md.
RULES = {
    "local-batch-norm": Rule.error(
        "it normalizes with the samples of its rank alone{detail}",
        "{remedy}",
    ),
    "random-per-rank": Rule.error(
        "it draws random numbers, which are others on every rank and for every cut of the batch",
        "if the cut must not matter, draw by sample (a generator seeded by step and sample) or alike on all ranks;"
        " else it is noise that training may want, and no two world sizes give the same numbers",
    ),
    "loss-per-rank": Rule.error(
        "{observed}",
        "{remedy}",
    ),
    "mixes-samples": Rule.error(
        "one sample changes the outputs of others, and a rank has its own samples alone{detail}",
        "{remedy}",
    ),
    "no-gradient": Rule.error(
        "its parameters have no gradient on {ranks}: DDP waits for it, or raises",
        "use every parameter in every forward (add 0 * parameter.sum()), or DDP(find_unused_parameters=True)",
    ),
    "buffer-of-some-ranks": Rule.error(
        "the buffer {buffer} moves on {ranks} alone",
        "move it alike on all ranks; what only one rank may do is not a buffer of the model",
    ),
    "buffer-of-local-samples": Rule.error(
        "the buffer {buffer} moves with the samples of its rank alone",
        "reduce or gather over the ranks what it is made of, before it moves",
    ),
    "shard-refused": Rule.error(
        "it fails on rank {rank}, which has {samples} of {whole} samples: {error}",
        "let it take any number of samples: sizes from the input's shape, none written down",
    ),
    "empty-shard": Rule.warning(
        "it cannot take zero samples, which the last batch of an epoch can leave to a rank: {error}",
        "flatten(1) instead of view(x.size(0), -1); or no rank without samples",
    ),
    "ranks-part-ways": Rule.error(
        "rank {rank} waits there for a rank that does not come: {error}",
        "let all ranks make the same collectives in the same order, whatever their samples are",
    ),
    "ddp-refused": Rule.error(
        "summed by hand, the gradients are those of one process; under DistributedDataParallel: {error}",
        "see DDP's message; parity has found no other difference",
    ),
    "float64-refused": Rule(
        "info",
        "it does not compute in float64 ({error}); compared in float32, where differences below {limit:g} are taken"
        " for rounding",
        "take the types of tensors from the input or the parameters, so that parity can be exact",
    ),
    "unexplained": Rule.error(
        "{what} is the first that differs from one process, with batch normalization synchronized, randomness silenced"
        " and the loss divided by the global count, and no sample changes the outputs of another: does it ask for its"
        " rank, or for the size of its batch?",
        "look there for what depends on the rank or on the number of samples",
    ),
}


def new_finding(rule: str, layer: str, difference: float | None = None, **details: object) -> Finding:
    """A finding of `rule`; `details` fill the format fields of its texts."""
    entry = RULES[rule]
    return Finding(layer, rule, entry.severity, entry.remedy.format(**details), entry.why.format(**details), difference)


def is_fault(finding: Finding) -> bool:
    """Whether a finding says that the model does not train the same; those of severity info do not."""
    return finding.severity != "info"
