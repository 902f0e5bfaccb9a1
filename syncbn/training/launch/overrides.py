"""What has to happen before and around a job: overrides, run directory, process group.

Imports torch only where a rank has to talk to the others, so that `train.py --cfg job` stays quick.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from syncbn.training.config.errors import RankError
from syncbn.training.config.schema import SCHEMAS, ConfigError
from syncbn.training.distributed.network import choose_device
from syncbn.training.distributed.world import (
    agent_keeps_store,
    agree,
    attempt,
    is_distributed,
    is_elastic,
    num_nodes,
    rank,
    store,
    world_size,
)
from syncbn.training.launch.explain import explain, explain_timeout, report_failure

log = logging.getLogger(__name__)

# What a task with `load` takes from its own command line; everything else is for the stored configuration.
_KEPT = re.compile(
    r"(task|load|run|resume|device|collective_timeout|tracker(\.\w+)?|(eval|recalibrate|export|audit)\.\w+|init\.[^=]+"
    r"|hydra[./].*)="
)
_ONLY_PRINTS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}  # and rank 0 does
_OPEN_DICTS = re.compile(r"(?:freeze|init|metrics)\.[^=.]+\.[^=]+=.*", re.DOTALL)
# Hydra has no message with the key for these: a group takes a name.
_NO_CHOICE = re.compile(
    rf"\+{{0,2}}({'|'.join([*SCHEMAS, 'freeze', 'metrics', 'tracker', 'experiment', 'debug'])})="
    r"\s*((?i:[-+]?(?:[\d._]+(?:e[-+]?\d+)?|nan|inf)|true|false)|\{.*\})\s*",
    re.DOTALL,
)


def prepare() -> None:
    """Everything that must be in place before Hydra starts: resolvers, and overrides in the form that it wants."""
    # Hydra then raises its errors instead of printing them, and `clear_errors` can say what to do.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    check_variables()
    sys.path.append(os.getcwd())  # a user's own modules, as `python -m` would find them
    if rank() > 0 and _ONLY_PRINTS.intersection(sys.argv[1:]):
        sys.exit()
    sys.argv[1:] = _hold_back([open_override(argument) for argument in sys.argv[1:]])
    register_resolvers()


def check_variables() -> None:
    """That the variables by which a rank finds the others are complete, or that it is no rank.

    Raises:
        ConfigError: some are there, which anything but torchrun may have set, and others are not.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    known = [name for name in needed if name in os.environ]
    if {"RANK", "WORLD_SIZE"}.intersection(known) and len(known) < len(needed):
        missing = [name for name in needed if name not in known]
        raise ConfigError(
            f"{known[0]}: this variable of the environment says that this process is a rank of a job, but there is no"
            f" {' and no '.join(missing)}; start train.py with torchrun, which sets them all, or unset {known[0]}"
        )


_held_back: list[str] = []


def _hold_back(arguments: list[str]) -> list[str]:
    """Keeps from Hydra what a task with `load` applies to the stored configuration, in which the keys may be others."""
    tasks = {argument.lstrip("+") for argument in arguments if argument.lstrip("+").startswith("task=")}
    if not tasks - {"task=train", "task=data"}:
        return arguments
    kept = [a for a in arguments if a.startswith("-") or "=" not in a or _KEPT.match(a.lstrip("+~"))]
    _held_back[:] = [argument for argument in arguments if argument not in kept]
    return kept


def held_back() -> list[str]:
    """The overrides that are meant for a stored configuration."""
    return list(_held_back)


def register_resolvers() -> None:
    """The interpolations that `configs/` uses."""
    OmegaConf.register_new_resolver("syncbn.run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("syncbn.on_first_rank", lambda value: value if rank() == 0 else None, replace=True)
    OmegaConf.register_new_resolver("syncbn.rank_suffix", lambda: f"-rank{rank()}" if rank() else "", replace=True)
    OmegaConf.register_new_resolver("syncbn.choices", _choices, replace=True)
    OmegaConf.register_new_resolver("syncbn.console_level", lambda: "INFO" if rank() == 0 else "ERROR", replace=True)


def _choices(group: str) -> str:
    """The choices of a config group, those of a user's --config-dir included, for `--help`."""
    chosen = HydraConfig.get().runtime.choices.get(group)
    options = GlobalHydra.instance().config_loader().get_group_options(group)
    return ", ".join(f"{option}*" if option == chosen else option for option in sorted(options))


def open_override(argument: str) -> str:
    """`freeze.mine.match=x` as `++freeze.mine.match=x`: named rules need no declaration.

    Raises:
        ConfigError: a group is given a number or a dictionary.
    """
    if found := _NO_CHOICE.fullmatch(argument):
        raise ConfigError(
            f"{found[1]}: expected the name of a choice, as python train.py --help lists them, got {found[2]}"
        )
    return f"++{argument}" if _OPEN_DICTS.fullmatch(argument) else argument


def _run_name(run: str | None) -> str:
    """The directory name under outputs/: `run`, or a time stamp that all ranks agree on."""
    if run is None:
        if is_elastic() and not agent_keeps_store():  # the agreed stamp would go with the store, and the run with it
            raise ConfigError("run: where torchrun's store ends with each attempt, a restart finds its run by name"
                              " alone; give it one, run=...")  # fmt: skip
        return agree("run_name", _reserve_stamp)
    name = str(run)
    if not re.fullmatch(r"[\w][\w.+-]*(/[\w][\w.+-]*)*", name) or ".." in name:
        raise ConfigError(f"run: expected a directory name of letters, digits and .+-_ under outputs/, got {name!r}")
    return name


def _reserve_stamp() -> str:
    """A time stamp whose directory nobody else has, not even a job that started at the same moment."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in [stamp, *(f"{stamp}-{number}" for number in range(2, 1000))]:
        with suppress(FileExistsError):
            Path("outputs", name).mkdir(parents=True)
            return name
    raise ConfigError("run: 999 runs started in this second; name this one with run=...")


@contextmanager
def process_group(device: str, job: str, timeout: float) -> Iterator[None]:
    """The job's default process group; destroyed on every path. Does nothing without torchrun.

    Keys carry the attempt and the job, so that neither an elastic restart nor the next job of a multirun meets stale
    ones.

    Args:
        timeout: seconds that a collective waits for the other ranks.
    """
    if not is_distributed():
        yield
        return
    import torch.distributed as dist

    choose_device()
    _warn_of_lasting_store()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore(f"syncbn/{job}/attempt{attempt()}", store()),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=timeout),
    )
    try:
        dist.barrier()  # all are connected: none may leave, be it with an error, while another still knocks
        yield
        dist.barrier()  # nor while another still has something to do
    except Exception as error:
        waited = explain_timeout(error, "outside of the training steps") if isinstance(error, RuntimeError) else None
        if waited is not None:
            waited.__cause__ = error
            report_failure(waited)
        # Before the group goes: then the other ranks fail too, and theirs are not the cause.
        if explain(error) is None or isinstance(error, RankError):
            report_failure(error)
        raise
    finally:
        # Without this a gloo job can abort at exit, after all of its work is done; and so it can while anything (a DDP
        # in a reference cycle, say) keeps the group's threads alive until the interpreter goes.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def _warn_of_lasting_store() -> None:
    """What torch 2.13 does with several machines and restarts: one that joins later is never told where the store is.

    It waits for that in the new round of the rendezvous, where nobody writes it again.
    """
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if rank() == 0 and is_elastic() and may_restart and num_nodes() > 1 and agent_keeps_store():
        log.warning(
            "a node that replaces another one will wait for torchrun's store in vain; set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, and name the run (docs/deploy.md)"
        )
