"""OmegaConf resolvers for `configs/`: the run name on which all ranks agree, and values that depend on the rank."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.output import output_root, unwritable
from syncbn.training.distributed.world import agent_keeps_store, agree, is_elastic, rank


def register_resolvers() -> None:
    """Registers the OmegaConf resolvers that `configs/` uses."""
    OmegaConf.register_new_resolver("syncbn.run_dir", _run_directory, replace=True)
    OmegaConf.register_new_resolver("syncbn.on_first_rank", lambda value: value if rank() == 0 else None, replace=True)
    OmegaConf.register_new_resolver("syncbn.rank_suffix", lambda: f"-rank{rank()}" if rank() else "", replace=True)
    OmegaConf.register_new_resolver("syncbn.choices", _choices, replace=True)
    OmegaConf.register_new_resolver("syncbn.console_level", lambda: "INFO" if rank() == 0 else "ERROR", replace=True)


def _choices(group: str) -> str:
    """The choices of a config group for `--help`, those of --config-dir included; a star marks the chosen one."""
    chosen = HydraConfig.get().runtime.choices.get(group)
    options = GlobalHydra.instance().config_loader().get_group_options(group)
    return ", ".join(f"{option}*" if option == chosen else option for option in sorted(options))


_stamped: list[Path] = []  # run directories that are named by a time stamp, as this process has resolved them


def stamped_directories() -> list[Path]:
    """The run directories of this process whose names are time stamps, so that nothing was in them before."""
    return list(dict.fromkeys(_stamped))


def _run_directory(output_dir: object, run: str | None) -> str:
    """The run directory: in `output_dir`, named `run`, or by a time stamp on which all ranks agree.

    Raises:
        ConfigError: `output_dir` is no directory's name, or nothing can be made in it; `run` is no valid name, or is
            missing where a restart could not find the run without it.
    """
    root = output_root(output_dir)
    name = _run_name(root, run)
    if run is None:
        _stamped.append(root / name)
    return str(root / name)


def _run_name(root: Path, run: str | None) -> str:
    if run is None:
        if is_elastic() and not agent_keeps_store():  # a restart would get a new store and a new stamp
            raise ConfigError("run: where torchrun's store ends with each attempt, a restart finds its run by name"
                              " alone; give it one, run=...")  # fmt: skip
        return agree("run_name", lambda: _reserve_stamp(root))
    name = str(run)
    if not re.fullmatch(r"[\w][\w.+-]*(/[\w][\w.+-]*)*", name) or ".." in name:
        raise ConfigError(f"run: expected a directory name of letters, digits and .+-_ under {root}/, got {name!r}")
    return name


def _reserve_stamp(root: Path) -> str:
    """A time stamp whose directory this call has created, so that no other job has it, even one of the same second.

    Raises:
        ConfigError: no directory can be made in `root`.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in [stamp, *(f"{stamp}-{number}" for number in range(2, 1000))]:
        try:
            (root / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"output_dir: {unwritable(error)}") from None
        return name
    raise ConfigError("run: 999 runs started in this second; name this one with run=...")
