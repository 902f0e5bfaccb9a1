"""Errors of some ranks that concern all: timeouts of collectives, and configuration errors of single ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from syncbn.training.config.errors import ConfigError, RankError
from syncbn.training.distributed import world
from syncbn.training.distributed.world import attempt, is_distributed, rank, store, world_size


def explain_one_value(error: ValueError, step: int) -> RankError | None:
    """Converts torch's error about one value per channel to a RankError with a remedy; None for any other error."""
    if "more than 1 value per channel" not in str(error):
        return None
    return RankError(
        f"step {step}: one value per channel has no variance, and batch normalization is local to each rank here; set"
        f" bn.sync=true, or a batch_size that leaves no rank with one sample ({error})"
    )


def explain_timeout(error: RuntimeError, where: str) -> RuntimeError | None:
    """Converts a timeout of a collective to an error that names the place and the missing ranks.

    Each rank that times out writes a key to the store. A rank whose key does not appear within a second is taken for
    one of those that the others waited for.

    Args:
        where: the place in the run, for the message, such as "step 12".

    Returns:
        The new error; None if `error` is no timeout or the job is not distributed.
    """
    if not is_distributed() or not re.search(r"[Tt]imed out", str(error)):
        return None
    missing = []
    with suppress(Exception):  # without a store the message still has to appear
        prefix = f"syncbn/timed_out/{attempt()}/"
        store().set(f"{prefix}{rank()}", "")
        for other in range(world_size()):
            try:
                store().wait([f"{prefix}{other}"], timedelta(seconds=1))
            except Exception:
                missing.append(other)
    for_whom = f" for rank {', '.join(map(str, missing))}" if missing else ""
    return RuntimeError(
        f"{where}: rank {rank()} waited{for_whom} in a collective for longer than collective_timeout allows"
    )


@contextmanager
def failing_together() -> Iterator[None]:
    """Context after which a ConfigError of any rank is raised on every rank.

    All ranks have to enter it: leaving it is a collective (none for other exceptions). A rank that failed raises its
    own error, the others that of the lowest rank that failed.
    """
    mine: ConfigError | None = None
    try:
        yield
    except ConfigError as error:
        mine = error
    problems = world.on_all_ranks(None if mine is None else str(mine))
    if mine is not None:
        raise mine
    for problem in problems:
        if problem is not None:
            raise ConfigError(problem)
