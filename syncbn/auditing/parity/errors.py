"""The error of a comparison that could not be made."""

from __future__ import annotations


class ParityError(RuntimeError):
    """Nothing can be said about the model; one line that names the reason and the remedy."""


def type_and_message(error: BaseException) -> str:
    """Type and message of an exception in one line of at most 300 characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return text if len(text) <= 300 else text[:297] + "..."
