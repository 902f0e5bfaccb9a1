"""The first lines of a command, before the imports that take long; imports nothing that does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime

from syncbn.training.distributed.world import rank, restarts, world_size

CHECKED = "SYNCBN_CHECKED"  # set by `loopback`: "only" in the process that checks ahead, "told" in ranks after it
_MULTIRUN = {"-m", "--multirun"}


def announce_start(arguments: Sequence[str], num_ranks: object = None) -> None:
    """Prints on rank 0 that the command has begun; nothing for commands that only print, as `--help` does."""
    if rank() == 0 and CHECKED not in os.environ and runs(arguments):
        again = f", restart {restarts()}" if restarts() != "0" else ""
        _say(f"train.py, {num_ranks or world_size()} rank(s){again}: reading the configuration")


def announce_job(choices: Mapping[str, str], task: str, load: str | None = None) -> None:
    """Prints on rank 0 what the job is, and that the long imports come next.

    Args:
        load: the checkpoint or run of a task that takes data and model from there.
    """
    if rank() == 0 and os.environ.get(CHECKED) != "told":
        groups = ("data", "model") if load is None else ()
        named = [f"{group}={choices[group]}" for group in groups if choices.get(group)]
        named += [] if load is None else [f"load={load}"]
        _say("  ".join([f"task={task}", *named]) + ": importing torch")


def runs(arguments: Sequence[str]) -> bool:
    """Whether the arguments of train.py start a job, or several."""
    return all(argument in _MULTIRUN or not argument.startswith("-") for argument in arguments)


def only_checks() -> bool:
    """Whether this process ends where the configuration has been checked."""
    return os.environ.get(CHECKED) == "only"


def _say(text: str) -> None:
    """Prints a line as the log's are, which has not begun yet."""
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)
