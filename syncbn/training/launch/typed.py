"""Overrides as they were typed: Hydra hands those of a sweep on in words of its own, 1e-4 as 0.0001."""

from __future__ import annotations

from collections.abc import Sequence


def as_typed(overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The overrides of a job in the words of the command line; those that it does not have are returned as they are.

    Args:
        overrides: as Hydra has composed them, without plus signs.
        arguments: the command line.
    """
    words = {key: word for argument in arguments for key, word in _words(argument)}
    return [words.get(override, override) for override in overrides]


def _words(argument: str) -> list[tuple[str, str]]:
    """An override of the command line, or each of its sweep, as Hydra and as the user writes it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    key, equals, typed = argument.partition("=")
    if argument.startswith("-") or not equals:
        return []
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return []
    name = override.get_key_element().lstrip("+")
    if not override.is_sweep_override():
        return [(f"{name}={override.get_value_element_as_str()}", argument)]
    if override.value_type != ValueType.SIMPLE_CHOICE_SWEEP:
        return []
    values, pieces = list(override.sweep_string_iterator()), _pieces(typed)
    if len(values) != len(pieces):
        return []
    return [(f"{name}={value}", f"{key}={piece}") for value, piece in zip(values, pieces, strict=True)]


def _pieces(text: str) -> list[str]:
    """The values of `a,[b,c],'d,e'`: cut at commas outside of brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += letter
    return [piece.strip() for piece in pieces]
