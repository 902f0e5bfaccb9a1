"""FreezePlan: a schedule of what is frozen at which training step, stated as a set of rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from syncbn.nn.patterns import Patterns
from syncbn.surgery.freeze import apply_switches, freezable, frozen_switches
from syncbn.surgery.freeze_checks import check_sharers

SWITCHES = ("stats", "affine", "weights")


@dataclass(frozen=True)
class FreezeRule:
    """Freezes `stats`, `affine` and `weights` of the selected modules in steps start <= t < until.

    `start=None` means from step 0 on, `until=None` to the end. The other fields are the arguments of `freeze`.
    """

    match: Patterns
    exclude: Patterns | None = ()
    stats: bool = True
    affine: bool = True
    weights: bool = False
    start: int | None = None
    until: int | None = None

    def is_active(self, step: int) -> bool:
        """Whether the rule freezes anything at this step."""
        return (self.start or 0) <= step and (self.until is None or step < self.until)

    def targets(self, model: nn.Module) -> dict[str, tuple[nn.Module, list[str]]]:
        """The modules that the rule freezes, by name, each with the switches that it freezes."""
        return freezable(model, self.match, self.exclude, stats=self.stats, affine=self.affine, weights=self.weights)


@dataclass(frozen=True)
class Switch:
    """One change of state: `switch` ("stats", "affine" or "weights") of a module is now frozen, or free again."""

    module: str
    switch: str
    frozen: bool


class FreezePlan:
    """A set of named freeze rules. A switch is frozen at step t if any rule that is active at t selects it.

    Rules only freeze, so their order does not matter. Modules that no rule selects are never changed.

    Args:
        rules: by name, each a `FreezeRule` (of this module) or a mapping of its fields: `match`, which has to be
            there, `exclude`, `stats`, `affine`, `weights`, as the arguments of `freeze`, and `start` and `until`, the
            steps start <= t < until in which the rule freezes (None: from the beginning, to the end).

    Raises:
        ValueError: a rule with an unknown field, or without `match`.
        TypeError: a rule that is neither.

    Example:
        >>> from syncbn import FreezePlan, SyncBatchNorm
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), SyncBatchNorm(4))
        >>> plan = FreezePlan({"warm": {"match": "1", "until": 100}})
        >>> plan.check(model)
        []
        >>> [switch.module for switch in plan.apply(model, step=0)]
        ['1', '1']
        >>> model[1].stats_frozen, plan.apply(model, step=50)
        (True, [])
    """

    def __init__(self, rules: Mapping[str, FreezeRule | Mapping[str, Any]]) -> None:
        self.rules = {name: _as_rule(name, rule) for name, rule in rules.items()}

    @property
    def boundaries(self) -> set[int]:
        """The steps at which a rule begins or ends; between them `apply` has nothing to do."""
        return {time for rule in self.rules.values() for time in (rule.start, rule.until) if time is not None}

    def check(self, model: nn.Module, num_steps: int | None = None) -> list[str]:
        """Validates the plan against the model before training; returns warnings about rules without effect.

        Args:
            num_steps: the length of the training, to find rules that start after it; None if it is not known.

        Raises:
            ValueError, TypeError: a rule that ends before it starts, or that `freeze` would reject; the message names
                the rule, or the step and its rules where they freeze one of two layers that share running statistics.
        """
        warnings = []
        for name, rule in self.rules.items():
            if rule.until is not None and rule.until <= (rule.start or 0):
                raise ValueError(
                    f"{name}.until: expected a time after its start ({rule.start or 0}), got {rule.until} (in steps)"
                )
            try:
                rule.targets(model)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
            if num_steps is not None and (rule.start or 0) >= num_steps:
                warnings.append(
                    f"{name}: starts at step {rule.start}, after the last step {num_steps - 1}; it has no effect"
                )
            elif self._is_covered(name, model):
                warnings.append(f"{name}: other rules freeze all of it from beginning to end; it has no effect")
        for step in sorted({0, *self.boundaries}):
            try:
                check_sharers(model, [(module, one.switch, one.frozen) for module, one in self._changes(model, step)])
            except ValueError as error:
                active = [name for name, rule in self.rules.items() if rule.is_active(step)] or [*self.rules]
                raise ValueError(f"{', '.join(active)}: at step {step}, {error}") from error
        return warnings

    def frozen_at(self, model: nn.Module, step: int) -> dict[str, set[str]]:
        """Which switches are frozen at this step, by name, of every module that some rule selects."""
        frozen: dict[str, set[str]] = {}
        for rule in self.rules.values():
            for name, (_, switches) in rule.targets(model).items():
                frozen.setdefault(name, set()).update(switches if rule.is_active(step) else ())
        return frozen

    def apply(self, model: nn.Module, step: int) -> list[Switch]:
        """Freezes and unfreezes modules as the rules demand at this step; returns what changed.

        After any change a model has to be wrapped in DDP anew. Only switches that some rule selects are changed:
        modules that were frozen by other means stay frozen.
        """
        changes = self._changes(model, step)
        apply_switches(model, [(module, change.switch, change.frozen) for module, change in changes])
        return [change for _, change in changes]

    def _changes(self, model: nn.Module, step: int) -> list[tuple[nn.Module, Switch]]:
        """What `apply` would change at this step, each with its module."""
        frozen = self.frozen_at(model, step)
        governed: dict[str, tuple[nn.Module, set[str]]] = {}
        for rule in self.rules.values():
            for name, (module, switches) in rule.targets(model).items():
                governed.setdefault(name, (module, set()))[1].update(switches)
        return [
            (module, Switch(name, switch, switch in frozen[name]))
            for name, (module, switches) in governed.items()
            for switch in sorted(switches)
            if (switch in frozen[name]) != (switch in frozen_switches(module))
        ]

    def table(self, model: nn.Module) -> list[tuple[str, str, str, str]]:
        """The plan as text: a row (rule, module, switches, steps) for every module of every rule."""
        rows = []
        for name, rule in self.rules.items():
            span = f"{rule.start or 0} to {'the end' if rule.until is None else rule.until}"
            rows += [(name, module, ", ".join(switches), span) for module, (_, switches) in rule.targets(model).items()]
        return rows

    def _is_covered(self, name: str, model: nn.Module) -> bool:
        """Whether rules without a time span already freeze everything that this rule freezes."""
        permanent = [
            rule for key, rule in self.rules.items() if key != name and rule.start is None and rule.until is None
        ]
        frozen = FreezePlan({str(i): rule for i, rule in enumerate(permanent)}).frozen_at(model, 0)
        return all(
            set(switches) <= frozen.get(target, set())
            for target, (_, switches) in self.rules[name].targets(model).items()
        )


def _as_rule(name: str, rule: object) -> FreezeRule:
    """A rule from its fields; the errors are those of `FreezePlan`."""
    if isinstance(rule, FreezeRule):
        return rule
    if not isinstance(rule, Mapping):
        raise TypeError(f"{name}: expected a FreezeRule or a mapping of its fields, got {type(rule).__name__}")
    known = [field.name for field in fields(FreezeRule)]
    for key in rule:
        if key not in known:
            raise ValueError(f"{name}.{key}: expected one of {', '.join(known)}")
    if "match" not in rule:
        raise ValueError(f'{name}.match: expected a pattern of module names ("*" for all), got none')
    return FreezeRule(**rule)
