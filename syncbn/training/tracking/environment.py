"""The environment of a run, for the tracker and the report: command, commit, versions, devices and hosts."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from syncbn.training.config.redaction import redact
from syncbn.training.distributed import world
from syncbn.training.distributed.rank_context import RankContext

_PACKAGES = ("syncbn", "torch", "hydra-core", "wandb", "torchmetrics")


def describe(context: RankContext, overrides: Sequence[str]) -> dict[str, Any]:
    """Rank 0's environment and the ranks per host; empty on other ranks. A collective: every rank has to call it."""
    hosts = world.on_all_ranks(platform.node())
    if not context.is_first:
        return {}
    return {
        "command": " ".join(["train.py", *map(redact, overrides)]),
        "commit": _commit(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "device": torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else _processor(),
        "cuda": torch.version.cuda if context.device.type == "cuda" else None,
        "threads_per_rank": torch.get_num_threads(),
        "ranks": context.world_size,
        "hosts": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _commit() -> str | None:
    """The abbreviated commit of the running code, with a + if files differ from it; None outside of a checkout."""
    code = Path(sys.modules["syncbn"].__file__ or "")
    with suppress(OSError, subprocess.SubprocessError):
        _git("ls-files", "--error-unmatch", code.name, at=code.parent)  # fails in another project's checkout
        return _git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*", at=code.parent)
    return None


def _git(*arguments: str, at: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=at, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
