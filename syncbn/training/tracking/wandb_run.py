"""A wandb run in a background thread that starts, feeds and ends it, so that training never waits for wandb.

If the server refuses or does not answer at the start, the run is recorded offline. Any other failure ends the run with
one warning.
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

from syncbn.report.metric_names import STEP

log = logging.getLogger(__name__)

Action = Callable[[Any], Any]  # called with the wandb run

_GRACE = 15.0  # seconds that wandb's own process may take in addition to its server


class WandbRun:
    """Calls actions with the wandb run in a background thread, one after the other, in the order of `do`.

    Args:
        options: arguments of `wandb.init`; their `id` is used online only, since wandb cannot continue an offline run.
        timeout: seconds that the server may take to start the run, and again to receive the remaining data at its end.
    """

    def __init__(self, options: dict[str, Any], *, online: bool, timeout: float) -> None:
        self._options, self._online, self._timeout = options, online, timeout
        self._actions: SimpleQueue[Action | None] = SimpleQueue()
        self._failed = False
        os.environ["WANDB_SILENT"] = "true"  # wandb prints before it reads its settings
        self._thread = Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def do(self, action: Action) -> None:
        """Queues an action for the thread to call with the run; after a failure actions are dropped."""
        if not self._failed:
            self._actions.put(action)

    def finish(self, *, failed: bool) -> None:
        """Ends the run; returns when the logged data is uploaded, or after the timeouts, with a warning."""
        self.do(lambda run: run.finish(exit_code=int(failed)))
        self._actions.put(None)
        # The worst case: no answer at the start, a switch to offline, no answer at the end.
        self._thread.join(2 * self._timeout + 2 * _GRACE)
        if self._thread.is_alive():
            self._failed = True
            log.warning("wandb does not answer and is left behind; metrics.jsonl is complete")

    def _work(self) -> None:
        """The thread: starts the run, then calls actions until there is a None in the queue."""
        run = None
        try:
            run = self._start()
            while (action := self._actions.get()) is not None:
                action(run)
        except Exception as error:
            self._failed = True
            rest = ""
            if run is not None:  # unsent data remains on disk
                rest = f"; `wandb sync {os.path.relpath(os.path.dirname(run.dir))}` sends what it has kept"
            log.warning("wandb failed and is switched off, metrics.jsonl goes on: %s%s", _first_line(error), rest)
            # wandb's process may have died: then the next job of a multirun starts another, and nothing fails at exit.
            with suppress(Exception):
                import wandb

                wandb.teardown(1)

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            git_remote="",  # the remote's address may contain a token; the commit is recorded
            init_timeout=self._timeout,
            finish_timeout=self._timeout,
            finish_timeout_raises=True,
            login_timeout=self._timeout,
        )
        if self._online:
            try:
                if not wandb.login(prompt=False, verify=False):  # a prompt would wait for input
                    raise RuntimeError("no API key; `wandb login` stores one")
                return self._describe(wandb.init(**self._options, mode="online", resume="allow", settings=settings))
            except Exception as error:
                log.warning(
                    "wandb's server cannot be used, this attempt is recorded offline (`wandb sync` sends it): %s",
                    _first_line(error),
                )
        options = {**self._options, "id": secrets.token_hex(4)}  # with None, wandb takes the id that has just failed
        return self._describe(wandb.init(**options, mode="offline", settings=settings))

    @staticmethod
    def _describe(run: Any) -> Any:
        # One step metric for everything, so that curves from several attempts share an axis.
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
