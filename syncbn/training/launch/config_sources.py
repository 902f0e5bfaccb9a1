"""Refuses command lines by which Hydra would take what a run has written for a configuration, and so for code.

Hydra calls what a configuration names in `hydra.callbacks` and `hydra.job_logging` already while it composes, so the
command line is checked before.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from syncbn.report import file_names
from syncbn.training.config.errors import ConfigError

# A directory with one of these has been written by a run.
_WRITTEN = (file_names.HYDRA, file_names.CHECKPOINTS, file_names.METRICS)


class _Options(argparse.ArgumentParser):
    """Those of Hydra's options that name a source, or begin like one; abbreviations are taken as Hydra takes them."""

    def __init__(self) -> None:
        super().__init__(add_help=False)
        for names in (("--config-dir", "-cd"), ("--config-path", "-cp"), ("--config-name", "-cn"), ("--cfg", "-c")):
            self.add_argument(*names)
        self.add_argument("--experimental-rerun")

    def error(self, message: str) -> NoReturn:
        """Raises; Hydra has a message for the same mistake."""
        raise ValueError(message)


def check_sources(arguments: Sequence[str]) -> None:
    """Checks that no argument makes a run directory, or a pickle, the source of the configuration.

    Raises:
        ConfigError: one does; the message names it.
    """
    try:
        options, others = _Options().parse_known_args(list(arguments))
    except ValueError:
        return
    if options.experimental_rerun is not None:
        raise ConfigError(
            f"--experimental-rerun: unpickles {options.experimental_rerun}, which may run any code; use resume=... or"
            " load=... instead"
        )
    sources = {"--config-dir": options.config_dir, "--config-path": options.config_path}
    for name, source in (*sources.items(), *(("hydra.searchpath", path) for path in _search_path(others))):
        if source is not None and _is_written_by_run(source):
            raise ConfigError(
                f"{name}: expected a directory of configurations that you trust, {source} is what a run has written;"
                " use resume=... or load=... instead"
            )
    if file_names.HYDRA in Path(options.config_name or "").parts:
        raise ConfigError(
            f"--config-name: expected a configuration that you trust, {options.config_name} is what a run has written;"
            " use resume=... or load=... instead"
        )


def _search_path(arguments: Sequence[str]) -> Iterator[str]:
    """The directories in overrides of `hydra.searchpath`."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == "hydra.searchpath":
            yield from filter(None, re.split(r"[\[\],'\"\s]", value))


def _is_written_by_run(source: str) -> bool:
    """Whether this is a run directory or a `.hydra`; Hydra looks for --config-path beside train.py."""
    path = source.removeprefix("file://")
    places = [Path(path).resolve(), (Path(sys.argv[0]).parent / path).resolve()]
    return any(file_names.HYDRA in place.parts or any((place / name).exists() for name in _WRITTEN) for place in places)
