"""Writing the report: one HTML file about one or several runs, which can be viewed without a network.

The report is made from the files in run directories alone, so it also works for runs that failed, were killed, or are
still in progress. The same files give the same report, byte for byte.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from syncbn.atomic_write import write_text
from syncbn.report import file_names


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Writes the report of these runs to `path` atomically.

    Args:
        runs: run directories, or directories of multiruns, for all of their jobs. Several runs are shown side by side.

    Raises:
        ValueError: no runs, or a path that is neither a run directory nor that of a multirun.
        ImportError: Bokeh is not installed.
        OSError: the file cannot be written.
    """
    try:
        importlib.import_module("bokeh.plotting")  # and with it NumPy, which reading the records needs too
    except ImportError as error:
        raise ImportError(f"the report is drawn by Bokeh: pip install 'syncbn[report]' ({error})") from error
    from syncbn.report.page import page
    from syncbn.report.runs import read_runs, run_directories

    directories = list(dict.fromkeys(job for run in runs for job in run_directories(run)))
    if not directories:
        raise ValueError("a report needs at least one run")
    content = page(read_runs(directories))
    write_text(path, content)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m syncbn report` to its parser."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run directory, or that of a multirun; several: side by side",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="default: report.html in the directory of the run, here for several"
    )


def command(args: argparse.Namespace) -> int:
    """Writes the report and prints its path; returns exit code 0, or 2 if it cannot be written."""
    output = args.output or (args.runs[0] / file_names.REPORT if len(args.runs) == 1 else Path(file_names.REPORT))
    try:
        write_report(args.runs, output)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --output: {output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(output)
    return 0
