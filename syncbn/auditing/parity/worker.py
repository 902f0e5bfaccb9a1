"""A rank: a process that builds the user's model and does what it is told, one job after the other."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from syncbn.auditing.parity.errors import ParityError, type_and_message

COLLECTIVE_TIMEOUT = timedelta(seconds=100)  # how long a rank waits for another one


@dataclass(frozen=True)
class Job:
    """A function of `JOBS` for the ranks of a world, and its arguments after the subject."""

    name: str
    world_size: int
    store: str
    """A file, new for each job, by which the ranks find each other."""
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Failure:
    """The exception that ended a job on one rank."""

    rank: int
    where: str
    """What was running: a module, "the loss", "the backward pass", "build"."""
    text: str
    """Type and message, in one line."""
    is_judged: bool = False
    """Whether the text is one of this package, and complete."""
    is_waiting: bool = False
    """Whether the rank has waited for another one in vain."""


def serve(rank: int, num_threads: int, connection: Connection, shown: Any) -> None:
    """Takes subjects (a pickle and a directory) and jobs for them, until the process that started this one has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the business of who started this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    sys.stdout = sys.stderr  # the output of the command is not the model's
    import torch

    from syncbn.auditing.parity.subject import Subject

    torch.set_num_threads(num_threads)
    warnings.simplefilter("ignore")  # those of the model came in the user's own training
    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="1")

    def show(text: str) -> None:
        shown.value = text.encode()[-199:]

    subject: Subject | None = None
    while True:
        try:
            given: Job | tuple[bytes, str] = connection.recv()
        except EOFError:
            return
        if isinstance(given, Job):
            connection.send(_outcome(rank, subject, given, lambda: shown.value.decode(errors="replace")))
            continue
        try:
            # Functions come by their names, from the process that started this one.
            build, loss, batch = torch.load(io.BytesIO(given[0]), weights_only=False)
            subject = Subject(build, loss, batch, Path(given[1]), show)
        except BaseException as error:
            connection.send(Failure(rank, "import", type_and_message(error)))
        else:
            connection.send(None)


def _outcome(rank: int, subject: Any, job: Job, where: Callable[[], str]) -> Any:
    import gc

    import torch.distributed as dist

    os.environ["WORLD_SIZE"] = str(job.world_size)
    try:
        store = dist.FileStore(job.store, job.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=COLLECTIVE_TIMEOUT)
        try:
            dist.barrier()  # nobody may leave while another one still connects
            result = _jobs()[job.name](subject, *job.arguments)
            gc.collect()  # a DDP that is alive when its group ends can abort the process
            dist.barrier()
            return result
        finally:
            dist.destroy_process_group()
    except BaseException as error:
        text = type_and_message(error)
        waiting = any(word in text for word in ("imed out", "imeout", "CollectiveError", "Connection closed by peer"))
        return Failure(rank, where(), str(error) if isinstance(error, ParityError) else text,
                       isinstance(error, ParityError), waiting)  # fmt: skip


def _jobs() -> dict[str, Callable[..., Any]]:
    from syncbn.auditing.parity import loss_cut, probes
    from syncbn.auditing.parity.steps import Steps

    return {
        "describe": probes.describe,
        "train": lambda subject, *arguments: Steps(subject, *arguments).run(),
        "random": probes.find_random,
        "loss": loss_cut.cut_loss,
        "mixing": probes.find_mixing,
    }


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
