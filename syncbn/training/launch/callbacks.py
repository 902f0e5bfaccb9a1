"""Hydra callbacks: check and lock the run directory, redact secrets before a job; table and report after a multirun."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from syncbn.report import file_names
from syncbn.training.checkpoint.lock import lock_directory, unlock_directory
from syncbn.training.config.errors import ConfigError, printable
from syncbn.training.config.keys import require_no_sweep
from syncbn.training.config.output import make_directory, mask_of, output_root, short
from syncbn.training.config.parsing import parse
from syncbn.training.config.redaction import guard_logging, learn, redact, redacted
from syncbn.training.config.run_files import require_regular_files
from syncbn.training.distributed import world
from syncbn.training.launch.announce import announce_job, only_checks
from syncbn.training.launch.explain import clear_errors
from syncbn.training.launch.overrides import held_back, require_applied
from syncbn.training.launch.preflight import check_machine
from syncbn.training.launch.reports import write_or_warn
from syncbn.training.launch.sweep_table import print_table

# Files and directories of which a run that has begun has at least one.
_MARKS = (file_names.CONFIG, file_names.METRICS, file_names.CHECKPOINTS)
# Keys that say where all jobs of a multirun write, who can read it, and what they may do there.
_OF_MULTIRUN = ("run", "output_dir", "share", "trust", "debug")


class Guard(Callback):
    """Confines runs to `output_dir`, one job to a directory, and keeps other users and secrets out of their files.

    Hydra turns exceptions of a callback into warnings, so the checks run in `clear_errors`, which prints the message
    and ends the process.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Checks configuration and given keys, makes and locks the run directory, before Hydra writes to it."""
        with clear_errors():
            parsed = parse(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
            require_applied(parsed.task, config.hydra.overrides.task)
            check_machine(parsed, held_back())
            load = None if parsed.load is None else redact(printable(parsed.load))
            announce_job(config.hydra.runtime.choices, parsed.task, load)
            if only_checks():
                sys.exit()
            _prepare_directory("hydra.run.dir", "run", config)
            lock_directory(Path(config.hydra.run.dir), "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Checks the names in the sweep directory, makes it and locks it, before Hydra writes to it."""
        with clear_errors():
            require_no_sweep(config.hydra.overrides.task, _OF_MULTIRUN)
            if only_checks():
                sys.exit()
            subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
            if Path(subdir).is_absolute() or ".." in Path(subdir).parts:
                raise ConfigError(f"hydra.sweep.subdir: expected a directory below hydra.sweep.dir, got {subdir!r}")
            _prepare_directory("hydra.sweep.dir", "sweep", config)
            lock_directory(Path(config.hydra.sweep.dir), "sweep", multirun=True)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Redacts secrets in the files that Hydra has just written, in `sys.argv`, and in log records from now on.

        A job of a multirun locks its directory too. That cannot fail: the lock of the multirun stands for all its jobs.
        """
        learn(OmegaConf.to_container(config, resolve=False))
        guard_logging()
        sys.argv[1:] = [redact(argument) for argument in sys.argv[1:]]  # wandb records the command line
        if world.rank() == 0:
            written = [*Path(config.hydra.runtime.output_dir, file_names.HYDRA).glob("*.yaml")]
            for path in (*written, Path(config.hydra.sweep.dir, file_names.MULTIRUN)):
                content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
                if redacted(content) != content:
                    OmegaConf.save(OmegaConf.create(redacted(content)), path)
        if config.hydra.mode == RunMode.MULTIRUN:
            with clear_errors():
                lock_directory(Path(config.hydra.runtime.output_dir), f"job {config.hydra.job.num}")

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        """Releases the directory of a job of a multirun."""
        if config.hydra.mode == RunMode.MULTIRUN:
            unlock_directory(Path(config.hydra.runtime.output_dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints a table with a row per job and writes the report of all, on rank 0; the other ranks wait for it."""
        if world.rank() == 0:
            print_table(Path(config.hydra.sweep.dir))
            if config.task == "train" and config.tracker.report:
                write_or_warn(Path(config.hydra.sweep.dir))
        world.wait_for_rank_0("table")


def _prepare_directory(key: str, mode: str, config: DictConfig) -> None:
    """Makes the directory of a run or a sweep; from here on the process writes files as `share` says.

    `output_dir` itself is made as the user's own umask says: it is a place and no run, and others may use it too.

    Args:
        key: the key that holds the directory, for error messages.
        mode: "run" or "sweep".

    Raises:
        ConfigError: the directory is not below `output_dir`, cannot be made or written to, or holds a run that
            `debug=...` must not change; Hydra would change the working directory.
    """
    if config.hydra.job.chdir:
        raise ConfigError(
            "hydra.job.chdir: expected false, paths are those of the directory that you start in; got true"
        )
    root, mask = output_root(config.get("output_dir")), mask_of(config.get("share"))
    make_directory("output_dir", root)
    os.umask(mask)
    # wandb's files are written by a process of its own; one that a parent has started (a notebook with a run open,
    # say) has the parent's umask and ends with the parent.
    os.environ.pop("WANDB_SERVICE", None)
    directory = Path(config.hydra[mode].dir)
    if not _is_below(directory, root):
        raise ConfigError(
            f"{key}: expected a directory below {short(root)}/, no link out of it, as run=NAME makes it;"
            f" got {directory}"
        )
    make_directory("run", directory)
    debug = config.hydra.runtime.choices.get("debug")
    # Rank 0 alone looks, before it writes: another rank may come later, and find what rank 0 has just begun.
    if (
        debug is not None
        and world.attempt() == "0"
        and world.agree(f"{directory} holds a run", lambda: str(_holds_run(directory))) == "True"
    ):
        raise ConfigError(
            f"run: {short(directory)} holds a run already, which debug={debug} would go on with and change; leave run"
            " out, or choose another name"
        )
    for place in (directory, *directory.glob("[0-9]*")) if mode == "sweep" else (directory,):
        if place != directory and place.is_symlink():
            raise ConfigError(f"run: {place} is a link; a job writes there, so remove or rename it")
        require_regular_files(place)


def _is_below(directory: Path, root: Path) -> bool:
    try:
        return root.resolve() in directory.resolve().parents
    except (OSError, RuntimeError):  # links in a circle
        return False


def _holds_run(directory: Path) -> bool:
    """Whether the directory holds a run, or a multirun's directory one of a job."""
    return any((directory / mark).exists() or any(directory.glob(f"*/{mark}")) for mark in _MARKS)
