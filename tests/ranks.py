"""Rank functions on real processes: a pool of workers, started once and reused, that form a gloo group for each call.

    def check_sum(rank, world_size): ...      # asserts, in every worker
    ranks(2, check_sum, 1.5)                  # calls check_sum(1.5) on ranks 0 and 1; returns what they return

A failed assertion of a rank fails the test with that rank's traceback. Nothing waits forever: a call that takes longer
than its timeout kills the workers, and the next call starts fresh ones.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.warm import GC_THRESHOLD, SERVER_IMPORTS

TIMEOUT = 90.0  # seconds for one call, on two busy cores
_GROUP_TIMEOUT = timedelta(seconds=60)


class RankError(AssertionError):
    """What failed on which rank."""


class Pool:
    """Worker processes, as many as the largest world asked for so far; forks of a process that has torch imported."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._server = forkserver.ForkServer()  # not the one that data loaders in this process fork their workers from
        self._server.set_forkserver_preload(list(SERVER_IMPORTS))
        self._workers: list[tuple[Any, Any]] = []  # process, its task queue
        self._results: Any = self._context.Queue()
        self._directory = tempfile.TemporaryDirectory()
        self._num_calls = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Calls the function on ranks 0 .. world_size-1; returns their results by rank."""
        self._num_calls += 1
        while len(self._workers) < world_size:
            tasks = self._context.Queue()
            process = self._context.Process(target=_work, args=(tasks, self._results), daemon=True)
            with mock.patch.object(forkserver, "connect_to_new_process", self._server.connect_to_new_process):
                process.start()
            self._workers.append((process, tasks))
        store = Path(self._directory.name) / f"store{self._num_calls}"
        for rank in range(world_size):
            self._workers[rank][1].put((self._num_calls, rank, world_size, str(store), function, args))
        outcomes: dict[int, tuple[bool, Any]] = {}
        try:
            while len(outcomes) < world_size:
                call, rank, succeeded, value = self._results.get(timeout=timeout)
                if call == self._num_calls:
                    outcomes[rank] = (succeeded, value)
        except queue.Empty:
            self._kill()
            silent = sorted(set(range(world_size)) - outcomes.keys())
            failures = [f"rank {rank}:\n{value}" for rank, (succeeded, value) in outcomes.items() if not succeeded]
            raise RankError("\n".join([f"ranks {silent} did not answer within {timeout} s", *failures])) from None
        failures = [f"rank {rank}:\n{value}" for rank, (succeeded, value) in sorted(outcomes.items()) if not succeeded]
        if failures:
            raise RankError("\n".join(failures))
        return [outcomes[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """Ends the workers for good."""
        self._kill()
        self._directory.cleanup()

    def _kill(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers.clear()


def _work(tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("WANDB_SERVICE", None)  # that of the test process, which may end it
    sys.stdout = sys.stderr
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    parent = os.getppid()
    while True:
        try:
            call, rank, world_size, path, function, args = tasks.get(timeout=5.0)
        except queue.Empty:
            if os.getppid() != parent:  # the test run is gone: so are its workers
                return
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            store = dist.FileStore(path, world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT)
            try:
                dist.barrier()  # all are connected: none may leave while another still knocks
                torch.manual_seed(0)
                outcome = (True, function(*args))
                dist.barrier()  # nor while a sub-group of the function's is being connected
            finally:
                dist.destroy_process_group()
        except BaseException:
            outcome = (False, traceback.format_exc())
        results.put((call, rank, *outcome))
