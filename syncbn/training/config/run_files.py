"""The small files in a run directory: whether they can be written, and reading them back. Never imports torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from syncbn.report import file_names
from syncbn.training.config.errors import ConfigError

# What is written into a run directory, or a multirun's.
_FILES = (
    file_names.CONFIG, file_names.ENVIRONMENT, file_names.METRICS, file_names.CLASSES, file_names.AUDIT,
    file_names.LAYERS, file_names.NONFINITE, file_names.CHECK, file_names.PARITY, file_names.PREDICTIONS,
    file_names.SUMMARY, file_names.MISTAKES, file_names.REPORT, file_names.RECALIBRATED, file_names.LOCK,
    file_names.MULTIRUN,
)  # fmt: skip
_LOGS = "train*.log"
_DIRECTORIES = (
    file_names.HYDRA, file_names.CHECKPOINTS, file_names.EXPORT, file_names.MASKS, file_names.PROFILE,
    file_names.TENSORBOARD, file_names.WANDB,
)  # fmt: skip


def require_regular_files(run_dir: Path) -> None:
    """Checks that nothing in a run directory leads what is written there to another place, or blocks it, as a pipe.

    Raises:
        ConfigError: a link, or anything but a file or directory, has a name that is written to.
    """
    for path in (*(run_dir / name for name in _FILES), *run_dir.glob(_LOGS)):
        if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
            raise ConfigError(f"run: {path} is no regular file; the task writes one there, so remove or rename it")
    for name in _DIRECTORIES:
        path = run_dir / name
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise ConfigError(f"run: {path} is no directory; the task writes into one there, so remove or rename it")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else that is no JSON to read; the message continues "<file> ...".
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ValueError("is no regular file")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("is damaged, it is no JSON") from None
