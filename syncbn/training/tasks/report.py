"""The report that a run leaves at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from syncbn.training.config.redaction import redact
from syncbn.training.launch.explain import explain
from syncbn.training.tracking.summary import write_summary

log = logging.getLogger(__name__)


class EndOfRun:
    """At the end of a run, also of one that fails: `report.html`, and in `summary.json` why it failed.

    A run that stops on request goes on later, and has its report then.
    """

    def __init__(self, run_dir: Path, overrides: Sequence[str]) -> None:
        self.run_dir, self.overrides = run_dir, overrides

    def end(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """To be pushed on an `ExitStack`."""
        from syncbn.training.distributed.stopping import Stopped

        if isinstance(error, Stopped | KeyboardInterrupt):
            return
        if error is not None:
            cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ is not None else error
            reason = explain(cause) or f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            shown = [redact(override) for override in self.overrides]
            write_summary(self.run_dir, -1, {}, shown, failed=redact(reason))
        try:
            from syncbn.report.write import write_report

            write_report([self.run_dir], self.run_dir / "report.html")
        except Exception as error:  # nothing of the run depends on it
            log.warning("no report.html: %s; python -m syncbn report %s writes it later", error, self.run_dir)
