"""Redaction of secrets in everything that is written or shown: logs, checkpoints, run directories, wandb.

Secrets are the values of environment variables that are named like secrets (WANDB_API_KEY), user names and passwords in
URLs, parameters of URLs that are named like secrets, credentials of HTTP (`Bearer ...`, `Basic ...`), and configuration
values whose key, or a key above it, is named like a secret.
"""

from __future__ import annotations

import base64
import logging
import os
import re
from functools import cache
from typing import Any

HIDDEN = "***"

# Ends of names, as in `github_token`, `X-Api-Key` and `clientSecret`.
_PASSWORDS = (
    r"(?:api|access|private|secret|signing|encryption|account|ssh)[_-]?keys?|secrets?|passwords?|passwd|pwd"
    r"|passphrases?|credentials?"
)
_TOKENS = r"tokens?|auth|authorization|bearer|cookies?|jwts?|signatures?"
_WORDS = r"sas|sig"  # as a whole word only: `kansas` is none
# Tokens of a text, which are no secrets: `num_tokens`, `pad_token`.
_OF_TEXT = r"(?:num|max|min|cls|mask|pad|bos|eos|sep|unk)"
_NAMES = (
    rf"(?!(?:[\w-]*[_-])?{_OF_TEXT}(?:[_-][\w-]*)?[_-]?tokens?\b)"
    rf"(?:[\w-]*(?:{_PASSWORDS}|{_TOKENS})|(?:[\w-]*[_-])?(?:{_WORDS})|pass)"
)
_KEY = re.compile(_NAMES, re.IGNORECASE)
_PASSWORD_KEY = re.compile(rf"[\w-]*(?:{_PASSWORDS})|pass", re.IGNORECASE)
_ENVIRONMENT = re.compile(rf"(?!PWD$)(?:.*_)?(?:{_PASSWORDS}|{_TOKENS}|{_WORDS}|key)", re.IGNORECASE)
_SHORTEST = 8  # a shorter value would blank out ordinary words

_VALUE = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\[[^\]]*\]?|\{[^}]*\}?"  # quoted, a list, a dictionary
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*\\?://?)[^/\s'\"]+@", re.IGNORECASE)
_AS_PARAMETER = re.compile(rf"((?:^|[?&\s.'\"+])({_NAMES})=)({_VALUE}|[^&\s'\",\]]+)", re.IGNORECASE)
_IN_BRACES = re.compile(rf"([{{,]\s*['\"]?({_NAMES})['\"]?\s*:\s*)({_VALUE}|[^,}}'\"]+)", re.IGNORECASE)
_IN_HEADER = re.compile(
    r"(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer|basic|digest|token)\s+|^bearer\s+(?=\S+$))[^\s'\",}]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bbearer\s+)(?=\S*\d|\S{20})[\w.~+/=-]{8,}", re.IGNORECASE)
_BASIC = re.compile(r"(\bbasic\s+)([a-z0-9+/]{4,}={0,2})", re.IGNORECASE)
_NO_SECRETS = ("true", "false", "null", "none", "")
_learned: set[str] = set()  # values of configuration keys that are named like secrets


def redact(text: str) -> str:
    """Replaces the secrets in a text by `HIDDEN`."""
    for value in sorted(_learned | _environment_values(), key=len, reverse=True):  # one may contain another
        text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    for named in (_AS_PARAMETER, _IN_BRACES):
        text = named.sub(_without_value, text)
    for header in (_IN_HEADER, _BEARER):
        text = header.sub(rf"\1{HIDDEN}", text)
    return _BASIC.sub(_without_login, text)


def redacted(value: Any, key: str = "") -> Any:
    """Copies a configuration (nested dicts and lists) with its secrets replaced by `HIDDEN`.

    Args:
        key: the dotted key of the value; all that is below a secret-like key is secret, except for the names of code.
    """
    if isinstance(value, dict):
        return {name: redacted(item, _join(key, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted(item, key) for item in value]
    if _is_secret(key, value):
        return HIDDEN
    return redact(value) if isinstance(value, str) else value


def is_redacted(value: object) -> bool:
    """Whether a secret in this value, or in one of a list or dictionary, has been replaced by `HIDDEN`."""
    if isinstance(value, dict):
        return any(is_redacted(item) for item in value.values())
    if isinstance(value, list):
        return any(is_redacted(item) for item in value)
    return isinstance(value, str) and HIDDEN in value


def learn(config: Any, key: str = "") -> None:
    """Registers the configuration's values under secret-like keys; `redact` replaces them from then on."""
    if isinstance(config, dict):
        for name, item in config.items():
            learn(item, _join(key, name))
    elif isinstance(config, list):
        for item in config:
            learn(item, key)
    elif _is_secret(key, config) and len(str(config)) >= _SHORTEST and "${" not in str(config):
        _learned.add(str(config))


def _is_secret(key: str, value: Any) -> bool:
    """Whether the value of a dotted key is secret: text, and numbers below a password's key or of 8 digits and more."""
    names = key.split(".")
    if names[-1] == "_target_" or not any(_KEY.fullmatch(name) for name in names):
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return isinstance(value, str)
    return len(str(value)) >= _SHORTEST or any(_PASSWORD_KEY.fullmatch(name) for name in names)


def _without_value(found: re.Match[str]) -> str:
    """What a parameter or entry with a secret's name becomes; unchanged where its value is no secret."""
    start, name, value = found.groups()
    is_count = value.strip().isdecimal() and len(value.strip()) < _SHORTEST and not _PASSWORD_KEY.fullmatch(name)
    if is_count or value.strip().lower() in _NO_SECRETS:
        return found[0]
    quote = value[0] if value[0] in "'\"" else ""
    return f"{start}{quote}{HIDDEN}{quote}"


def _without_login(found: re.Match[str]) -> str:
    """`Basic` and what follows it; hidden where that is a user name and a password in base64."""
    try:
        is_login = b":" in base64.b64decode(found[2], validate=True)
    except ValueError:
        is_login = False
    return f"{found[1]}{HIDDEN}" if is_login else found[0]


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


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
