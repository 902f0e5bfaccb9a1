"""Loads this rank's batches in order, prepared ahead by worker processes.

The samples of a batch are chosen before a worker gets it, and their augmentation depends on (seed, epoch, sample), so
batches are bitwise the same for any number and speed of workers. One pool of workers serves training and evaluation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

from syncbn.training.config.errors import TrainingError
from syncbn.training.data import workers as processes
from syncbn.training.data.by_size import Pixels, mapped, parts_of
from syncbn.training.data.dataset import Data
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext

Batch = tuple[Pixels, Pixels]  # images and labels
Task = tuple[Any, ...]  # name of a method of Data, followed by its arguments


class Loader:
    """Prepares batches, in worker processes or (`workers=0`) in this one, and copies them to the device.

    Workers (see `data.workers`) start with the first batch that is needed.

    Args:
        workers: worker processes of this rank.
        prefetch: batches that are prepared ahead, per worker.

    Raises:
        ConfigError: a sample cannot be read (the message names it), or the data set cannot be pickled for workers.
        TrainingError: a worker has died.
    """

    def __init__(self, data: Data, context: RankContext, *, workers: int = 0, prefetch: int = 2) -> None:
        self.data, self.context, self.num_workers = data, context, workers
        self._num_ahead = workers * prefetch
        self._pins = context.device.type == "cuda"
        self._workers: ProcessPoolExecutor | None = None
        self._lifeline: Connection | None = None  # workers exit when it is closed, be it by our exit
        self._pinning: ThreadPoolExecutor | None = None
        self._training: tuple[int, Iterator[Batch]] | None = None  # the next step, and the batches from that step on

    def micro_batches(self, sampler: Sampler, seed: int, step: int) -> Iterator[Batch]:
        """This rank's part of each micro-batch of a step; the batches of the steps that follow are prepared ahead."""
        if self._training is None or self._training[0] != step:
            self._training = (step, self._prepare(self._train_tasks(sampler, seed, step)))
        batches = self._training[1]
        self._training = None  # until this step is complete: an unfinished one must not be continued
        for _ in sampler.shards(step):
            yield next(batches)
        self._training = (step + 1, batches)

    def one_batch(self, sampler: Sampler, seed: int, step: int) -> Batch:
        """This rank's part of the first micro-batch of any step, prepared in this process."""
        return self._move(_do(self.data, *next(self._train_tasks(sampler, seed, step))))

    def eval_batches(self, split: Any, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """A batch for each of `indices`, (N,) int64 positions in the split, in order."""
        names = [name for name in ("train", "val", "test") if getattr(self.data, name) is split]
        assert names, "a split of this loader's data"
        yield from self._prepare(("eval_batch", names[0], index, self.context.dtype) for index in indices)

    def close(self) -> None:
        """Ends the workers and discards prepared batches; the next batch starts new workers."""
        self._training = None
        if self._lifeline is not None:
            self._lifeline.close()  # first: a broken pool waits for its workers, which ignore SIGTERM
        for pool in (self._workers, self._pinning):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._workers = self._pinning = self._lifeline = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _train_tasks(self, sampler: Sampler, seed: int, step: int) -> Iterator[Task]:
        while True:  # epoch after epoch; the consumer stops
            for shard in sampler.shards(step):
                yield "train_batch", shard.index, seed, sampler.epoch_of(step), self.context.dtype, shard.repeats
            step += 1

    def _prepare(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        """Results of the tasks, in order, on the device."""
        if self.num_workers == 0:
            for task in tasks:
                yield self._move(_do(self.data, *task))
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
            raise TrainingError(processes.DIED) from None
        # Pending futures are not cancelled when the consumer stops early: a broken pool sets an exception on each
        # pending future, and in CPython 3.11 that fails for cancelled ones.

    def _submit(self, task: Task) -> Future[Batch]:
        if self._workers is None:
            self.data.pixel_stats  # noqa: B018 - computed once here instead of in each worker
            self._workers, self._lifeline = processes.start(self.data, self.num_workers)
            self._pinning = ThreadPoolExecutor(1, "pin") if self._pins else None
        future = processes.submit(self._workers, _do, *task)
        return future if self._pinning is None else self._pinning.submit(_pinned, future)

    def _move(self, batch: Batch) -> Batch:
        images, labels = batch
        if self._pins and not all(part.is_pinned() for part in parts_of(images)):
            images, labels = mapped(images, Tensor.pin_memory), mapped(labels, Tensor.pin_memory)
        return mapped(images, self.context.put), mapped(labels, self._put)

    def _put(self, labels: Tensor) -> Tensor:
        return labels.to(self.context.device, non_blocking=True)


def _do(data: Data, method: str, *arguments: Any) -> Batch:
    if method == "eval_batch":
        name, *others = arguments
        return data.eval_batch(getattr(data, name), *others)
    return data.train_batch(*arguments)


def _pinned(future: Future[Batch]) -> Batch:
    images, labels = future.result()
    return mapped(images, Tensor.pin_memory), mapped(labels, Tensor.pin_memory)
