"""What a configuration builds by name: a model, a loss, a metric or a data set of the user's own, from `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from syncbn.training.config.errors import ConfigError


def build_target(key: str, node: Mapping[str, Any], kind: type | None = None, **offered: Any) -> Any:
    """What `_target_` makes of the node's other keys.

    Args:
        key: of the node in the configuration, for errors.
        kind: what it has to be an instance of.
        offered: further arguments, for those that take them by name and were not given them.

    Raises:
        ConfigError: it cannot be imported or called, or makes something else.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import get_object, instantiate

    name = node["_target_"]
    try:
        taken = _parameters(get_object(name))
        built = instantiate({**{k: v for k, v in offered.items() if k in taken and v is not None}, **node})
    except InstantiationException as error:
        raise ConfigError(f"{key}._target_={name}: {_one_line(error.__cause__ or error)}") from None
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # of get_object, or the signature
        raise ConfigError(f"{key}._target_={name}: {_one_line(error)}") from None
    if kind is not None and not isinstance(built, kind):
        raise ConfigError(f"{key}._target_={name}: expected a {_shown(kind)}, got {type(built).__name__}")
    return built


def _parameters(target: Any) -> set[str]:
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # of something built in
        return set()


def _shown(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
