"""Starts the ranks as fresh processes, hands them jobs, and ends them, whatever happens."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from syncbn.auditing.parity.errors import ParityError
from syncbn.auditing.parity.worker import Failure, Job, serve

_NAME = "syncbn-parity-"
_NO_GUARD = 77  # exit code of a process whose import of the script called parity again
_GRACE = 5.0  # seconds
_ADVICE = "use a smaller batch, model or images, fewer steps, smaller world sizes, or a longer timeout"


class JobError(Exception):
    """A job failed on a rank."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class RankProcesses:
    """Processes that form groups of the first n of them, one job at a time; a context manager.

    After a failure all of them are ended, and the next job starts new ones.

    Args:
        num: how many, the largest world size.
    """

    def __init__(self, num: int) -> None:
        refuse_recursion()
        self.num = num
        self._context = multiprocessing.get_context("spawn")
        self._files = tempfile.TemporaryDirectory(prefix="syncbn-parity-")
        self._ranks: list[tuple[BaseProcess, Connection, Any]] = []
        self._num_jobs = self._num_subjects = 0

    def load(self, subject: tuple[Any, Any, Any], timeout: float) -> None:
        """Takes build, loss and batch for the jobs that follow.

        Args:
            timeout: seconds for all these jobs together.

        Raises:
            ParityError: one of them cannot be sent to another process, or loaded there.
        """
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        self._payload = _packed(subject)
        self._num_subjects += 1
        self.directory = Path(self._files.name) / f"subject{self._num_subjects}"
        self.directory.mkdir()
        if self._ranks:
            self._send_subject()
        else:
            self._start()

    def run(self, name: str, world_size: int, *arguments: Any) -> list[Any]:
        """Runs a job on ranks 0 .. world_size - 1; returns their results by rank.

        Raises:
            JobError: it failed on a rank; the first failure is the cause of any others.
            ParityError: the time is up, a process died, or new processes cannot import what they need.
        """
        if not self._ranks:
            self._start()
        self._num_jobs += 1
        job = Job(name, world_size, str(self.directory / f"store{self._num_jobs}"), arguments)
        for _, connection, _ in self._ranks[:world_size]:
            connection.send(job)
        results = self._gather(world_size)
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        num_threads = max(1, (os.cpu_count() or 1) // self.num)
        # The new processes inherit the mask: Ctrl-C, which a terminal sends to all, is left to this process.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if is_main else None
        try:
            for rank in range(self.num):
                ours, theirs = self._context.Pipe()
                shown = self._context.Array("c", 200, lock=False)
                process = self._context.Process(
                    target=serve,
                    args=(rank, num_threads, theirs, shown),
                    name=f"{_NAME}{rank}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._ranks.append((process, ours, shown))
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._send_subject()

    def _send_subject(self) -> None:
        for rank, (_, connection, _) in enumerate(self._ranks):
            try:
                connection.send((self._payload, str(self.directory)))
            except (BrokenPipeError, ConnectionResetError):
                raise self._death(rank) from None
        try:
            self._gather(self.num)
        except JobError as error:
            raise ParityError(
                f"build, loss or batch: a new process cannot load them ({error.failure.text}); define them at the top"
                " level of a module that can be imported"
            ) from None

    def _gather(self, num: int) -> dict[int, Any]:
        """What the first `num` processes send next; ends all of them if one fails."""
        results: dict[int, Any] = {}
        failures: list[Failure] = []
        until = self._deadline
        while len(results) < num:
            waited = {self._ranks[rank][1]: rank for rank in range(num) if rank not in results}
            ready = wait([*waited], max(0.0, until - time.monotonic()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waited[connection]
                try:
                    results[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(rank) from None
                if isinstance(results[rank], Failure):
                    failures.append(results[rank])
            if any(not failure.is_waiting for failure in failures) or (failures and not ready):
                break
            if failures:  # waited for a rank, whose own failure may be on its way
                until = min(self._deadline, time.monotonic() + _GRACE)
            elif not ready:
                raise self._is_late([*waited.values()])
        if failures:
            self.end()
            raise JobError(min(failures, key=lambda failure: (failure.is_waiting, failure.rank)))
        return results

    def _is_late(self, waited: Sequence[int]) -> ParityError:
        places = "; ".join(f"rank {rank} in {self._place(rank)}" for rank in sorted(waited))
        self.end()
        return ParityError(f"timeout: {self._timeout:g} s are over ({places}); {_ADVICE}")

    def _place(self, rank: int) -> str:
        return self._ranks[rank][2].value.decode(errors="replace") or "the model"

    def _death(self, rank: int) -> ParityError:
        """Why a process is gone; ends the others."""
        process, place = self._ranks[rank][0], self._place(rank)
        process.join(10)
        code = process.exitcode
        self.end()
        if code == _NO_GUARD:
            return ParityError(
                "the script calls parity when it is imported, which a new process has to do; put the call below"
                ' `if __name__ == "__main__":`'
            )
        return ParityError(
            f"the process of rank {rank} ended with exit code {code} in {place}; what it printed is above (negative:"
            " killed by that signal; -9 may mean that memory ran out: use a smaller batch or model)"
        )

    def end(self) -> None:
        """Ends the processes."""
        for process, connection, _ in self._ranks:
            connection.close()
            process.kill()
        for process, _, _ in self._ranks:
            process.join()
        self._ranks.clear()

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._files.cleanup()


def refuse_recursion() -> None:
    """Ends a process of ours that imports a script without a main guard, and so calls parity once more."""
    if multiprocessing.current_process().name.startswith(_NAME):
        os._exit(_NO_GUARD)


def _packed(subject: tuple[Any, Any, Any]) -> bytes:
    for name, part in zip(("build", "loss", "batch"), subject, strict=True):
        remedy = "define it at the top level of a module that can be imported"
        main = sys.modules.get("__main__")
        if getattr(part, "__module__", None) == "__main__" and not hasattr(main, "__file__"):
            raise ParityError(f"{name}: is defined in a notebook or console, where no new process finds it; {remedy}")
        try:
            torch.save(part, io.BytesIO())
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ParityError(f"{name}: cannot be sent to a new process ({reason}); {remedy}") from None
    packed = io.BytesIO()
    torch.save(subject, packed)
    return packed.getvalue()
