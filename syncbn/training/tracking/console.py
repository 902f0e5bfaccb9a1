"""Console output of rank 0: log lines, a progress bar where there is a terminal, and tables."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from syncbn.training.config.output import unwritable

CONSOLE = Console(soft_wrap=True, highlight=False)


class Handler(logging.Handler):
    """A logging handler that prints to the shared console, above the progress bar if there is one."""

    def __init__(self, level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        self.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one line."""
        CONSOLE.print(self.format(record), markup=False)


class LogFile(logging.FileHandler):
    """A logging handler that writes to a file; if that fails, it says so once, and the program goes on."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line; the first creates the file."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - a method of logging
        """Prints a warning at the first error of the disk, in the place of logging's tracebacks."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            error.filename = self.baseFilename
            print(f"warning: {unwritable(error)}; the console has every line", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the file; what is still not written is left out."""
        with suppress(OSError):
            super().close()


class ShowStep(Protocol):
    """Callback that moves the progress bar to a step, with the loss of that step if one is known."""

    def __call__(self, step: int, loss: float | None = None) -> None: ...


@contextmanager
def progress(
    num_steps: int, start: int, enabled: bool, what: str = "step", samples: int | None = None
) -> Iterator[ShowStep | None]:
    """Context with a progress bar over steps; None if disabled or without a terminal (then the caller logs lines).

    Args:
        what: the word beside the bar for what it counts.
        samples: in a step, over all ranks, for the rate; None shows steps a second.
    """
    if not (enabled and CONSOLE.is_terminal):
        yield None
        return
    columns = (
        TextColumn(what),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[loss]}{task.fields[rate]}{task.fields[left]}"),
    )
    with Progress(*columns, console=CONSOLE, transient=True, expand=True) as bar:
        task = bar.add_task("train", total=num_steps, completed=start, loss="", rate="", left="")
        since = [(time.monotonic(), start)]

        def show(step: int, loss: float | None = None) -> None:
            now = time.monotonic()
            moment, done = since[0]
            speed = (step - done) / max(now - moment, 1e-9)  # steps a second
            if done == start < step:  # from now on without the first one, which compiles and warms up
                since[0] = now, step
            rate = f"{speed:.1f} {what}s/s" if samples is None else f"{speed * samples:.0f} samples/s"
            left = timedelta(seconds=round((num_steps - step) / speed)) if speed else "?"
            told = bar.tasks[0].fields["loss"] if loss is None else f"loss {loss:.4f}  "
            bar.update(task, completed=step, loss=told, rate=rate, left=f"  {left} left")

        yield show


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Prints a table without a header: names and values, which are no markup: a path may have brackets."""
    table = Table(title=escape(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="left", overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    CONSOLE.print(table)


def print_rows(title: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Prints a table with a header; wider than the terminal where a word would not fit otherwise."""
    table, rows = Table(title=escape(title), title_justify="left"), list(rows)
    for name, *cells in zip(header, *rows, strict=True):
        longest = max((len(word) for cell in (name, *cells) for word in cell.split()), default=0)
        table.add_column(Text(name), min_width=longest)
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: a pattern may stand in brackets
    everything = CONSOLE.options.update(max_width=10_000)
    CONSOLE.print(table, width=max(CONSOLE.width, CONSOLE.measure(table, options=everything).minimum))


def shown(path: Path) -> str:
    """The path relative to the working directory, short enough to read and ready to copy into the next command."""
    return os.path.relpath(path)
