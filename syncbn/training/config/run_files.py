"""The small files in a run directory: whether they can be written, and reading them back. Never imports torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from syncbn.training.config.errors import ConfigError

# What the tasks and the report write, beside Hydra's files, wandb's, and the checkpoints.
_NAMES = ("config.yaml", "environment.json", "metrics.jsonl", "classes.json", "audit.json", "layers.json",
          "summary.json", "report.html")  # fmt: skip


def require_regular_files(run_dir: Path) -> None:
    """Raises a ConfigError if something else is where a task writes its files: a pipe would block it."""
    for name in _NAMES:
        path = run_dir / name
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(f"run: {path} is no regular file; the task writes one there, so remove or rename it")
    directory = run_dir / "checkpoints"
    if os.path.lexists(directory) and not directory.is_dir():
        raise ConfigError(f"run: {directory} is no directory; checkpoints go there, so remove or rename it")


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
