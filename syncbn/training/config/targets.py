"""Finds the class or function that a `_target_` names; errors are one line that says what is missing where."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from syncbn.training.config.errors import ConfigError, listed

_TO_INSTALL = ("timm", "torchvision")  # named in this documentation, and in no extra of this package


def find_target(key: str, name: str) -> Any:
    """The class or function that the `_target_` of the node `key` names; imports its module.

    Raises:
        ConfigError: the module is not there or cannot be imported, or has no such name.
    """
    require_module(key, name)
    first, *others = name.split(".")
    found = _import(key, name, first)
    path = first
    for part in others:
        is_module = isinstance(found, ModuleType)
        if not hasattr(found, part) and is_module and _exists(f"{path}.{part}"):
            found = _import(key, name, f"{path}.{part}")
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            raise ConfigError(f"{key}._target_={name}: {path} has no {part!r}{_instead(found, part)}")
        path = f"{path}.{part}"
    return found


def require_module(key: str, name: object) -> None:
    """Checks that the outermost module of a `_target_` is there, which is not imported.

    Raises:
        ConfigError: it is not, or the name is no dotted one.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{key}._target_={name}: expected the dotted name of a class or function, my_package.Name")
    first = name.partition(".")[0]
    if _exists(first):
        return
    if first in _TO_INSTALL:
        raise ConfigError(f"{key}._target_={name}: {first} is not installed; pip install {first}")
    here = sorted(
        {path.stem for path in Path.cwd().iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    )
    near = get_close_matches(first, here, n=1)
    hint = f"did you mean {near[0]}?" if near else "start where it lies, install it, or set PYTHONPATH"
    raise ConfigError(f"{key}._target_={name}: found no module {first!r}, in {os.getcwd()} or installed; {hint}")


def _exists(module: str) -> bool:
    try:
        return sys.modules.get(module) is not None or find_spec(module) is not None
    except (ImportError, ValueError):  # no package, or a module without a specification
        return False


def _import(key: str, name: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except Exception as error:  # of whatever type the user's code raises
        raise ConfigError(f"{key}._target_={name}: importing {module} fails, {described(error)}") from None


def described(error: BaseException) -> str:
    """An exception of the user's code in one line: its type, its message, and where in that code it was raised."""
    return " ".join(f"{type(error).__name__}: {error}".split()) + _place(error)


def _place(error: BaseException) -> str:
    """File and line, in words, if they lie below the working directory; of a syntax error Python tells them."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = os.path.relpath(trace.tb_frame.f_code.co_filename)
        if not file.startswith(("..", "<")) and "site-packages" not in file and os.path.abspath(file) != __file__:
            place = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return "" if isinstance(error, SyntaxError) else place


def _instead(found: Any, part: str) -> str:
    """What to say about a name that is not there: the nearest one, or those there are."""
    names = [name for name in dir(found) if not name.startswith("_")]
    if near := get_close_matches(part, names, n=1):
        return f"; did you mean {near[0]}?"
    home = getattr(found, "__name__", None)
    own = [name for name in names if getattr(getattr(found, name), "__module__", None) == home]
    return f"; it has {listed(own)}" if own else ""
