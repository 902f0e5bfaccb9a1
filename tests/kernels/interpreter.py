"""Triton's interpreter, with less to do: it spends two fifths of its time on preparing what is prepared already.

At each launch it replaces the functions of `triton.language` by such as compute, and puts them back afterwards. It does
so again whenever a program calls a function of its own, a thousand times in a launch with small tiles, when nothing is
left to be replaced. After `prepare_once_per_launch()` it prepares each module once per launch.
"""

import functools
from types import ModuleType


def prepare_once_per_launch() -> None:
    """Changes the interpreter of this process. A version of Triton that does this in another way is left as it is."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare = getattr(interpreter, "_patch_lang", None)
    scope_class = getattr(interpreter, "_LangPatchScope", None)
    if prepare is None or scope_class is None or hasattr(prepare, "__wrapped__"):
        return
    prepared: set[frozenset[str]] = set()  # in the launch that runs: names of the modules that a function sees

    @functools.wraps(prepare)
    def prepare_first(function):
        seen = frozenset(value.__name__ for value in function.__globals__.values() if _is_language(value))
        if seen in prepared:
            return scope_class()
        scope, is_launch = prepare(function), not prepared
        prepared.add(seen)
        if is_launch:
            restore = scope.restore
            scope.restore = lambda: (prepared.clear(), restore())
        return scope

    interpreter._patch_lang = prepare_first


def _is_language(value: object) -> bool:
    return isinstance(value, ModuleType) and value.__name__.startswith("triton.language")
