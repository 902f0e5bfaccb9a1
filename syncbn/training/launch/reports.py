"""Reports that a job writes by itself; one that cannot be written is a warning, never the end of a job."""

from __future__ import annotations

import logging
from pathlib import Path

from syncbn.report import file_names
from syncbn.training.config.output import unwritable

log = logging.getLogger(__name__)


def write_or_warn(directory: Path) -> None:
    """Writes `report.html` into a run directory, or into that of a multirun, of all its jobs side by side."""
    try:
        from syncbn.report.write import write_report

        write_report([directory], directory / file_names.REPORT)
    except Exception as error:  # whatever it is: the results are there
        reason = unwritable(error) if isinstance(error, OSError) else str(error)
        log.warning("no report.html: %s; python -m syncbn report %s writes it later", reason, directory)
