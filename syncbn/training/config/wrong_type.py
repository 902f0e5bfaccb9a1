"""The message about a value of another type than its key has."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

# Types of the schema that say little to who has not read it.
_IN_WORDS = {"dict[str, InitConfig]": "sub-networks by name, as in init.backbone.path=FILE",
             "dict[str, FreezeRuleConfig]": "rules by name, as in freeze.NAME.match=PATTERN",
             "dict[str, GroupConfig]": "groups by name, as in optimizer.groups.NAME.match=PATTERN"}  # fmt: skip


def wrong_type(key: str, expected: str, value: Any, nested: type | None) -> str:
    """The message for a user.

    Args:
        expected: the type as the schema spells it.
        nested: the schema of the keys below this one; None for a key that has a value.
    """
    if nested is not None:
        names = [f"{key}.{field.name}" for field in fields(nested)]
        return f"{key}: expected its keys, {', '.join(names)}, got {value!r}"
    hint = f"; a list is written {key}=[{value}]" if "list[" in expected and isinstance(value, str) else ""
    return f"{key}: expected {_IN_WORDS.get(expected, expected)}, got {value!r}{hint}"
