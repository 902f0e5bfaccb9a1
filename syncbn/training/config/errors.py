"""Errors that are all that a user sees, and checks that raise them. Never imports torch, as `config` does not."""

from __future__ import annotations

from collections.abc import Sequence

from syncbn.training.config.duration import Duration


class ConfigError(ValueError):
    """A mistake in the configuration; the message names the key and the remedy, and is all that a user sees."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and is all that a user sees."""


class RankError(TrainingError):
    """What one rank alone has met; the others learn of it because it is gone."""


def require(condition: bool, key: str, expected: str, got: object) -> None:
    """Raises a ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got!r}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises a ConfigError unless the value is one of the choices."""
    require(value in choices, key, f"one of {', '.join(choices)}", value)


def parse_duration(key: str, text: str | int | float, *, minutes: bool = False) -> Duration:
    """A `Duration`, or a ConfigError that names the key."""
    try:
        return Duration.parse(text, allow_minutes=minutes)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names and how many more there are: "a, b, c and 7 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: str) -> str:
    """The text on one line that no terminal takes for commands."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
