"""What happens around a job, called by Hydra: before a directory is made, before anything of ours runs, and at the end
of a multirun.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from syncbn.training.config.redaction import guard_logging, learn, redact, redacted
from syncbn.training.config.schema import ConfigError
from syncbn.training.distributed import world
from syncbn.training.launch import explain as reporting
from syncbn.training.tracking.summary import print_table


class Guard(Callback):
    """Keeps a run in its directory, and secrets out of it. (Hydra turns exceptions in here into warnings, so mistakes
    are printed and end the process, as everywhere else.)
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Checks the run directory before Hydra makes it."""
        with reporting.clear_errors():
            _check_directory("hydra.run.dir", config.hydra.run.dir, config)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Checks the directory of all runs before Hydra makes it."""
        with reporting.clear_errors():
            _check_directory("hydra.sweep.dir", config.hydra.sweep.dir, config)
            subdir = OmegaConf.to_container(config.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
            if Path(subdir).is_absolute() or ".." in Path(subdir).parts:
                raise ConfigError(f"hydra.sweep.subdir: expected a directory below hydra.sweep.dir, got {subdir!r}")

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Takes the secrets out of what Hydra has just written, and of what others will read of this process."""
        learn(OmegaConf.to_container(config, resolve=False))
        guard_logging()
        sys.argv[1:] = [redact(argument) for argument in sys.argv[1:]]  # wandb records them
        if world.rank() == 0:
            written = [*Path(config.hydra.runtime.output_dir, ".hydra").glob("*.yaml")]
            for path in (*written, Path(config.hydra.sweep.dir, "multirun.yaml")):
                content = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else None
                if redacted(content) != content:
                    OmegaConf.save(OmegaConf.create(redacted(content)), path)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Prints a row per job."""
        if world.rank() == 0:
            print_table(Path(config.hydra.sweep.dir))


def _check_directory(key: str, directory: str, config: DictConfig) -> None:
    if config.hydra.job.chdir:
        raise ConfigError(
            "hydra.job.chdir: expected false, paths are those of the directory that you start in; got true"
        )
    outputs = Path("outputs").resolve()
    if outputs not in Path(directory).resolve().parents:
        raise ConfigError(
            f"{key}: expected a directory below outputs/, no link out of it, as run=NAME makes it; got {directory}"
        )
