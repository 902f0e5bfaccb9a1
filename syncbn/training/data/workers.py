"""Worker processes that hold an object, such as a data set, and call functions with it.

They come from a fork server, so that they share neither the process group nor CUDA with the rank, and use one thread
each. They ignore SIGTERM and SIGINT, which the rank handles, and exit when the rank does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from pickle import PicklingError
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError, TrainingError, one_line

T = TypeVar("T")

_STOPPING = {signal.SIGTERM, signal.SIGINT}
DIED = (
    "data.workers: a worker process died; it may have run out of memory, or of shared memory (/dev/shm; in a container"
    " --shm-size or --ipc=host): use fewer data.workers or a smaller data.prefetch or data.cache, or data.workers=0"
)


def start(shared: object, num: int) -> tuple[ProcessPoolExecutor, Connection]:
    """Starts a pool of `num` workers that hold an object; they exit when the connection is closed, be it by our exit.

    Close the connection before the pool is shut down: a broken pool waits for its workers, which ignore signals.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "syncbn.training.data.loader"])
    theirs, ours = context.Pipe(duplex=False)
    return ProcessPoolExecutor(num, context, _begin, (shared, theirs)), ours


def submit(workers: ProcessPoolExecutor, function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Calls `function(shared, *arguments)` in a worker.

    Args:
        function: of a module.
        arguments: tensors among them are sent as NumPy arrays, which need no shared-memory file.

    Raises:
        ConfigError: the shared object cannot be pickled.
        BrokenProcessPool: here or from the future: a worker has died (see `DIED`).
    """
    # `submit` may start a worker, which inherits the mask of blocked signals. Signals stay pending meanwhile.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        return workers.submit(_work, function, *(_packed(part) for part in arguments))
    except (AttributeError, TypeError, PicklingError) as error:
        raise ConfigError(
            f"data.workers: the data set cannot be sent to worker processes ({one_line(error)}); let"
            " it hold what pickles (functions of a module instead of lambdas, paths instead of open files), or use"
            " data.workers=0"
        ) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def each(shared: object, function: Callable[[Any, Any], T], tasks: Iterable[Any], num: int) -> Iterator[T]:
    """`function(shared, task)` for each task, in order: in `num` workers, two tasks ahead each, or (0) in this process.

    Raises:
        TrainingError: a worker has died; see also `submit`.
    """
    if num == 0:
        yield from (function(shared, task) for task in tasks)
        return
    workers, lifeline = start(shared, num)
    try:
        rest = iter(tasks)
        ahead = [submit(workers, function, task) for task in islice(rest, 2 * num)]
        while ahead:
            result = ahead.pop(0).result()
            ahead += [submit(workers, function, task) for task in islice(rest, 1)]
            yield result
    except BrokenProcessPool:
        raise TrainingError(DIED) from None
    finally:
        lifeline.close()
        workers.shutdown(cancel_futures=True)


_shared: Any  # in a worker process: the object that functions are called with


def _begin(shared: object, lifeline: Connection) -> None:
    """Initializes a worker process."""
    global _shared
    _shared = shared
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with suppress(EOFError):
        lifeline.recv_bytes()  # nothing is ever sent: raises EOFError when the rank's end is closed
    os._exit(0)  # the main thread may wait for tasks that no longer come


def _work(function: Callable[..., T], *arguments: Any) -> T:
    return function(_shared, *(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in arguments))


def _packed(part: Any) -> Any:
    return part.numpy() if isinstance(part, Tensor) else part
