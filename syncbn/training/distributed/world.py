"""Rank, world size, key-value store and agreement between ranks. Imports torch only in functions that communicate."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from syncbn.training.config.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

_STORE_TIMEOUT = timedelta(seconds=60)


def rank() -> int:
    """Rank of this process in the job; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_first_on_machine() -> bool:
    """Whether this is the first of the ranks on this machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def world_size() -> int:
    """The number of ranks of the job; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> str:
    """Number of times that torchrun has restarted the job, as text, the same on every rank.

    Each machine counts its own restarts, so one that joined later has a lower count. If rank 0 hosts the store, which
    is then new at every attempt, all ranks take rank 0's count from it.
    """
    if is_distributed() and not agent_keeps_store():
        return agree("attempt", restarts)
    return restarts()


def restarts() -> str:
    """Number of times that torchrun on this machine has restarted its ranks, as text."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def agent_keeps_store() -> bool:
    """Whether torchrun's agent hosts the key-value store, which then outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_elastic() -> bool:
    """Whether torchrun, which can restart ranks, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def num_nodes() -> int:
    """The number of machines (torchrun agents) of the job; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def is_distributed() -> bool:
    """Whether torchrun (or anything else that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


agreed: dict[str, str] = {}  # values that `agree` has returned in this process, by key


def agree(key: str, propose: Callable[[], str], *, patience: timedelta = _STORE_TIMEOUT) -> str:
    """Returns rank 0's value for `key` on every rank; every later call with that key returns the same value.

    Communicates through the store: the other ranks wait until rank 0 has called it. If torchrun's agent hosts the
    store, the value survives an elastic restart.

    Args:
        propose: computes the value; called on rank 0 only, and only if the store has no value yet.
        patience: how long the other ranks wait for it.
    """
    if key not in agreed:
        if is_distributed():
            name = f"syncbn/{key}"
            if rank() == 0 and not store().check([name]):
                store().set(name, propose())
            store().wait([name], patience)
            agreed[key] = store().get(name).decode()
        else:
            agreed[key] = propose()
    return agreed[key]


@cache
def store() -> Store:
    """The job's key-value store, hosted by torchrun's agent if it offers one, else by rank 0.

    Rank 0 listens on the loopback device alone where MASTER_ADDR is on it, otherwise on all network devices.

    Raises:
        ConfigError: on rank 0, the port is taken.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_host = rank() == 0 and not agent_keeps_store()
    on_loopback = is_host and (address == "localhost" or address.startswith("127."))
    try:
        listening = socket.create_server((address, port)).detach() if on_loopback else None
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT: {address}:{port} cannot be listened on ({error.strerror}); another job on this machine may"
            " have it: give each job a port of its own, or start it with torchrun --standalone, which takes a free one"
        ) from None
    return TCPStore(
        address,
        port,
        world_size(),
        is_master=is_host,
        timeout=_STORE_TIMEOUT,
        master_listen_fd=listening,
    )


def is_alone_so_far() -> bool:
    """Whether this process has not communicated yet, and so has not imported torch for that."""
    return store.cache_info().currsize == 0


def wait_for_rank_0(what: str) -> None:
    """Waits until rank 0 has called this with `what` too, but no longer than 10 s, because it may never do so.

    For the end of a process: torchrun ends the other ranks as soon as one leaves with an error, and rank 0 may not have
    written or removed yet what is its task.
    """
    if not is_distributed() or world_size() == 1:
        return
    key = f"syncbn/rank 0/{attempt()}/{what}"
    with suppress(Exception):  # a store that is gone must not hide how the process ends
        if rank() == 0:
            store().set(key, "")
        else:
            store().wait([key], timedelta(seconds=10))


def on_all_ranks(value: T) -> list[T]:
    """Gathers a picklable value of each rank on every rank, in rank order; a collective over all ranks."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def check_variables() -> None:
    """Checks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are all set, or RANK and WORLD_SIZE both unset.

    Raises:
        ConfigError: RANK or WORLD_SIZE is set, by torchrun or anything else, and another of the four is not.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    known = [name for name in needed if name in os.environ]
    if {"RANK", "WORLD_SIZE"}.intersection(known) and len(known) < len(needed):
        missing = [name for name in needed if name not in known]
        raise ConfigError(
            f"{known[0]}: this variable of the environment says that this process is a rank of a job, but there is no"
            f" {' and no '.join(missing)}; start train.py with torchrun, which sets them all, or unset {known[0]}"
        )
