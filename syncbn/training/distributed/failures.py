"""What one rank meets, told on every rank: collectives that wait in vain, errors of some ranks alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from syncbn.training.config.errors import ConfigError, RankError
from syncbn.training.distributed import world
from syncbn.training.distributed.world import attempt, is_distributed, rank, store, world_size


def explain_one_value(error: ValueError, step: int) -> RankError | None:
    """What torch says of a batch that has one value per channel, as an error with a remedy; None for another error."""
    if "more than 1 value per channel" not in str(error):
        return None
    return RankError(
        f"step {step}: one value per channel has no variance, and batch normalization is local to each rank here; set"
        f" bn.sync=true, or a batch_size that leaves no rank with one sample ({error})"
    )


def explain_timeout(error: RuntimeError, where: str) -> RuntimeError | None:
    """A collective that waited in vain, as an error that says where, and for which ranks; None for another error.

    Ranks that gave up say so in the store; who has not come there soon after is what the others have waited for.
    """
    if not is_distributed() or not re.search(r"[Tt]imed out", str(error)):
        return None
    missing = []
    with suppress(Exception):  # a store that is gone must not hide the message
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
    """Around what one rank does, or each for itself: a ConfigError of any rank is raised on all, not only there."""
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
