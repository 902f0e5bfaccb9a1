"""Freezing and unfreezing parts of a model by name.

Freezing is a state stored on the layer, not its training mode and not its class: it survives `train()`, `eval()` and
`deepcopy` and is shown in the repr. The values of parameters and buffers, and the state dict keys, do not change.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.nn.frozen import freeze_parameters, has_frozen_parameters, own_parameters, unfreeze_parameters
from syncbn.nn.patterns import Patterns, select
from syncbn.surgery.freeze_checks import check_can_freeze_stats, check_sharers, check_stays_frozen


def freeze(
    module: nn.Module,
    match: Patterns = "*",
    *,
    exclude: Patterns | None = (),
    stats: bool = True,
    affine: bool = True,
    weights: bool = False,
) -> list[str]:
    """Freezes the modules that the patterns select, until `unfreeze` is called.

    Args:
        module: a model; wrap it in `DistributedDataParallel` after freezing, not before.
        match: patterns of module names; a plain name selects the module and all below it.
        exclude: patterns of modules to leave unchanged.
        stats: freeze the running statistics of `SyncBatchNorm` layers: training normalizes with them too, and they
            stay bitwise the same.
        affine: freeze weight and bias of batch normalization layers: they get no gradient and no update.
        weights: freeze the parameters of every other selected module (convolutions, linear layers, ...).

    Returns:
        The names of the modules on which it set a switch.

    Raises:
        ValueError: a pattern that selects nothing; selected modules without anything to freeze, or lazy and not
            initialized; `stats` on a layer without running statistics, or one whose running statistics a layer outside
            of the selection shares and moves; with `weights`, a module that a training forward changes all the same
            (`spectral_norm`, an instance normalization with running statistics, an embedding with `max_norm`).
        TypeError: `stats` on a batch normalization that is not a `SyncBatchNorm`. Nothing has been frozen in any of
            these cases.
    """
    targets = freezable(module, match, exclude, stats=stats, affine=affine, weights=weights)
    apply_switches(module, [(target, switch, True) for target, switches in targets.values() for switch in switches])
    return list(targets)


def unfreeze(
    module: nn.Module,
    match: Patterns = "*",
    *,
    exclude: Patterns | None = (),
    stats: bool = True,
    affine: bool = True,
    weights: bool = False,
) -> list[str]:
    """Undoes `freeze` on the modules that the patterns select, and restores `requires_grad` as it was before.

    That includes parameters that have been pruned, parametrized, or freed of a parametrization while they were frozen.
    One that torch has replaced by a new parameter then (as `weight_norm` does) is none of the optimizer's yet.

    Arguments, return value and errors are those of `freeze`.

    Warns:
        UserWarning: parameters that need no gradient, and were not there at `freeze`.
    """
    targets = freezable(module, match, exclude, stats=stats, affine=affine, weights=weights, to_freeze=False)
    apply_switches(module, [(target, switch, False) for target, switches in targets.values() for switch in switches])
    return list(targets)


def frozen_switches(module: nn.Module) -> set[str]:
    """Which of "stats", "affine" and "weights" are frozen on this one module."""
    switches = set()
    if isinstance(module, SyncBatchNorm) and module.stats_frozen:
        switches.add("stats")
    if has_frozen_parameters(module):
        switches.add("affine" if isinstance(module, _BatchNorm) else "weights")
    return switches


def apply_switches(root: nn.Module, changes: Iterable[tuple[nn.Module, str, bool]]) -> None:
    """Freezes or unfreezes switches of several modules of `root` in one call.

    One call, because parameters may be tied: one that two modules share stays frozen until both are unfrozen.

    Args:
        root: the model, which is searched for tied parameters.
        changes: triples of a module, its switch ("stats", "affine" or "weights"), and whether to freeze it.

    Raises:
        ValueError: a layer that is not frozen would move the statistics of one that is; nothing has changed then.
    """
    changes = list(changes)
    check_sharers(root, changes)
    parameters: dict[bool, list[nn.Module]] = {True: [], False: []}
    for module, switch, frozen in changes:
        if switch == "stats":
            assert isinstance(module, SyncBatchNorm)
            change = SyncBatchNorm.freeze if frozen else SyncBatchNorm.unfreeze  # a subclass may override it
            change(module, stats=True, affine=False)
        else:
            parameters[frozen].append(module)
    unfreeze_parameters(parameters[False], root)
    freeze_parameters(parameters[True], root)


def freezable(
    module: nn.Module,
    match: Patterns,
    exclude: Patterns | None,
    *,
    stats: bool,
    affine: bool,
    weights: bool,
    to_freeze: bool = True,
) -> dict[str, tuple[nn.Module, list[str]]]:
    """The selected modules by name, each with those of the requested switches that it has; modules without any are
    left out.

    Args:
        to_freeze: False to unfreeze, where a module that could not stay frozen is no error.

    Raises: the errors of `freeze`, except those of layers that share statistics.
    """
    selected = select(module, match, exclude)
    found: dict[str, tuple[nn.Module, list[str]]] = {}
    for name, candidate in selected.items():
        switches = []
        has_parameters = bool(own_parameters(candidate)) or has_frozen_parameters(candidate)
        if isinstance(candidate, LazyModuleMixin) and candidate.has_uninitialized_params():
            raise ValueError(f"{name or 'the module'} is lazy and has not seen its width; run a batch through it first")
        if isinstance(candidate, _BatchNorm):
            if stats:
                check_can_freeze_stats(name, candidate)
                switches.append("stats")
            if affine and has_parameters:
                switches.append("affine")
        elif weights and has_parameters:
            switches.append("weights")
        if to_freeze:
            own = affine if isinstance(candidate, _BatchNorm) else weights
            check_stays_frozen(name, candidate, stats=stats, weights=own)
        if switches:
            found[name] = (candidate, switches)
    if not found:
        asked = [name for name, on in (("stats", stats), ("affine", affine), ("weights", weights)) if on]
        raise ValueError(
            f"match={match!r} selects nothing that has {' or '.join(asked) or 'anything'} to freeze, in"
            f" {len(selected)} modules; choose others, or weights=True for layers that are no batch normalization"
        )
    return found
