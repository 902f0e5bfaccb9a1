"""Command-line overrides: those for Hydra, in its syntax, and those for the stored configuration of a checkpoint.

Imports torch only where ranks have to communicate, so that `train.py --cfg job` stays quick.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from syncbn.training.config.errors import ConfigError, printable
from syncbn.training.config.keys import require_readers
from syncbn.training.config.schema import SCHEMAS
from syncbn.training.distributed.world import (
    check_variables,
    rank,
)
from syncbn.training.launch.config_sources import check_sources
from syncbn.training.launch.flags import check_flags
from syncbn.training.launch.resolvers import register_resolvers

log = logging.getLogger(__name__)

# Overrides that a task with `load` applies to its own configuration; all others are for the stored configuration.
_KEPT = re.compile(
    r"(task|load|run|output_dir|share|trust|resume|device|collective_timeout|tracker(\.\w+)?"
    r"|(eval|recalibrate|export|predict|audit)\.\w+|init\.[^=]+"
    r"|hydra[./].*)="
)
_WITHOUT_LOAD = {"train", "data", "check", "parity"}
_ONLY_PRINTS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}  # rank 0 alone prints
# Keys of named freeze rules, sub-networks, metrics, transforms and parameter groups: the schema does not declare them,
# so Hydra needs "++". So it does for the arguments of an optimizer by `_target_`.
_OPEN_DICTS = re.compile(
    r"(?:freeze|init|metrics|data\.augment|optimizer\.groups)\.[^=.]+(?:\.[^=]+=|=\s*\{).*"
    r"|(?:init|data\.augment|optimizer\.groups)=\s*\{.*",
    re.DOTALL,
)
_OPEN_OPTIMIZER = re.compile(r"optimizer\.[^=]+=.*", re.DOTALL)
_GROUPS = (*SCHEMAS, "freeze", "metrics", "tracker", "experiment", "debug", "hydra", "")


def prepare() -> None:
    """Prepares the process for Hydra: rank variables, import path, `sys.argv` and resolvers.

    On ranks other than 0, exits if the command only prints something, as `--help` does.

    Raises:
        ConfigError: the rank variables are incomplete; see also `check_sources` and `open_override`.
    """
    _typed[:] = sys.argv[1:]
    # Makes Hydra raise its errors instead of printing them, so that `clear_errors` can explain them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    check_variables()
    check_flags(sys.argv[1:])
    check_sources(sys.argv[1:])
    sys.path.append(os.getcwd())  # for modules of the user's own, as with `python -m`
    if rank() > 0 and _ONLY_PRINTS.intersection(sys.argv[1:]):
        sys.exit()
    sys.argv[1:] = _hold_back(open_overrides(sys.argv[1:]))
    register_resolvers()


# Names and paths are text, whatever else Hydra would read in them: `run=2024_01_15` is no number, and a path may begin
# with a tilde or have letters and signs that Hydra's grammar lacks. What may be a list, a sweep, an interpolation or
# quoted already is left to Hydra.
_TEXT = re.compile(
    r"(\+{0,2}(?:run|output_dir|load|resume|(?:data|eval|predict|init\.[^=.]+)\.path)=)([^,\[\]{}$'\"\\]+)"
)

_held_back: list[str] = []
_typed: list[str] = []


def _hold_back(arguments: list[str]) -> list[str]:
    """Removes the overrides that a task with `load` applies to the stored configuration; `held_back` returns them.

    Hydra would check them against the configuration of this command, whose keys may differ.
    """
    given = [argument.lstrip("+")[5:] for argument in arguments if argument.lstrip("+").startswith("task=")]
    tasks = {word.strip().strip("'\"") for words in given for word in words.split(",")}
    if tasks <= _WITHOUT_LOAD:
        return arguments
    kept = [a for a in arguments if a.startswith("-") or "=" not in a or _KEPT.match(a.lstrip("+~"))]
    _held_back[:] = [argument for argument in arguments if argument not in kept]
    return kept


def require_applied(task: str, overrides: Sequence[str]) -> None:
    """Checks that every key of the command line has an effect, for the task of this job.

    Args:
        overrides: those that Hydra has composed.

    Raises:
        ConfigError: the task does not read a key; or overrides were held back for a task with `load`, and this is none.
    """
    if task in _WITHOUT_LOAD and _held_back:
        raise ConfigError(
            f"{_held_back[0].partition('=')[0]}: goes to the configuration that load holds, which task={task} does not"
            " read; one command has tasks of one kind, written as task=eval or -m task=eval,audit"
        )
    require_readers(task, [*overrides, *_held_back])


def typed() -> list[str]:
    """The arguments as they were typed, secrets included."""
    return list(_typed)


def held_back() -> list[str]:
    """The overrides that were kept from Hydra, for the stored configuration that a task loads."""
    return list(_held_back)


def open_overrides(arguments: Sequence[str]) -> list[str]:
    """`open_override` of all arguments; with `optimizer=custom`, keys of the optimizer need no `+` either."""
    is_open = "optimizer=custom" in arguments
    return [f"++{a}" if is_open and _OPEN_OPTIMIZER.fullmatch(a) else open_override(a) for a in arguments]


def open_override(argument: str) -> str:
    """Turns `freeze.mine.match=x` into `++freeze.mine.match=x`, since the schema does not declare the names of rules.

    Quotes names and paths for Hydra where it would read anything but text. Other overrides are returned unchanged.

    Raises:
        ConfigError: a config group is given anything but the name of a choice.
    """
    _require_choice(argument)
    if (found := _TEXT.fullmatch(argument)) and not _is_text(argument):
        argument = f"{found[1]}'{found[2]}'"
    return f"++{argument}" if _OPEN_DICTS.fullmatch(argument) else argument


def _is_text(argument: str) -> bool:
    """Whether Hydra takes the value for text, or for null."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    return value is None or isinstance(value, str)


def _require_choice(argument: str) -> None:
    """Raises a ConfigError if a config group is given no name: Hydra ends with a traceback then."""
    name, equals, text = argument.lstrip("+~").partition("=")
    group = name.partition("@")[0]
    if not equals or (group not in _GROUPS and "/" not in group):
        return
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:  # says itself what it cannot read
        return
    if override.is_hydra_override() and group in ("hydra", ""):
        values: Iterable[Any] = [False]
    elif override.is_sweep_override():
        values = [] if "glob(" in text else islice(override.sweep_iterator(), 1000)
    else:
        values = [override.value()]
    for value in values:
        if value is None and override.is_delete():
            continue
        names = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | QuotedString) and item != "???" for item in names):
            raise ConfigError(
                f"{group or name}: expected the name of a choice, as python train.py --help lists them,"
                f" got {printable(text.strip())}"
            )
