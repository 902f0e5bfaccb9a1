"""Parses the configuration that Hydra composed into checked dataclasses; errors name the key.

Hydra composes plain dictionaries. `parse` merges them once more into the schema, so that an unknown key is an error
even if it was added with Hydra's `+`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from functools import cache, reduce
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from syncbn.training.config.data import OpenData
from syncbn.training.config.errors import ConfigError, parse_duration, require, require_choice
from syncbn.training.config.model import FreezeRuleConfig, InitConfig, from_data
from syncbn.training.config.optim import CustomOptimizer, GroupConfig, OptimizerConfig
from syncbn.training.config.output import OF_COMMAND
from syncbn.training.config.schema import SCHEMAS, Config
from syncbn.training.config.wrong_type import wrong_type

OPEN_GROUPS = ("model", "data", "loss", "optimizer")
# Nested nodes of the configuration by the names of their classes, as the fields' types are spelled.
NESTED = {
    kind.__name__: kind for kind in get_type_hints(Config).values() if isinstance(kind, type) and is_dataclass(kind)
}


def parse(composed: DictConfig | Mapping[str, Any]) -> Config:
    """Parses the composed configuration into checked dataclasses.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, a missing value.
    """
    try:
        node = composed if isinstance(composed, DictConfig) else OmegaConf.create(dict(composed))
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    for key, value in flatten({str(key): value for key, value in plain.items()}):
        for number in value if isinstance(value, list) else [value]:
            fits = not isinstance(number, int) or -(2**63) <= number < 2**64  # as seeds and checkpoints need it
            require(fits, key, "a whole number of 64 bits", number)
    config = _typed(Config, plain, "")
    for group, schemas in SCHEMAS.items():
        setattr(config, group, _parse_group(group, schemas, getattr(config, group)))
    for group, schema in (("freeze", FreezeRuleConfig), ("init", InitConfig)):
        entries = getattr(config, group) or {}
        setattr(config, group, {name: _typed(schema, entry, f"{group}.{name}") for name, entry in entries.items()
                                if entry is not None})  # fmt: skip
    config.metrics = {name: _parse_metric(f"metrics.{name}", node) for name, node in (config.metrics or {}).items()
                      if node is not None}  # fmt: skip
    for name, rule in config.freeze.items():
        _check_rule(f"freeze.{name}", rule)
    config.optimizer.groups = _parse_parameter_groups(config.optimizer)
    for name, init in config.init.items():
        _check_init(f"init.{name}", init)
    return config


def apply_overrides(stored: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies command-line overrides to a stored configuration.

    Raises:
        ConfigError: an override that chooses a config group, which a stored configuration does not have, or a sweep.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    node = OmegaConf.create(stored)
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group in (*SCHEMAS, "freeze", "metrics", "tracker", "experiment", "debug"):
            raise ConfigError(
                f"{override.key_or_group}: comes from load here; override single keys, not the whole group"
            )
        if override.is_sweep_override():
            raise ConfigError(
                f"{override.key_or_group}: belongs to the configuration that load holds, over which no sweep goes;"
                " start a job for each value"
            )
        OmegaConf.update(node, override.key_or_group, override.value(), force_add=True)
    container = OmegaConf.to_container(node)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def to_dict(config: Config) -> dict[str, Any]:
    """Converts the configuration to plain containers, for YAML, trackers and checkpoints, without OF_COMMAND."""
    container = OmegaConf.to_container(OmegaConf.create(_plain(config)))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items() if key not in OF_COMMAND}


def of_command(config: Config) -> dict[str, Any]:
    """The keys that `to_dict` leaves out, with their values."""
    return {key: _plain(getattr(config, key)) for key in OF_COMMAND}


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterates over the leaves of nested dictionaries as (dotted key, value); an empty dictionary is a leaf."""
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _parse_group(group: str, schemas: dict[str, type], node: Any) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{group}: expected one of {', '.join(schemas)}, got {node!r}")
    if "_target_" in node:
        if group not in OPEN_GROUPS:
            raise ConfigError(f"{group}._target_: not supported here; choose one of {', '.join(schemas)}")
        if node["_target_"] in (None, "???"):
            raise ConfigError(f"{group}._target_: required; give a class or function, {group}._target_=my_package.Name")
        return {"data": OpenData, "optimizer": CustomOptimizer}.get(group, dict)(dict(node))
    require_choice(f"{group}.name", node.get("name"), tuple(schemas))
    return _typed(schemas[node["name"]], node, group)


def _parse_metric(key: str, node: Any) -> dict[str, Any]:
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(
            f"{key}._target_: required; give a metric, {key}._target_=torchmetrics.classification.MulticlassF1Score"
        )
    return dict(node)


Schema = TypeVar("Schema")


def _typed(schema: type[Schema], node: Any, prefix: str) -> Schema:
    """Converts `node` to an instance of the schema; a ConfigError names the full key."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{prefix}: expected the keys {', '.join(f.name for f in fields(schema))}, got {node!r}")  # type: ignore[arg-type]
    _check_keys(schema, node, prefix)
    try:
        merged = OmegaConf.merge(_defaults(schema), dict(node))  # type: ignore[arg-type]  # of type variables: hashable
        return _construct(schema, OmegaConf.to_container(merged, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{_join(prefix, error.full_key)}: required, and not given") from None
    except ValidationError as error:
        full_key = str(error.full_key).partition("[")[0]  # of a list, not of what lies in it
        expected = _expected_type(schema, full_key.split("."))
        value = reduce(lambda part, key: part.get(key, {}), full_key.split("."), dict(node))
        name = _join(prefix, full_key)
        raise ConfigError(wrong_type(name, expected, value, NESTED.get(expected))) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_join(prefix, error.full_key)}: {_first_line(error)}") from None


@cache
def _defaults(schema: type) -> Any:
    """The schema as OmegaConf checks it; a merge copies it."""
    return OmegaConf.structured(_without_unions(schema))


@cache
def _without_unions(schema: type) -> type:
    """The schema with `Any` for types that OmegaConf cannot check: unions other than `X | None`, and values of dicts.

    `__post_init__` and `parse` check those.
    """

    def loosened(hint: Any) -> Any:
        members = [member for member in get_args(hint) if member is not NoneType]
        if get_origin(hint) in (Union, UnionType):
            return hint if len(members) == 1 else Any
        if get_origin(hint) is dict:
            return dict[str, Any]
        return _without_unions(hint) if is_dataclass(hint) and isinstance(hint, type) else hint

    hints = _hints(schema)
    types = {name: loosened(hint) for name, hint in hints.items()}
    # A node that a file of an older version lacks has the default of its schema, loosened like that.
    factories = {
        one.name: types[one.name] if one.default_factory is hints[one.name] else one.default_factory
        for one in fields(schema)
    }
    loose: type = make_dataclass(
        schema.__name__,
        [
            (one.name, types[one.name], field(default=one.default, default_factory=factories[one.name]))
            for one in fields(schema)
        ],
        kw_only=True,
    )
    return loose


def _hints(schema: type) -> dict[str, Any]:
    """Types of the keys; `Any` for the groups of `Config`, which `parse` converts to their schemas afterwards."""
    hints = get_type_hints(schema)
    return hints | dict.fromkeys(SCHEMAS, Any) if schema is Config else hints


def _construct(schema: type[Schema], values: Any) -> Schema:
    """Constructs the schema and the schemas nested in it; the `__post_init__` of each checks its values."""
    hints = _hints(schema)
    return schema(
        **{
            name: _construct(hints[name], value) if is_dataclass(hints[name]) else value
            for name, value in values.items()
        }
    )


def _expected_type(schema: type, path: list[str]) -> str:
    """The type of a (nested) key as the schema's source spells it, such as `int | None`."""
    spelled = next((str(field.type) for field in fields(schema) if field.name == path[0]), "another type")
    return _expected_type(NESTED[spelled], path[1:]) if len(path) > 1 and spelled in NESTED else spelled


def _check_keys(schema: type, node: Mapping[str, Any], prefix: str) -> None:
    known = {field.name: field.type for field in fields(schema)}
    for key, value in node.items():
        if key not in known:
            if prefix == "model" and (reason := from_data(str(key))):
                raise ConfigError(f"model.{key}: {reason}")
            near = get_close_matches(str(key), known, n=1)
            here = f"to {prefix}={node['name']}" if "name" in known and prefix in SCHEMAS else "here"
            hint = f"did you mean {_join(prefix, near[0])}?" if near else f"known {here}: {', '.join(known)}"
            raise ConfigError(f"{_join(prefix, str(key))}: no such key; {hint}")
        if str(known[key]).startswith("list[") and isinstance(value, Mapping):  # which OmegaConf would not name
            raise ConfigError(f"{_join(prefix, str(key))}: expected {known[key]}, got {dict(value)!r}")
        if str(known[key]) == "bool" and isinstance(value, int | float) and value not in (0, 1):  # OmegaConf takes 3
            raise ConfigError(wrong_type(_join(prefix, str(key)), "bool", value, None))
        nested = NESTED.get(str(known[key]))
        if nested is not None and isinstance(value, Mapping):
            _check_keys(nested, value, _join(prefix, str(key)))


def _parse_parameter_groups(optimizer: OptimizerConfig) -> dict[str, GroupConfig]:
    """The checked groups of an optimizer, without those that are null."""
    entries: Any = {} if optimizer.groups is None else optimizer.groups
    require(isinstance(entries, Mapping), "optimizer.groups", "groups by name, as in optimizer.groups.NAME.match=head",
            entries)  # fmt: skip
    groups = {}
    for name, entry in entries.items():
        if entry is None:
            continue
        key = f"optimizer.groups.{name}"
        groups[str(name)] = group = _typed(GroupConfig, entry, key)
        _check_patterns(key, group)
        require(group.lr_scale > 0, f"{key}.lr_scale", "a number above 0 (freeze what is not to train)", group.lr_scale)
        decay = group.weight_decay
        require(decay is None or decay >= 0, f"{key}.weight_decay", "null or a number, 0 or more", decay)
    return groups


def _check_patterns(key: str, rule: FreezeRuleConfig | GroupConfig) -> None:
    for name in ("match", "exclude"):
        value = getattr(rule, name)
        empty_is_fine = name == "exclude"
        strings = [value] if isinstance(value, str) else value
        valid = (value is None and empty_is_fine) or (
            isinstance(strings, list) and all(isinstance(item, str) for item in strings) and (strings or empty_is_fine)
        )
        require(bool(valid), f"{key}.{name}", "a pattern or a list of patterns", value)


def _check_rule(key: str, rule: FreezeRuleConfig) -> None:
    _check_patterns(key, rule)
    for name in ("start", "until"):
        if getattr(rule, name) is not None:
            parse_duration(f"{key}.{name}", getattr(rule, name))
    require(rule.stats or rule.affine or rule.weights, key, "at least one of stats, affine, weights to be true", "none")


def _check_init(key: str, init: InitConfig) -> None:
    are_names = all(isinstance(name, str) for pair in init.rename.items() for name in pair)
    require(are_names, f"{key}.rename", "new prefixes by old ones, {old: new}", init.rename)
    patterns = [init.skip] if isinstance(init.skip, str) else init.skip
    valid = patterns is None or (isinstance(patterns, list) and all(isinstance(one, str) and one for one in patterns))
    require(valid, f"{key}.skip", "null, a pattern, or a list of patterns", init.skip)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _join(prefix: str, key: str | None) -> str:
    return ".".join(part for part in (prefix, key) if part)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
