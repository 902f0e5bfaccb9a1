"""The report that is written at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from syncbn.training.config.output import unwritable
from syncbn.training.config.redaction import redact
from syncbn.training.launch.explain import explain
from syncbn.training.launch.reports import write_or_warn
from syncbn.training.tracking.summary import write_summary

log = logging.getLogger(__name__)


class EndOfRun:
    """Writes `report.html` at the end of a run, and if it failed, the reason to `summary.json`.

    A run that stops on request (SIGTERM, Ctrl-C) gets its report when it is resumed and ends.

    Args:
        overrides: the command line's, for the summary of a failed run; secrets are redacted.
    """

    def __init__(self, run_dir: Path, overrides: Sequence[str]) -> None:
        self.run_dir, self.overrides = run_dir, overrides

    def end(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The exit callback, to be pushed on an `ExitStack`; it suppresses no exception of the run."""
        from syncbn.training.distributed.stopping import Stopped

        if isinstance(error, Stopped | KeyboardInterrupt) or not self.run_dir.is_dir():
            return
        if error is not None:
            cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ is not None else error
            why = explain(cause) or f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            shown = [redact(override) for override in self.overrides]
            try:
                write_summary(self.run_dir, -1, {}, shown, failed=redact(why))
            except OSError as failure:  # the error of the run is the one to show
                log.warning("no summary.json: %s", unwritable(failure))
        write_or_warn(self.run_dir)
