"""Parameter groups: which parameters the optimizer's groups select, with which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from syncbn.nn.frozen import own_parameters
from syncbn.nn.patterns import select
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.optim import GroupConfig, OptimizerConfig

REST = "rest"  # the name of the group of all parameters that no other group selects


@dataclass(frozen=True)
class ParameterGroup:
    """A group of parameters, frozen ones included, so that groups stay the same whatever is frozen when."""

    name: str
    parameters: dict[str, nn.Parameter]
    """The parameters by name, in the order of the model."""
    lr_scale: float = 1.0
    weight_decay: float | None = None
    """None: that of the optimizer."""


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[ParameterGroup]:
    """The rest, if there is one, then the groups in the order of the configuration; each is split in two where
    `decay_norm_and_bias` is false and some of its parameters are exempt from weight decay.

    A parameter that several modules share is in a group if any of these modules is.

    Raises:
        ConfigError: a pattern matches nothing, or no parameter; a parameter is in two groups; weight decay of a group
            whose parameters are all exempt; a group is called like the rest.
    """
    parameters = dict(model.named_parameters())
    group_of: dict[str, str] = {}
    for name, group in config.groups.items():
        if name == REST:
            raise ConfigError(f"optimizer.groups.{REST}: is what no group selects; choose another name")
        for parameter in _selected(name, group, model, parameters):
            if parameter in group_of:
                raise ConfigError(
                    f"optimizer.groups: {parameter} is in two groups, {group_of[parameter]} and {name}; change match of"
                    " one, or give it an exclude"
                )
            group_of[parameter] = name
    groups = []
    for name, group in ((REST, GroupConfig("*")), *config.groups.items()):
        own = {key: parameter for key, parameter in parameters.items() if group_of.get(key, REST) == name}
        if own:
            groups += _split(ParameterGroup(name, own, group.lr_scale, group.weight_decay), config.decay_norm_and_bias)
    return groups


def names_of(groups: Sequence[ParameterGroup]) -> dict[str, list[str]]:
    """The names of the parameters of every group, for the checkpoint."""
    return {group.name: [*group.parameters] for group in groups}


def require_same_groups(groups: Sequence[ParameterGroup], stored: Mapping[str, Sequence[str]]) -> None:
    """Raises a ValueError that names the difference, if there is one to the groups that a checkpoint has stored."""
    here, there = (
        {parameter: name for name, parameters in of.items() for parameter in parameters}
        for of in (names_of(groups), stored)
    )
    for parameter in {**there, **here}:
        then, now = (f"in the group {of[parameter]!r}" if parameter in of else "nowhere" for of in (there, here))
        if then != now:
            raise ValueError(f"its optimizer has {parameter} {then}, here it is {now}")
    if [*here] != [*there]:
        raise ValueError("its optimizer has the parameters in another order")


def _selected(name: str, group: GroupConfig, model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters of the modules that a group selects."""
    key = f"optimizer.groups.{name}"
    try:
        modules = select(model, group.match, group.exclude)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    own = {id(parameter) for module in modules.values() for parameter in own_parameters(module).values()}
    found = [parameter for parameter in parameters if id(parameters[parameter]) in own]
    if not found:
        given = f"match={group.match!r}" + (f" exclude={group.exclude!r}" if group.exclude else "")
        raise ConfigError(
            f"{key}: {given} selects no parameter, in {listed([*modules], 3) or 'no module'}; choose others"
        )
    return found


def _split(group: ParameterGroup, decay_norm_and_bias: bool) -> list[ParameterGroup]:
    exempt = {} if decay_norm_and_bias else {k: p for k, p in group.parameters.items() if _is_norm_or_bias(k, p)}
    decayed = {name: parameter for name, parameter in group.parameters.items() if name not in exempt}
    if group.weight_decay and not decayed:
        raise ConfigError(
            f"optimizer.groups.{group.name}.weight_decay: expected null or 0 where optimizer.decay_norm_and_bias=false,"
            f" which exempts all of its parameters, got {group.weight_decay}"
        )
    parts = [
        ParameterGroup(group.name, decayed, group.lr_scale, group.weight_decay),
        ParameterGroup(f"{group.name}, norm and bias", exempt, group.lr_scale, 0.0),
    ]
    return [part for part in parts if part.parameters]


def _is_norm_or_bias(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() <= 1 or name.rpartition(".")[2] == "bias"
