"""What has to happen before and around a job: overrides, run directory, process group.

Imports torch only where a rank has to talk to the others, so that `train.py --cfg job` stays quick.
"""

from __future__ import annotations

import logging
import os
import re
import sys

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.schema import SCHEMAS
from syncbn.training.distributed.world import (
    check_variables,
    rank,
)
from syncbn.training.launch.resolvers import register_resolvers

log = logging.getLogger(__name__)

# What a task with `load` takes from its own command line; everything else is for the stored configuration.
_KEPT = re.compile(
    r"(task|load|run|resume|device|collective_timeout|tracker(\.\w+)?|(eval|recalibrate|export|audit)\.\w+|init\.[^=]+"
    r"|hydra[./].*)="
)
_ONLY_PRINTS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}  # and rank 0 does
_OPEN_DICTS = re.compile(r"(?:freeze|init|metrics)\.[^=.]+\.[^=]+=.*", re.DOTALL)
# Hydra has no message with the key for these: a group takes a name.
_NO_CHOICE = re.compile(
    rf"\+{{0,2}}({'|'.join([*SCHEMAS, 'freeze', 'metrics', 'tracker', 'experiment', 'debug'])})="
    r"\s*((?i:[-+]?(?:[\d._]+(?:e[-+]?\d+)?|nan|inf)|true|false)|\{.*\})\s*",
    re.DOTALL,
)


def prepare() -> None:
    """Everything that must be in place before Hydra starts: resolvers, and overrides in the form that it wants."""
    # Hydra then raises its errors instead of printing them, and `clear_errors` can say what to do.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    check_variables()
    sys.path.append(os.getcwd())  # a user's own modules, as `python -m` would find them
    if rank() > 0 and _ONLY_PRINTS.intersection(sys.argv[1:]):
        sys.exit()
    sys.argv[1:] = _hold_back([open_override(argument) for argument in sys.argv[1:]])
    register_resolvers()


_held_back: list[str] = []


def _hold_back(arguments: list[str]) -> list[str]:
    """Keeps from Hydra what a task with `load` applies to the stored configuration, in which the keys may be others."""
    tasks = {argument.lstrip("+") for argument in arguments if argument.lstrip("+").startswith("task=")}
    if not tasks - {"task=train", "task=data"}:
        return arguments
    kept = [a for a in arguments if a.startswith("-") or "=" not in a or _KEPT.match(a.lstrip("+~"))]
    _held_back[:] = [argument for argument in arguments if argument not in kept]
    return kept


def held_back() -> list[str]:
    """The overrides that are meant for a stored configuration."""
    return list(_held_back)


def open_override(argument: str) -> str:
    """`freeze.mine.match=x` as `++freeze.mine.match=x`: named rules need no declaration.

    Raises:
        ConfigError: a group is given a number or a dictionary.
    """
    if found := _NO_CHOICE.fullmatch(argument):
        raise ConfigError(
            f"{found[1]}: expected the name of a choice, as python train.py --help lists them, got {found[2]}"
        )
    return f"++{argument}" if _OPEN_DICTS.fullmatch(argument) else argument
