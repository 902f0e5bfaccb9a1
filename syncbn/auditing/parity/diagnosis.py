"""Finds out why a model does not train the same on several ranks, by taking one cause away after the other.

for each world size:
    train on uneven shards, and compare with one process on the whole batch
    the same?                          once more under DDP, and done
    synchronize every batch normalization, compare;  those whose output it changed are findings
    silence randomness, compare;                     modules whose draws change the loss are findings
    weigh the ranks' losses as the whole has them;   other weights than DDP's are a finding
    what still differs: which module lets one sample move the outputs of others, which buffer went its own way,
    which parameter had no gradient; else it is unexplained

Remedies stay in place, so that a second cause behind a first one is seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from syncbn.auditing.parity import remedies
from syncbn.auditing.parity.batches import other_cuts, uneven
from syncbn.auditing.parity.comparison import LIMITS, Comparison, SizeResult, result_of
from syncbn.auditing.parity.errors import ParityError
from syncbn.auditing.parity.findings import Findings, ranks_in_words
from syncbn.auditing.parity.loss_cut import LossCut
from syncbn.auditing.parity.processes import JobError, RankProcesses
from syncbn.auditing.parity.recorder import LOSS
from syncbn.auditing.parity.remainder import explain_rest
from syncbn.auditing.parity.steps import Trial
from syncbn.auditing.parity.subject import Facts, owner_of
from syncbn.auditing.parity.worker import Failure
from syncbn.auditing.rules import Finding

_ONE_VALUE = "Expected more than 1 value per channel"


class Diagnosis:
    """The comparison of one model at several world sizes.

    Args:
        num: samples of the batch.
        report: told what is going on, a line at a time.
    """

    def __init__(
        self, ranks: RankProcesses, num: int, world_sizes: Sequence[int], steps: int, report: Callable[[str], None]
    ) -> None:
        self.ranks, self.num, self.steps, self.report = ranks, num, steps, report
        self.world_sizes = sorted({*world_sizes} - {1})
        self.sizes: list[SizeResult] = []
        self._references: set[bool] = set()
        self._losses: dict[tuple[int, ...], LossCut] = {}

    def run(self) -> list[Finding]:
        """Compares at every size; returns the findings in the order of the network."""
        facts = self.facts
        self.report(f"one process, {self.num} samples, {self.steps} steps, {str(facts.dtype).removeprefix('torch.')}")
        if facts.refusal is not None:
            self._findings.add("float64-refused", "", error=facts.refusal, limit=LIMITS[facts.dtype])
        for cut in self._cuts:
            self._judge(cut)
        if facts.empty_shard is not None:
            self._findings.add("empty-shard", facts.empty_shard[0], error=facts.empty_shard[1])
        return self._findings.in_order()

    @cached_property
    def facts(self) -> Facts:
        """What one process has told."""
        facts: Facts = self._alone("describe")
        return facts

    @cached_property
    def _findings(self) -> Findings:
        return Findings(self.facts.order)

    def _alone(self, name: str, *arguments: Any) -> Any:
        """A job of one process; a ParityError if it fails."""
        try:
            return self.ranks.run(name, 1, *arguments)[0]
        except JobError as error:
            failure = error.failure
            if failure.is_judged:
                raise ParityError(failure.text) from None
            where = failure.where or "the model"
            raise ParityError(f"it fails in one process already, in {where}: {failure.text}") from None

    def _train(self, trial: Trial) -> Comparison | Failure:
        """One comparison with the reference that belongs to it."""
        path = self.ranks.directory / f"reference{int(trial.silent)}.pt"
        if trial.silent not in self._references:
            self._alone("train", self.facts, Trial((self.num,), self.steps, silent=trial.silent), path)
            self._references.add(trial.silent)
        try:
            outcomes = self.ranks.run("train", len(trial.sizes), self.facts, trial, path)
        except JobError as error:
            return error.failure
        return Comparison(outcomes, self.facts.dtype)

    def _judge(self, cut: tuple[int, ...]) -> None:
        trial = Trial(cut, self.steps)
        base = self._train(trial)
        self.sizes.append(result_of(cut, base))
        self.report(str(self.sizes[-1]))
        if isinstance(base, Failure) and not (_ONE_VALUE in base.text and self._train_synchronized(trial)):
            self._add_failure(base, cut)
            return
        if isinstance(base, Comparison):
            self._find_unused(base, cut)
            if base.is_clean:
                self._confirm(trial)
                return
        stages = (self._without_local_statistics, self._without_randomness, self._without_averaged_loss)
        current = base if isinstance(base, Comparison) else None
        for stage in stages:
            if current is None or not current.is_clean:
                trial, current = stage(trial, current)
        if current is not None and not current.is_clean:
            explain_rest(current, self.facts, self._mixing, self._findings)

    def _confirm(self, trial: Trial) -> None:
        """Trains the same under DDP too."""
        self.report(f"world size {len(trial.sizes)}: once more, under DistributedDataParallel")
        if self._has_unused():
            return
        wrapped = self._train(replace(trial, under_ddp=True))
        if isinstance(wrapped, Failure):
            self._findings.add("ddp-refused", wrapped.where, error=wrapped.text)
        elif wrapped.first is not None:
            self._findings.add("ddp-refused", wrapped.first.place.name, wrapped.first.size, error="they differ")

    def _train_synchronized(self, trial: Trial) -> bool:
        return isinstance(self._train(replace(trial, synchronized=True)), Comparison)

    def _without_local_statistics(self, trial: Trial, before: Comparison | None) -> tuple[Trial, Comparison | None]:
        outcomes = before.outcomes if before is not None else []
        calls = [outcome.normalizations for outcome in outcomes]
        names = {name for one in calls for name in one}
        left = {name for name in names if len({one[name] for one in calls}) > 1}
        remedied = replace(trial, synchronized=True, left=frozenset(left))
        self.report(f"world size {len(trial.sizes)}: with every batch normalization synchronized")
        after = self._train(remedied)
        if isinstance(after, Failure):
            return trial, before
        limit = LIMITS[self.facts.dtype]
        layers = {name for outcome in after.outcomes for name in outcome.moved}
        for name in layers:
            squares = [outcome.moved.get(name, (0.0, 0.0)) for outcome in after.outcomes]
            difference, whole = (sum(parts) for parts in zip(*squares, strict=True))
            size = (difference / whole) ** 0.5 if whole else 0.0
            if size > limit:
                self._findings.add(
                    "local-batch-norm",
                    name,
                    size,
                    detail="",
                    remedy=remedies.CONVERT if self._is_layer(name) else remedies.CALL,
                )
        for name in after.outcomes[0].sub_groups:
            size = before.size_at("output", name) if before is not None else 0.0
            if size > limit:
                self._findings.add(
                    "local-batch-norm", name, size, detail=" and those of its sub-group", remedy=remedies.GROUP
                )
        return remedied, after

    def _is_layer(self, name: str) -> bool:
        """Whether the module that calls `F.batch_norm` is a batch normalization layer: it has nothing below it."""
        return name in self.facts.layers

    def _without_randomness(self, trial: Trial, before: Comparison | None) -> tuple[Trial, Comparison | None]:
        if not self.facts.draws:
            return trial, before
        self.report(f"world size {len(trial.sizes)}: without randomness")
        remedied = replace(trial, silent=True)
        after = self._train(remedied)
        if isinstance(after, Failure):
            return trial, before
        for name, size in self._random.items():
            self._findings.add("random-per-rank", name, size)
        return remedied, after

    @cached_property
    def _random(self) -> dict[str, float]:
        found: dict[str, float] = self._alone("random", self.facts)
        return found

    @cached_property
    def _cuts(self) -> list[tuple[int, ...]]:
        """An uneven cut of the batch for each world size.

        By chance a mean can have equal weights in an uneven cut (of pixels that count, say); then another one is taken.
        """
        candidates = [other_cuts(uneven(self.num, size)) for size in self.world_sizes]
        if self.facts.has_count:
            return [cuts[0] for cuts in candidates]
        self._look_at_loss([cut for cuts in candidates for cut in cuts])
        return [next((cut for cut in cuts if not self._is_even(self._losses[cut])), cuts[0]) for cuts in candidates]

    def _look_at_loss(self, cuts: list[tuple[int, ...]]) -> None:
        self._losses |= zip(cuts, self._alone("loss", self.facts, cuts), strict=True)

    def _is_even(self, cut: LossCut) -> bool:
        """Whether DDP's average weighs the ranks' losses as the whole batch does; False for a sum and a count."""
        if self.facts.has_count or cut.weights is None:
            return False
        return all(abs(weight - 1 / len(cut.weights)) < LIMITS[self.facts.dtype] for weight in cut.weights)

    @cached_property
    def _mixing(self) -> dict[str, float]:
        found: dict[str, float] = self._alone("mixing", self.facts, self.steps)
        return found

    def _without_averaged_loss(self, trial: Trial, before: Comparison | None) -> tuple[Trial, Comparison | None]:
        if trial.sizes not in self._losses:
            self._look_at_loss(self._cuts)
        cut, world_size = self._losses[trial.sizes], len(trial.sizes)
        if cut.weights is None:
            self._findings.add("mixes-samples", LOSS, cut.difference, detail="", remedy=remedies.GATHER)
            return trial, before
        if self.facts.has_count or self._is_even(cut):
            return trial, before
        self.report(f"world size {world_size}: with the loss divided by the global count")
        remedied = replace(trial, weights=cut.weights)
        after = self._train(remedied)
        if isinstance(after, Failure) or (not cut.is_known and not after.is_clean):
            return trial, before
        size = cut.difference if cut.is_known or before is None else before.size_at("loss", LOSS)
        weights = ", ".join(f"{weight:.3g}" for weight in cut.weights)
        if all(abs(weight - 1) < LIMITS[self.facts.dtype] for weight in cut.weights):
            what, remedy = f"it is a sum, and DDP takes the average of {world_size} ranks", remedies.SCALE
        else:
            what = f"it is a mean over what each rank has ({weights} of the whole), and DDP weighs all ranks equally"
            remedy = remedies.COUNT
        self._findings.add("loss-per-rank", LOSS, size, observed=what, remedy=remedy)
        return remedied, after

    def _find_unused(self, base: Comparison, cut: tuple[int, ...]) -> None:
        """Adds a finding for each module with parameters that had no gradient, on the ranks where that is so."""
        modules: dict[str, set[int]] = {}
        for rank, outcome in enumerate(base.outcomes):
            for name in outcome.without_gradient:
                modules.setdefault(owner_of(name), set()).add(rank)
        for name, ranks in modules.items():
            self._findings.add(
                "no-gradient", name, ranks="all ranks" if len(ranks) == len(cut) else ranks_in_words(sorted(ranks))
            )

    def _has_unused(self) -> bool:
        """Whether some parameter had no gradient, which explains what differs, and which DDP would not take."""
        return self._findings.has("no-gradient")

    def _add_failure(self, failure: Failure, cut: tuple[int, ...]) -> None:
        if failure.is_waiting:
            self._findings.add("ranks-part-ways", failure.where, rank=failure.rank, error=failure.text)
        else:
            samples = cut[failure.rank]
            self._findings.add(
                "shard-refused", failure.where, rank=failure.rank, samples=samples, whole=self.num, error=failure.text
            )
