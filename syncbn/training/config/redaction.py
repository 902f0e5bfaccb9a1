"""Redaction of secrets in everything that is written or shown: logs, checkpoints, run directories, wandb.

Secrets are the values of environment variables that are named like secrets (WANDB_API_KEY), user names and passwords in
URLs, parameters of URLs that are named like secrets, and configuration values whose key is named like a secret.
"""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from typing import Any

HIDDEN = "***"

_WORDS = r"(?:api_?key|secret(?:_?key)?|access_?key|private_?key|token|password|passwd|passphrase|credentials?)"
_NAMES = rf"\w*{_WORDS}"
_ENVIRONMENT = re.compile(rf"(?:.*_)?(?:{_WORDS}|key)", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would blank out ordinary words
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*\\?://?)[^/\s'\"]+@", re.IGNORECASE)
_AS_PARAMETER = re.compile(rf"((?:^|[?&\s.'\"+-]){_NAMES}=)[^&\s'\",\]]+", re.IGNORECASE)
_KEY = re.compile(_NAMES, re.IGNORECASE)
_learned: set[str] = set()  # values of configuration keys that are named like secrets


def redact(text: str) -> str:
    """Replaces the secrets in a text by `HIDDEN`."""
    for value in sorted(_learned | _environment_values(), key=len, reverse=True):  # one may contain another
        text = text.replace(value, HIDDEN)
    return _AS_PARAMETER.sub(rf"\1{HIDDEN}", _IN_URL.sub(rf"\1{HIDDEN}@", text))


def redacted(value: Any, key: str = "") -> Any:
    """Copies a configuration (nested dicts and lists) with its secrets replaced by `HIDDEN`."""
    if isinstance(value, dict):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if _KEY.fullmatch(key) else redact(value)


def is_redacted(value: object) -> bool:
    """Whether a secret in this value has been replaced by `HIDDEN`."""
    return isinstance(value, str) and HIDDEN in value


def learn(config: Any, key: str = "") -> None:
    """Registers the configuration's values under secret-like keys; `redact` replaces them from then on."""
    if isinstance(config, dict):
        for name, item in config.items():
            learn(item, str(name))
    elif isinstance(config, list):
        for item in config:
            learn(item, key)
    elif isinstance(config, str) and _KEY.fullmatch(key) and len(config) >= _SHORTEST and "${" not in config:
        _learned.add(config)


@cache
def _environment_values() -> frozenset[str]:
    values = {value for name, value in os.environ.items() if _ENVIRONMENT.fullmatch(name) and len(value) >= _SHORTEST}
    # A variable such as SSH_KEY=/home/... holds a path, which is not secret.
    return frozenset(value for value in values if not os.path.exists(value))


class RedactingFilter(logging.Filter):
    """A logging filter that redacts secrets in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redacts the formatted message; drops no record."""
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def guard_logging() -> None:
    """Adds a `RedactingFilter` to every present handler of the root logger that has none."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(present, RedactingFilter) for present in handler.filters):
            handler.addFilter(RedactingFilter())
