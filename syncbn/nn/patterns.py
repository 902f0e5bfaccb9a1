"""Selection of modules by name: the patterns that `match` and `exclude` take everywhere in the package.

A pattern is a shell glob over dotted module names, in which `*` also crosses dots. A name without a wildcard selects
that module and everything below it. Wrappers do not appear in names: there is no `module.` of DDP and no `_orig_mod.`
of `torch.compile`.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.optim.swa_utils import AveragedModel

from syncbn.torch_compat import is_compiled

Patterns = str | Sequence[str]

_WRAPPERS: dict[type, str] = {
    nn.parallel.DistributedDataParallel: "module",
    nn.DataParallel: "module",
    AveragedModel: "module",
}


def _wrapped_child(module: nn.Module) -> str | None:
    if is_compiled(module):
        return "_orig_mod"
    own = getattr(type(module), "wrapped_child", None)  # declared by the trainer's wrappers
    return next((child for kind, child in _WRAPPERS.items() if isinstance(module, kind)), own)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside of any wrappers; `module` itself if there are none."""
    while (child := _wrapped_child(module)) is not None:
        module = getattr(module, child)
    return module


def named_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields `module` and every module below it with its name without wrappers; a module in two places comes twice."""
    child_of_wrapper = _wrapped_child(module)
    if child_of_wrapper is not None:
        yield from named_modules(getattr(module, child_of_wrapper), prefix)
        return
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def as_tuple(patterns: Patterns | None) -> tuple[str, ...]:
    """One pattern, several, or none (None, "", ()), as a tuple."""
    if not patterns:
        return ()
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern selects a module of that name."""
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern)
    return name == pattern or name.startswith(pattern + ".")


def select(module: nn.Module, match: Patterns = "*", exclude: Patterns | None = ()) -> dict[str, nn.Module]:
    """The modules that are selected by some pattern of `match` and by none of `exclude`, by name, each once.

    Raises:
        ValueError: `match` is empty, or a pattern selects nothing; the message then lists similar names.
    """
    names = dict(named_modules(module))
    for argument, patterns in (("match", as_tuple(match)), ("exclude", as_tuple(exclude))):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"{argument}={pattern!r} selects no module; {_near_misses(pattern, names)}")
    if not as_tuple(match):
        raise ValueError("match: expected at least one pattern, got none")
    # A module in two places goes by its first name, whichever of its names a pattern selects.
    first_names: dict[int, str] = {}
    for name, candidate in names.items():
        first_names.setdefault(id(candidate), name)
    return {
        first_names[id(candidate)]: candidate
        for name, candidate in names.items()
        if any(matches(name, pattern) for pattern in as_tuple(match))
        and not any(matches(name, pattern) for pattern in as_tuple(exclude))
    }


def _near_misses(pattern: str, names: dict[str, nn.Module]) -> str:
    candidates = [name for name in names if name]
    near = get_close_matches(pattern.strip("*."), candidates, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    top = [name for name in candidates if "." not in name]
    return f"the top-level modules are {', '.join(top)}" if top else "the module has no children"
