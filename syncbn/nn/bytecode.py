"""What a function's compiled code says about it, where running it would not tell in time.

Tried on CPython 3.11; instructions change between its versions. Used to foresee whether a converted subclass will reach
a batch normalization (the proof is its first forward), and whether a trace of a forward would be what it does.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those inside of it: comprehensions, lambdas, inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def names_in(code: types.CodeType) -> set[str]:
    """The names that a code object uses, those of comprehensions and inner functions included."""
    return {name for inner in code_objects(code) for name in (*inner.co_names, *inner.co_freevars)}


def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """The instructions of a code object and of those inside of it."""
    for inner in code_objects(code):
        yield from dis.get_instructions(inner)


def has_in_place_operator(code: types.CodeType) -> bool:
    """Whether it holds an operator such as `a += b`."""
    return any(one.opname.startswith("BINARY_OP") and one.argrepr.endswith("=") for one in instructions(code))
