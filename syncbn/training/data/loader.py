"""Batches of this rank in the order in which they are needed, prepared ahead by worker processes.

What is in a batch is decided before a worker gets it, and drawn by (seed, epoch, sample): neither the number of workers
nor which of them is quicker changes a bit. One set of workers serves training and evaluation.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data.dataset import Data
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext

Batch = tuple[Tensor, Tensor]  # images and labels
Task = tuple[Any, ...]  # name of a method of Data, and its arguments

_STOPPING = {signal.SIGTERM, signal.SIGINT}
_DIED = (
    "data.workers: a worker process died; it may have run out of memory, or of shared memory (/dev/shm; in a container"
    " --shm-size or --ipc=host): use fewer data.workers or a smaller data.prefetch or data.cache, or data.workers=0"
)


class Loader:
    """Prepares batches and brings them to the device; without workers each when it is asked for.

    Workers are processes of their own (from a fork server, so that they share neither the process group nor CUDA with
    the rank) of one thread each. They let signals pass, because the rank decides what happens then, and end with the
    rank however it ends.

    Raises:
        ConfigError: a sample that cannot be read, by name; a data set that workers cannot be given.
        TrainingError: a worker has died.
    """

    def __init__(self, data: Data, context: RankContext, *, workers: int = 0, prefetch: int = 2) -> None:
        self.data, self.context, self.num_workers = data, context, workers
        self._num_ahead = workers * prefetch
        self._pins = context.device.type == "cuda"
        self._workers: ProcessPoolExecutor | None = None
        self._lifeline: Connection | None = None  # workers end when it is closed, by us or because we are gone
        self._pinning: ThreadPoolExecutor | None = None
        self._training: tuple[int, Iterator[Batch]] | None = None  # the step that comes next, and from it on

    def micro_batches(self, sampler: Sampler, seed: int, step: int) -> Iterator[Batch]:
        """This rank's part of each micro-batch of a step; steps that follow each other are prepared ahead."""
        if self._training is None or self._training[0] != step:
            self._training = (step, self._prepare(self._train_tasks(sampler, seed, step)))
        batches = self._training[1]
        self._training = None  # in the middle of a step, and if it fails
        for _ in sampler.shards(step):
            yield next(batches)
        self._training = (step + 1, batches)

    def one_batch(self, sampler: Sampler, seed: int, step: int) -> Batch:
        """This rank's part of the first micro-batch of a step, out of turn."""
        return self._move(_do(self.data, next(self._train_tasks(sampler, seed, step))))

    def eval_batches(self, split: Any, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each index, in their order."""
        names = [name for name in ("train", "val", "test") if getattr(self.data, name) is split]
        assert names, "a split of this loader's data"
        yield from self._prepare(("eval_batch", names[0], index, self.context.dtype) for index in indices)

    def close(self) -> None:
        """Ends the workers; what they have prepared is lost."""
        self._training = None
        if self._lifeline is not None:
            self._lifeline.close()  # first: a pool that has lost a worker waits for the others, which let SIGTERM pass
        for pool in (self._workers, self._pinning):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._workers = self._pinning = self._lifeline = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _train_tasks(self, sampler: Sampler, seed: int, step: int) -> Iterator[Task]:
        while True:  # an epoch follows the other; who asks knows when to stop
            for shard in sampler.shards(step):
                yield "train_batch", shard.index, seed, sampler.epoch_of(step), self.context.dtype
            step += 1

    def _prepare(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        """What the tasks give, in their order, on the device."""
        if self.num_workers == 0:
            for task in tasks:
                yield self._move(_do(self.data, task))
            return
        ahead: deque[Future[Batch]] = deque()
        try:
            for task in tasks:
                ahead.append(self._submit(task))
                if len(ahead) > self._num_ahead:
                    yield self._move(ahead.popleft().result())
            while ahead:
                yield self._move(ahead.popleft().result())
        except BrokenProcessPool:
            raise TrainingError(_DIED) from None
        # What is ahead when nobody asks any more is not cancelled: a pool whose workers are gone fails over futures
        # that were (CPython 3.11 sets an exception on each of them).

    def _submit(self, task: Task) -> Future[Batch]:
        if self._workers is None:
            self._workers, self._lifeline = _start(self.data, self.num_workers)
            self._pinning = ThreadPoolExecutor(1, "pin") if self._pins else None
        # A worker's process starts here too, and inherits which signals are blocked. One that arrives meanwhile waits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            # An index travels as plain bytes: a tensor would take a shared memory file, and a connection to this rank.
            future = self._workers.submit(_work, tuple(_packed(part) for part in task))
        except (AttributeError, TypeError, PicklingError) as error:
            raise ConfigError(
                f"data.workers: the data set cannot be sent to worker processes ({' '.join(str(error).split())}); let"
                " it hold what pickles (functions of a module instead of lambdas, paths instead of open files), or use"
                " data.workers=0"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return future if self._pinning is None else self._pinning.submit(_pinned, future)

    def _move(self, batch: Batch) -> Batch:
        images, labels = batch
        if self._pins and not images.is_pinned():
            images, labels = images.pin_memory(), labels.pin_memory()
        return self.context.put(images), labels.to(self.context.device, non_blocking=True)


def _do(data: Data, task: Task) -> Batch:
    method, *arguments = task
    if method == "eval_batch":
        name, *arguments = arguments
        return data.eval_batch(getattr(data, name), *arguments)
    return data.train_batch(*arguments)


def _pinned(future: Future[Batch]) -> Batch:
    images, labels = future.result()
    return images.pin_memory(), labels.pin_memory()


def _start(data: Data, num: int) -> tuple[ProcessPoolExecutor, Connection]:
    data.pixel_stats  # noqa: B018 - once here, and not in each worker
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    theirs, ours = context.Pipe(duplex=False)
    return ProcessPoolExecutor(num, context, _begin, (data, theirs)), ours


_data: Data  # of a worker process


def _begin(data: Data, lifeline: Connection) -> None:
    """The beginning of a worker."""
    global _data
    _data = data
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with suppress(EOFError):
        lifeline.recv_bytes()  # nobody sends anything: it returns when the other end is closed
    os._exit(0)  # whatever the main thread waits for does not come any more


def _work(task: Task) -> Batch:
    return _do(_data, tuple(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in task))


def _packed(part: Any) -> Any:
    return part.numpy() if isinstance(part, Tensor) else part
