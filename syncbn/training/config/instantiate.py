"""Builds user-defined models, losses, metrics and data sets from configuration nodes with `_target_`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from syncbn.training.config.errors import ConfigError, one_line
from syncbn.training.config.targets import described, find_target


def build_target(key: str, node: Mapping[str, Any], kind: type | None = None, **offered: Any) -> Any:
    """Calls the node's `_target_` with its other keys as arguments, by Hydra's `instantiate`.

    Args:
        key: key of the node in the configuration, for error messages.
        node: `_target_` (import path of a class or function) and its keyword arguments.
        kind: class that the result has to be an instance of; None for any.
        offered: default arguments. Each is passed if it is not None, the target has a parameter of that name, and the
            node does not set it.

    Raises:
        ConfigError: the target cannot be imported or called, or does not return an instance of `kind`.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    name = node["_target_"]
    target = find_target(key, name)
    if not callable(target):
        found = type(target).__name__
        raise ConfigError(
            f"{key}._target_={name}: expected a class or function, got a {found}; name one as {name}.Name"
        )
    try:
        taken = _parameters(target)
        built = instantiate({**{k: v for k, v in offered.items() if k in taken and v is not None}, **node})
    except InstantiationException as error:
        raise ConfigError(f"{key}._target_={name}: {_reason(error.__cause__ or error, taken)}") from None
    except (AttributeError, ValueError, TypeError) as error:  # raised by inspect.signature
        raise ConfigError(f"{key}._target_={name}: {one_line(error)}") from None
    if kind is not None and not isinstance(built, kind):
        raise ConfigError(f"{key}._target_={name}: expected a {_shown(kind)}, got {type(built).__name__}")
    return built


def is_defined_in(name: str, package: str) -> bool:
    """Whether a target is defined in the package, not only imported there, as `torch.load` is in `mine.torch.load`.

    Imports it. True for a name that leads nowhere, about which `build_target` has an error.
    """
    try:
        home = getattr(find_target("trust", name), "__module__", None)
    except ConfigError:
        return True
    return isinstance(home, str) and (home == package or home.startswith(f"{package}."))


def _parameters(target: Any) -> set[str]:
    try:
        return set(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        return set()


def _shown(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]} {kind.__name__}"


def _reason(error: BaseException, taken: Collection[str]) -> str:
    """Of wrong arguments the message; of any other exception its type too, and where the user's code raised it."""
    if not isinstance(error, ValueError | TypeError):
        return described(error)
    text = one_line(error)
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    near = get_close_matches(unknown[1], taken, n=1) if unknown else []
    return f"{text}; did you mean {near[0]}?" if near else text
