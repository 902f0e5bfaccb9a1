"""Every key of the schema, as candidates for suggestions."""

from __future__ import annotations

from typing import Any


def known_keys() -> list[str]:
    """Every dotted key of the schema, as candidates for suggestions."""
    from dataclasses import fields

    from syncbn.training.config.parsing import NESTED
    from syncbn.training.config.schema import SCHEMAS, Config

    groups: dict[str, list[type[Any]]] = {name: list(choices.values()) for name, choices in SCHEMAS.items()}
    groups |= {field.name: [NESTED[str(field.type)]] for field in fields(Config) if str(field.type) in NESTED}
    keys = [field.name for field in fields(Config)]
    return keys + sorted(
        {f"{group}.{f.name}" for group, kinds in groups.items() for kind in kinds for f in fields(kind)}
    )
