"""What has to happen before, around and after a job: ranks, run directory, process group, and errors that read well.

Imports torch only where a rank has to talk to the others, so that `train.py --cfg job` stays quick.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.config import ConfigError, TrainingError
from syncbn.training.redaction import redact
from syncbn.training.sweep import write_summary

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

_STORE_TIMEOUT = timedelta(seconds=60)
_KEPT = re.compile(r"(task|load|run|resume|device|tracker(\.\w+)?|hydra[./].*)=")
_OPEN_DICTS = re.compile(r"(?:freeze|init)\.[^=.]+\.[^=]+=.*", re.DOTALL)


def rank() -> int:
    """This process's rank in the job; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of ranks of the job; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def attempt() -> str:
    """How often torchrun has restarted the job."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def is_distributed() -> bool:
    """Whether torchrun (or anything else that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare() -> None:
    """Everything that must be in place before Hydra starts: resolvers, and overrides in the form that it wants."""
    # Hydra then raises its errors instead of printing them, and `clear_errors` can say what to do.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.path.append(os.getcwd())  # a user's own modules, as `python -m` would find them
    sys.argv[1:] = _hold_back([open_override(argument) for argument in sys.argv[1:]])
    register_resolvers()


_held_back: list[str] = []


def _hold_back(arguments: list[str]) -> list[str]:
    """Keeps from Hydra what a task with `load` applies to the stored configuration, in which the keys may be others."""
    if not any(argument.startswith("task=") and argument != "task=train" for argument in arguments):
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
    OmegaConf.register_new_resolver("syncbn.console_level", lambda: "INFO" if rank() == 0 else "ERROR", replace=True)


def open_override(argument: str) -> str:
    """`freeze.mine.match=x` as `++freeze.mine.match=x`: named rules need no declaration."""
    return f"++{argument}" if _OPEN_DICTS.fullmatch(argument) else argument


def _run_name(run: str | None) -> str:
    """The directory name under outputs/: `run`, or a time stamp that all ranks agree on."""
    if run is None:
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


_agreed: dict[str, str] = {}


def agree(key: str, propose: Callable[[], str]) -> str:
    """What rank 0 proposes, on every rank, and the same again however often it is asked.

    After an elastic restart too, because torchrun's store outlives the ranks.
    """
    if key not in _agreed:
        if is_distributed():
            name = f"syncbn/{key}"
            if rank() == 0 and not store().check([name]):
                store().set(name, propose())
            _agreed[key] = store().get(name).decode()
        else:
            _agreed[key] = propose()
    return _agreed[key]


@cache
def store() -> Store:
    """The job's key-value store: the one that torchrun's agent keeps, else one that rank 0 hosts."""
    from torch.distributed import TCPStore

    agent_hosts_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size(),
        is_master=rank() == 0 and not agent_hosts_it,
        timeout=_STORE_TIMEOUT,
    )


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

    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size()):  # one machine: nobody else has to reach these ranks
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        if loopback is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
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
            _report_failure(waited)
        if explain(error) is None:  # before the group goes: then the other ranks fail too, and theirs are not the cause
            _report_failure(error)
        raise
    finally:
        # Without this a gloo job can abort at exit, after all of its work is done; and so it can while anything (a DDP
        # in a reference cycle, say) keeps the group's threads alive until the interpreter goes.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def on_all_ranks(value: T) -> list[T]:
    """What each rank says, on every rank, in the order of ranks; values that pickle."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns mistakes in the configuration into one message and exit code 2, printed by the first rank that meets it."""
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None:
            shown = "".join(traceback.format_exception(error))
            if redact(shown) == shown:
                raise
            print(redact(shown), end="", file=sys.stderr, flush=True)
            sys.exit(1)
        if _is_first_to_report():
            print(f"error: {redact(message)}", file=sys.stderr, flush=True)
        if rank() == 0:
            _discard_run_directory()
        sys.exit(1 if isinstance(error, TrainingError) else 2)


_failed_jobs: list[int] = []


@contextmanager
def failing_alone(run_dir: Path, number: int, overrides: Sequence[str]) -> Iterator[None]:
    """Around one job of a multirun: the other jobs go on after a mistake or failure that all ranks know of.

    It is printed and gets its row in the table; the exit code comes at the end, from `exit_code_of_jobs`.
    """
    try:
        yield
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        if _is_first_to_report(f"job{number}"):
            print(f"error in job {number}: {redact(message)}", file=sys.stderr, flush=True)
        if rank() == 0:
            write_summary(run_dir, -1, {}, [redact(override) for override in overrides], failed=redact(message))
        _failed_jobs.append(1 if isinstance(error, TrainingError) else 2)


def exit_code_of_jobs() -> int:
    """0, or that of the first job of a multirun that failed."""
    return _failed_jobs[0] if _failed_jobs else 0


def _discard_run_directory() -> None:
    """Removes the directory of a run that has not begun: nothing in it but what Hydra wrote."""
    if "run_name" in _agreed:
        directory = Path("outputs", _agreed["run_name"])
        if directory.is_dir() and all(path.name == ".hydra" for path in directory.iterdir()):
            shutil.rmtree(directory)


def explain_timeout(error: RuntimeError, where: str) -> RuntimeError | None:
    """A collective that waited in vain, as an error that says where, and for which ranks; None for another error.

    Ranks that gave up say so in the store; who has not come there soon after is what the others have waited for.
    """
    if not is_distributed() or not re.search(r"[Tt]imed out", str(error)):
        return None
    missing = []
    with suppress(Exception):  # a store that is gone must not hide the message
        prefix = f"syncbn/timed_out/{attempt()}/"
        store().set(f"{prefix}{rank()}", "")
        for other in range(world_size()):
            try:
                store().wait([f"{prefix}{other}"], timedelta(seconds=1))
            except Exception:
                missing.append(other)
    for_whom = f" for rank {', '.join(map(str, missing))}" if missing else ""
    return RuntimeError(
        f"{where}: rank {rank()} waited{for_whom} in a collective for longer than collective_timeout allows"
    )


def _report_failure(error: Exception) -> None:
    """Prints the first failure of a job with its rank; what it brings about on the other ranks is not printed."""
    if world_size() > 1:
        if _is_first_to_report():
            print(f"rank {rank()} failed:", file=sys.stderr)
            print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(1) from error


def _is_first_to_report(what: str = "") -> bool:
    if not is_distributed() or world_size() == 1:
        return True
    with suppress(Exception):  # a store that is gone must not hide the message
        return store().compare_set(f"syncbn/reported/{attempt()}/{what}", "", str(rank())).decode() == str(rank())
    return True


def explain(error: BaseException) -> str | None:
    """What a user should read about a mistake in the configuration, or training at its end; None for another error."""
    cause: BaseException | None = error
    while cause is not None:  # OmegaConf wraps what a resolver raises
        if isinstance(cause, ConfigError | TrainingError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={choice}: no such choice; choose one of {', '.join(error.options)}"
    if isinstance(error, ConfigCompositionException):
        return _explain_override(error)
    if isinstance(error, OverrideParseException):
        reason = " ".join(error.message.split())
        return f"{error.override}: not a valid override, {reason}; quote it for Hydra and for the shell"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return " ".join(str(error).split())
    return None


def _explain_override(error: ConfigCompositionException) -> str:
    text = " ".join(str(error).split())
    found = re.search(r"Could not override '([^']+)'", text)
    if found is None:
        return text
    key, keys = found.group(1), known_keys()
    if key in keys:  # of another choice of the group, since this one does not have it
        group = key.split(".")[0]
        return (
            f"{key}: the chosen {group} has no such key; choose another {group}=..., or see python train.py --cfg job"
        )
    if key.startswith("model."):
        return f"{key}: no such key; an argument of a model of your own needs a +, as in +{key}=..."
    near = get_close_matches(key, keys, n=1, cutoff=0.6)
    near += [known for known in keys if known.endswith(f".{key}")]
    return f"{key}: no such key; " + (f"did you mean {near[0]}?" if near else "python train.py --cfg job lists them")


def known_keys() -> list[str]:
    """Every dotted key of the schema, to suggest from."""
    from dataclasses import fields

    from syncbn.training.config import SCHEMAS, BnConfig, Config, SaveConfig, TrackerConfig

    groups: dict[str, list[type[Any]]] = {name: list(choices.values()) for name, choices in SCHEMAS.items()}
    groups |= {"save": [SaveConfig], "bn": [BnConfig], "tracker": [TrackerConfig]}
    keys = [field.name for field in fields(Config)]
    return keys + sorted(
        {f"{group}.{f.name}" for group, kinds in groups.items() for kind in kinds for f in fields(kind)}
    )
