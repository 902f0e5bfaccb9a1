"""Error reporting: one message per error, with the key or the step and the remedy, printed once; and exit codes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from syncbn.atomic_write import WriteError
from syncbn.report import file_names
from syncbn.training.config.errors import ConfigError, RankError, SampleError, TrainingError, one_line, printable
from syncbn.training.config.model import from_data
from syncbn.training.config.output import DISK_ERRORS, short, unwritable
from syncbn.training.config.redaction import redact
from syncbn.training.distributed.world import (
    agent_keeps_store,
    attempt,
    is_alone_so_far,
    is_distributed,
    is_first_on_machine,
    rank,
    store,
    wait_for_rank_0,
    world_size,
)
from syncbn.training.launch.known_keys import known_keys
from syncbn.training.launch.other_names import GROUPS, OPEN, choice_hint, here
from syncbn.training.launch.resolvers import stamped_directories
from syncbn.training.tracking.summary import write_summary

log = logging.getLogger(__name__)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turns a configuration or training error into one message, printed by the first rank that meets it.

    The process exits with code 2 after a mistake in the configuration, and with 1 after a TrainingError, a sample that
    cannot be used, or an error of the disk. Any other exception propagates; if its traceback contains a secret, the
    redacted traceback is printed and the exit code is 1.
    """
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
        if is_alone_so_far() and agent_keeps_store():  # torch has not been imported yet, and all ranks get here
            if is_first_on_machine():
                print(f"error: {redact(message)}", file=sys.stderr, flush=True)
                sys.exit(_exit_code(error))  # torchrun ends the others
            wait_for_rank_0("discarded")
        if _is_first_to_report():
            print(f"error: {redact(message)}", file=sys.stderr, flush=True)
        if rank() == 0:
            _discard_run_directory()
        wait_for_rank_0("discarded")
        sys.exit(_exit_code(error))


_failed_jobs: list[int] = []  # exit codes, in the order of the jobs


@contextmanager
def failing_alone(run_dir: Path, number: int, overrides: Sequence[str]) -> Iterator[None]:
    """Context of one job of a multirun: after a configuration or training error the remaining jobs still run.

    Such an error is raised on all ranks. It is printed, and the job gets a row in the table of the multirun;
    `exit_code_of_jobs` gives its exit code at the end. Other exceptions propagate.

    Args:
        number: position of the job in the multirun.
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
            with suppress(OSError):  # the disk may be full; the error has been printed
                write_summary(run_dir, -1, {}, [redact(override) for override in overrides], failed=redact(message))
        _failed_jobs.append(_exit_code(error))


def exit_code_of_jobs() -> int:
    """Exit code of the first job of a multirun that failed; 0 if none did."""
    return _failed_jobs[0] if _failed_jobs else 0


def _discard_run_directory() -> None:
    """Removes the directory of a run that has not started, which contains only our lock and what Hydra wrote."""
    for directory in stamped_directories():
        if directory.is_dir() and all(path.name in (file_names.HYDRA, file_names.LOCK) for path in directory.iterdir()):
            shutil.rmtree(directory)


def report_failure(error: Exception) -> None:
    """Prints the first failure of a job of several ranks, with its rank, but not its consequences on other ranks.

    Raises:
        SystemExit: always, where there are several ranks; with one rank nothing happens.
    """
    if world_size() > 1:
        if _is_first_to_report():
            message = explain(error)
            if message is not None:
                print(f"error: rank {rank()}: {redact(message)}", file=sys.stderr)
            else:
                print(f"rank {rank()} failed:", file=sys.stderr)
                print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        sys.stderr.flush()
        raise SystemExit(1) from error


def _is_first_to_report(what: str = "") -> bool:
    """Whether no other rank has reported `what` in this attempt: the first to set the store's key reports."""
    if not is_distributed() or world_size() == 1:
        return True
    with suppress(Exception):  # a store that is gone must not hide the message
        return store().compare_set(f"syncbn/reported/{attempt()}/{what}", "", str(rank())).decode() == str(rank())
    return True


def is_of_one_rank(error: BaseException) -> bool:
    """Whether the other ranks do not raise this error too, so that it has to be reported before they notice."""
    return explain(error) is None or isinstance(_root(error), RankError | SampleError | OSError)


def _root(error: BaseException) -> ConfigError | TrainingError | OSError | None:
    """The configuration error, training error or error of the disk behind an exception; None if there is none."""
    cause: BaseException | None = error
    while cause is not None:  # OmegaConf wraps what a resolver raises
        if isinstance(cause, ConfigError | TrainingError | WriteError):
            return cause
        if isinstance(cause, OSError) and (cause.errno in DISK_ERRORS or _names_a_file(cause)):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _names_a_file(error: OSError) -> bool:
    """Whether this is the refusal of a file or directory."""
    return isinstance(error, PermissionError) and isinstance(error.filename, str | os.PathLike)


def _exit_code(error: BaseException) -> int:
    return 1 if isinstance(_root(error), TrainingError | SampleError | OSError) else 2


def explain(error: BaseException) -> str | None:
    """The message for the user about an error of configuration, training or disk; None for any other exception."""
    root = _root(error)
    if isinstance(root, PermissionError) and not isinstance(root, WriteError):
        return f"{printable(short(root.filename))}: permission denied; get the right to read and write there"
    if root is not None:
        return unwritable(root) if isinstance(root, OSError) else str(root)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(str(error.missing_cfg_file), list(error.options))
    if isinstance(error, ConfigCompositionException):
        return _explain_override(error)
    if isinstance(error, OverrideParseException):
        return _explain_syntax(printable(str(error.override)), printable(" ".join(error.message.split())))
    if isinstance(error, TypeError) and (index := re.fullmatch(r"Index '(.*)' \(str\) is not an int", str(error))):
        return f"{printable(index[1])}: stands below a list, which has no keys; give the whole list, KEY=[1,2]"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return one_line(error)
    return None


def _explain_choice(file: str, options: list[str]) -> str:
    """About a choice that its group has not; `file` is what Hydra has looked for, `model/resnet50`."""
    nested = file.rpartition("/")[0]
    group = next((name for name in (*GROUPS, nested) if name and file.startswith(f"{name}/")), nested)
    choice = file.removeprefix(f"{group}/")
    return f"{group}={choice}: no such choice; choose one of {', '.join(options)}{choice_hint(group, choice, options)}"


def _explain_syntax(override: str, reason: str) -> str:
    """About an argument that is none of Hydra's; `reason` is what its parser says."""
    if "missing EQUAL" in reason:
        return f"{override}: expected KEY=VALUE in one word, without spaces around the =; quote a value with spaces"
    reason = re.sub(r" (expecting \{.*\}|See https://\S+ for details)", "", reason)
    return f"{override}: not a valid override, {reason}; quote it for Hydra and for the shell"


def _explain_override(error: ConfigCompositionException) -> str:
    text = one_line(error)
    if several := re.match(r"Ambiguous value for argument '(([^=]*)=(.*?))' 1\.", text):
        return (
            f"{several[1]}: several values; -m starts a job for each of them, and a list is written"
            f" {several[2]}=[{several[3]}]"
        )
    if forced := re.search(r"force-add of config groups is not supported: '\++([^=@]+)", text):
        return f"{forced[1]}: is a group; use {forced[1]}=... without the ++"
    found = re.search(
        r"(?:Could not (override|delete from config\.)|An item is already at|No match for) '([^']*)'", text
    )
    if found is None:
        return text
    verb, key, keys = found.group(1), found.group(2), known_keys()
    appended = re.search(r"use \+[^=]*=(.*?)(?: Key '.*)?$", text)
    value = printable(appended[1]) if appended else None
    if "already at" in text:
        return f"{key}: there is one already; use {key}=... without the +"
    if key in keys and verb != "override":
        return f"{key}: is not there to be removed; leave out ~{key}"
    if key in keys:  # the schema has this key, but for another choice of the group
        group = key.split(".")[0]
        return f"{key}: the chosen {group} has no such key{_owners(key)}; python train.py --cfg job lists those it has"
    group, _, rest = key.partition(".")
    if rest == "_target_" and group in OPEN:
        return f"{key}: belongs to {group}=custom; write {group}=custom {key}={value or '...'}"
    if (below := _OF_RULES.get(key.rpartition(".")[0])) is not None:
        return f"{key}: expected a key below it, {key}.{below}"
    if words := here(key, value):
        return f"{key}: no such key; write {words}"
    if key.startswith("model."):
        own = any(argument in ("model=custom", "model=timm") for argument in sys.argv)
        if not own and (reason := from_data(key)):
            return f"{key}: {reason}"
        return f"{key}: no such key; an argument of a model of your own needs a +, as in +{key}=..."
    near = get_close_matches(key, keys, n=1, cutoff=0.6)
    near += [known for known in keys if known.endswith(f".{key}")]
    return f"{key}: no such key; " + (f"did you mean {near[0]}?" if near else "python train.py --cfg job lists them")


# What a named rule, sub-network, group or transform has at least.
_OF_RULES = {
    "init": "path=FILE",
    "freeze": "match=PATTERN",
    "metrics": "_target_=torchmetrics.NAME",
    "optimizer.groups": "match=PATTERN",
    "data.augment": "_target_=torchvision.transforms.v2.NAME",
}


def _owners(key: str) -> str:
    """The choices of a group that have a key, in words that follow those about the one that has not."""
    from dataclasses import fields

    from syncbn.training.config.schema import SCHEMAS

    group, _, own = key.partition(".")
    owners = [name for name, kind in SCHEMAS.get(group, {}).items() if own in {field.name for field in fields(kind)}]
    return f", only {', '.join(f'{group}={name}' for name in owners)}" if owners else ""
