"""Static inspection of a function's bytecode, for questions that running it would answer too late.

Tested with CPython 3.11; instructions change between versions. Used to predict whether a converted subclass will call a
batch normalization (its first forward is the proof), and whether a trace of a forward would reproduce it.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields a code object and those nested in it: comprehensions, lambdas, inner functions."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def names_in(code: types.CodeType) -> set[str]:
    """The global, attribute and free-variable names that a code object and those nested in it use."""
    return {name for inner in code_objects(code) for name in (*inner.co_names, *inner.co_freevars)}


def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yields the instructions of a code object and of those nested in it."""
    for inner in code_objects(code):
        yield from dis.get_instructions(inner)


def has_in_place_operator(code: types.CodeType) -> bool:
    """Whether the code contains an in-place operator such as `a += b`."""
    return any(one.opname.startswith("BINARY_OP") and one.argrepr.endswith("=") for one in instructions(code))
