"""This process among the others of its job, and what they agree on. Imports torch only where it has to talk to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from syncbn.training.config.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

_STORE_TIMEOUT = timedelta(seconds=60)


def rank() -> int:
    """This process's rank in the job; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of ranks of the job; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> str:
    """How often torchrun has restarted the job, the same on every rank.

    Each machine counts for itself, and one that joined later has counted fewer: where the store is new at every
    attempt, rank 0's word holds.
    """
    if is_distributed() and not agent_keeps_store():
        return agree("attempt", restarts)
    return restarts()


def restarts() -> str:
    """How often this machine's torchrun has restarted its ranks."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def agent_keeps_store() -> bool:
    """Whether torchrun's agent keeps the store, so that it outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_elastic() -> bool:
    """Whether a launcher that restarts ranks (torchrun) has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def num_nodes() -> int:
    """The number of machines of the job, as torchrun counts them; 1 without it."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def is_distributed() -> bool:
    """Whether torchrun (or anything else that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


agreed: dict[str, str] = {}


def agree(key: str, propose: Callable[[], str]) -> str:
    """What rank 0 proposes, on every rank, and the same again however often it is asked.

    After an elastic restart too, because torchrun's store outlives the ranks.
    """
    if key not in agreed:
        if is_distributed():
            name = f"syncbn/{key}"
            if rank() == 0 and not store().check([name]):
                store().set(name, propose())
            agreed[key] = store().get(name).decode()
        else:
            agreed[key] = propose()
    return agreed[key]


@cache
def store() -> Store:
    """The job's key-value store: the one that torchrun's agent keeps, else one that rank 0 hosts."""
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=rank() == 0 and not agent_keeps_store(),
        timeout=_STORE_TIMEOUT,
    )


def on_all_ranks(value: T) -> list[T]:
    """What each rank says, on every rank, in the order of ranks; values that pickle."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_variables() -> None:
    """That the variables by which a rank finds the others are complete, or that it is no rank.

    Raises:
        ConfigError: some are there, which anything but torchrun may have set, and others are not.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    known = [name for name in needed if name in os.environ]
    if {"RANK", "WORLD_SIZE"}.intersection(known) and len(known) < len(needed):
        missing = [name for name in needed if name not in known]
        raise ConfigError(
            f"{known[0]}: this variable of the environment says that this process is a rank of a job, but there is no"
            f" {' and no '.join(missing)}; start train.py with torchrun, which sets them all, or unset {known[0]}"
        )
