"""A wandb run that training never waits for: a thread of its own starts it, feeds it and ends it.

A server that refuses or hangs makes it an offline run; anything else that goes wrong ends it, with one warning.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

log = logging.getLogger(__name__)

Action = Callable[[Any], Any]

_GRACE = 15.0  # seconds for wandb's own process, beyond what its server is given


class WandbRun:
    """Runs actions on the wandb run, one after the other, in the order in which they were given.

    Args:
        options: what `wandb.init` gets; an `id` is for online runs alone, since wandb cannot continue an offline one.
        timeout: seconds that the server may take to start the run, and again to take in what is left at its end.
    """

    def __init__(self, options: dict[str, Any], *, online: bool, timeout: float) -> None:
        self._options, self._online, self._timeout = options, online, timeout
        self._actions: SimpleQueue[Action | None] = SimpleQueue()
        self._failed = False
        os.environ["WANDB_SILENT"] = "true"  # it prints before it reads its settings
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def do(self, action: Action) -> None:
        """Puts an action in the queue, for the thread to call with the run; after a failure it is dropped."""
        if not self._failed:
            self._actions.put(action)

    def finish(self, *, failed: bool) -> None:
        """Ends the run; returns when what was logged is uploaded, or given up."""
        self.do(lambda run: run.finish(exit_code=int(failed)))
        self._actions.put(None)
        # The slowest way: no answer at the start, recorded offline instead, no answer at the end.
        self._thread.join(2 * self._timeout + 2 * _GRACE)
        if self._thread.is_alive():
            self._failed = True
            log.warning("wandb does not answer and is left behind; metrics.jsonl is complete")

    def _work(self) -> None:
        run = None
        try:
            run = self._start()
            while (action := self._actions.get()) is not None:
                action(run)
        except Exception as error:
            self._failed = True
            rest = ""
            if run is not None:  # wandb keeps on disk what it could not send
                rest = f"; `wandb sync {os.path.relpath(os.path.dirname(run.dir))}` sends what it has kept"
            log.warning("wandb failed and is switched off, metrics.jsonl goes on: %s%s", _first_line(error), rest)
            # Its own process may be gone: then the next run of a multirun starts another, and nothing fails at exit.
            with suppress(Exception):
                import wandb

                wandb.teardown(1)

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            git_remote="",  # the address may hold a token; the commit is recorded
            init_timeout=self._timeout,
            finish_timeout=self._timeout,
            finish_timeout_raises=True,
            login_timeout=self._timeout,
        )
        if self._online:
            try:
                if not wandb.login(prompt=False, verify=False):  # it would wait for somebody at the keyboard
                    raise RuntimeError("no API key; `wandb login` stores one")
                return self._describe(wandb.init(**self._options, mode="online", resume="allow", settings=settings))
            except Exception as error:
                log.warning(
                    "wandb's server cannot be used, this attempt is recorded offline (`wandb sync` sends it): %s",
                    _first_line(error),
                )
        options = {**self._options, "id": secrets.token_hex(4)}  # None would be the id that has just failed
        return self._describe(wandb.init(**options, mode="offline", settings=settings))

    @staticmethod
    def _describe(run: Any) -> Any:
        # One step metric for everything, so that curves from several attempts share an axis.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
