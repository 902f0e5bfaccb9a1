"""Errors that reach the user as one message without a traceback, and checks that raise them. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from syncbn.training.config.duration import Duration

MOST_SECONDS = 1e9


class ConfigError(ValueError):
    """A mistake in the configuration. The message names the key and the remedy; the user sees no traceback."""


class TrainingError(RuntimeError):
    """Training cannot continue. The message gives the reason; the user sees no traceback."""


class RankError(TrainingError):
    """An error on one rank; its peers fail when it exits."""


class SampleError(ConfigError):
    """A sample that cannot be used, met by the rank that reads it; its peers fail when it exits.

    The message names the key, the file, or the split and the index.
    """


@contextmanager
def configured_by(path: Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Context that adds to a ConfigError, which names a key, the file whose stored configuration has that key.

    Args:
        overrides: those of the command line; a key that one of them gives is not the file's.
    """
    try:
        yield
    except ConfigError as error:
        given = {override.lstrip("+~").partition("=")[0] for override in overrides}
        if str(path) in str(error) or str(error).partition(":")[0] in given:
            raise
        raise ConfigError(f"{error} (by the configuration in {path})") from None


def require(condition: bool, key: str, expected: str, got: object) -> None:
    """Raises a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ConfigError unless the value is one of the choices."""
    require(value in choices, key, f"one of {', '.join(choices)}", value)


def require_seconds(key: str, value: float) -> None:
    """Raises a ConfigError unless the value is a time to wait; threads cannot wait for 300 years, nor for ever."""
    require(0 < value <= MOST_SECONDS, key, f"a number of seconds above 0, {MOST_SECONDS:g} at most", value)


def parse_duration(key: str, text: str | int | float, *, minutes: bool = False) -> Duration:
    """Parses a `Duration`; raises a ConfigError that names the key if the text is none."""
    try:
        return Duration.parse(text, allow_minutes=minutes)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def listed(names: Sequence[str], most: int = 5) -> str:
    """Joins the first `most` names and counts the rest: "a, b, c and 7 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(error: BaseException) -> str:
    """The message of an exception without its line breaks; the name of its type if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """The text with line breaks, terminal escapes and other unprintable characters written as backslash escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
