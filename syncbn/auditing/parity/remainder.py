"""What still differs with every remedy in place: modules that mix samples, buffers that went their own way."""

from __future__ import annotations

from collections.abc import Mapping

from syncbn.auditing.parity import remedies
from syncbn.auditing.parity.comparison import Comparison, Difference, in_words
from syncbn.auditing.parity.findings import Findings, ranks_in_words
from syncbn.auditing.parity.recorder import LOSS
from syncbn.auditing.parity.subject import Facts, owner_of


def explain_rest(current: Comparison, facts: Facts, mixing: Mapping[str, float], findings: Findings) -> None:
    """Adds findings for what differs in a comparison; "unexplained" where none of them accounts for the first tensor.

    Args:
        current: a comparison that is not clean.
        mixing: the modules that let one sample move the outputs of others, with the relative size of that.
    """
    first = current.first
    assert first is not None
    some, local = _find_buffers(current, findings)
    for name in mixing:
        size = current.size_at("output", name)
        size = size if 0 < size < float("inf") else mixing[name]
        state = [buffer for buffer in local if _is_state_of(name, owner_of(buffer), facts)]
        detail = f"; state fed by local samples: {', '.join(state)}" if state else ""
        remedy = remedies.FEED if state else remedies.GATHER
        findings.add("mixes-samples", name, size, detail=detail, remedy=remedy)
    is_mixed = bool(mixing) or findings.has("mixes-samples", LOSS)
    if not is_mixed and first.place.kind == "buffer":
        for name in local:
            findings.add("buffer-of-local-samples", owner_of(name), current.size_at("buffer", name), buffer=name)
    is_explained = (
        findings.has("no-gradient")
        or _is_of_buffers(first, some, local)
        or (is_mixed and _is_of_mixing(first, mixing, findings))
    )
    if not is_explained:
        findings.add("unexplained", first.place.name, first.size, what=in_words(first))


def _find_buffers(current: Comparison, findings: Findings) -> tuple[list[str], list[str]]:
    """Buffers that differ: those that some of the ranks move, which are findings, and all others."""
    names = dict.fromkeys(one.place.name for one in current.differences if one.place.kind == "buffer")
    some, local = [], []
    for name in names:
        ranks = [rank for rank, outcome in enumerate(current.outcomes) if name in outcome.buffers_moved]
        if 0 < len(ranks) < len(current.outcomes):
            some.append(name)
            size = current.size_at("buffer", name)
            findings.add("buffer-of-some-ranks", owner_of(name), size, buffer=name, ranks=ranks_in_words(ranks))
        else:
            local.append(name)
    return some, local


def _is_state_of(name: str, owner: str, facts: Facts) -> bool:
    """Whether a buffer's module belongs to the one of this name, and is no batch normalization."""
    return owner not in facts.layers and (name in ("", owner) or owner.startswith(f"{name}."))


def _is_of_buffers(first: Difference, some: list[str], local: list[str]) -> bool:
    """Whether buffers account for the first tensor that differs."""
    if first.place.kind == "buffer" and (some or local):
        return True
    return bool(some) and (first.step > 0 or first.place.name in map(owner_of, some))


def _is_of_mixing(first: Difference, mixing: Mapping[str, float], findings: Findings) -> bool:
    """Whether the first tensor that differs comes after, or lies in, a module that mixes samples."""
    if first.step > 0 or first.place.kind != "output":
        return True
    place = first.place.name
    return any(
        findings.position(place) >= findings.position(name) or name == "" or place.startswith(f"{name}.")
        for name in mixing
    )
