"""Names of pretrained weights: from those of a file to those of the sub-network that they are loaded into."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches

from torch import Tensor

from syncbn.nn.patterns import matches
from syncbn.training.checkpoint.contents import clipped
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.model import InitConfig

Weights = Mapping[str, Tensor]
WHOLE = "model"  # init.model is the whole model
MOST_PARTS = 32  # of the end of a name that are compared: endings of all lengths grow as the square of their number


def renamed(weights: Weights, name: str, config: InitConfig, own: Collection[str]) -> dict[str, Tensor]:
    """The weights below `prefix`, which is cut off, under the names that `rename` gives them.

    Args:
        name: the sub-network. Without a prefix in the configuration it is `name.` or none, whichever fits more of `own`
            in the end.
        own: the names that the sub-network has.

    Raises:
        ConfigError: no name begins with the prefix, or with one of those to rename; two names become one.
    """
    if config.prefix is not None:
        prefix = config.prefix if config.prefix.endswith(".") or not config.prefix else f"{config.prefix}."
        return _renamed(_below(weights, prefix, name, config), name, config)
    # The file holds the sub-network alone, or a whole model in which it has the same name.
    inside = {k.removeprefix(f"{name}."): value for k, value in weights.items() if k.startswith(f"{name}.")}
    own_names = set(own)
    fits = {id(state): len({_new_name(k, config.rename) for k in state} & own_names) for state in (weights, inside)}
    return _renamed(max(weights, inside, key=lambda state: fits[id(state)]), name, config)


def _below(weights: Weights, prefix: str, name: str, config: InitConfig) -> dict[str, Tensor]:
    found = {k.removeprefix(prefix): value for k, value in weights.items() if k.startswith(prefix)}
    if not found:
        raise ConfigError(
            f"init.{name}.prefix: no key of {config.path} begins with {config.prefix!r}; they begin with"
            f" {_beginnings(weights)}"
        )
    return found


def _renamed(weights: Weights, name: str, config: InitConfig) -> dict[str, Tensor]:
    for old in config.rename:
        if not any(_begins_with(k, old) for k in weights):
            raise ConfigError(
                f"init.{name}.rename: no key of {config.path} begins with {old!r}; they begin with"
                f" {_beginnings(weights)}"
            )
    result: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for old, value in weights.items():
        new = _new_name(old, config.rename)
        if new in result:
            raise ConfigError(
                f"init.{name}.rename: gives {clipped(origins[new])} and {clipped(old)} of {config.path}"
                f" the one name {clipped(new)}; rename one of them otherwise"
            )
        result[new], origins[new] = value, old
    return result


def _new_name(name: str, rename: Mapping[str, str]) -> str:
    """The name with the longest of its old prefixes exchanged, once."""
    old = max((prefix for prefix in rename if _begins_with(name, prefix)), key=len, default=None)
    if old is None:
        return name
    rest = name[len(old.removesuffix(".")) :].removeprefix(".")
    return ".".join(part for part in (rename[old].removesuffix("."), rest) if part)


def _begins_with(name: str, prefix: str) -> bool:
    """Whether the name is the prefix, or below it; a prefix may end with its dot, and a dot alone is above all."""
    prefix = prefix.removesuffix(".")
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _beginnings(weights: Weights) -> str:
    return listed(sorted({clipped(k.split(".")[0]) + "." for k in weights}), 3)


def skipped(state: Weights, own: Weights, name: str, config: InitConfig) -> set[str]:
    """The names, of the file or of the sub-network, that `skip` selects.

    A pattern selects by the name in the model (`backbone.stem`) or in the sub-network (`stem`).

    Raises:
        ConfigError: a pattern that selects nothing.
    """
    names = [*own, *(k for k in state if k not in own)]

    def selects(pattern: str, key: str) -> bool:
        return matches(key, pattern) or (name != WHOLE and matches(f"{name}.{key}", pattern))

    patterns = [config.skip] if isinstance(config.skip, str) else config.skip or []
    for pattern in patterns:
        if not any(selects(pattern, key) for key in names):
            modules = dict.fromkeys(above for key in names for above in _modules_of(key))
            near = get_close_matches(pattern.strip("*."), modules, n=3, cutoff=0.5)
            meant = " or ".join(map(clipped, near))
            hint = f"did you mean {meant}?" if near else f"there are {listed([*modules])}"
            raise ConfigError(f"init.{name}.skip: {pattern!r} is neither in the model nor in {config.path}; {hint}")
    return {key for key in names if any(selects(pattern, key) for pattern in patterns)}


def _modules_of(key: str) -> Iterator[str]:
    """The modules above a tensor, outermost first."""
    parts = key.split(".")
    yield from (".".join(parts[:depth]) for depth in range(1, len(parts)))


def nearest(state: Weights, own: Weights, name: str, config: InitConfig) -> str:
    """In words, the names of the state nearest to those of the sub-network, and the key that would make them fit.

    Nearest is the tensor of the same shape whose name ends alike the longest; without one, the name spelled alike.
    """
    by_ending: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in state:
        parts = key.split(".")[-MOST_PARTS:]
        for start in range(len(parts)):
            by_ending[tuple(parts[start:])].append(key)
    pairs: list[tuple[str, str]] = []
    prefixes: Counter[tuple[str, str]] = Counter()
    for key in own:
        parts = key.split(".")[-MOST_PARTS:]
        for start in range(len(parts)):
            alike = (k for k in by_ending[tuple(parts[start:])] if state[k].shape == own[key].shape)
            if (found := next(alike, None)) is not None:
                pairs.append((found, key))
                ending = ".".join(parts[start:])
                prefixes[tuple(k.removesuffix(ending).removesuffix(".") for k in (found, key))] += 1  # type: ignore[index]
                break
    if not pairs:
        pairs = [(near, key) for key in own for near in get_close_matches(key, state, n=1)]
    words = [f"{clipped(theirs)} for {clipped(mine)}" for theirs, mine in pairs if theirs != mine]
    hint = f"; the nearest names: {listed(words, 3)}" if words else ""
    if prefixes and config.prefix is None and not config.rename:
        (old, new), count = prefixes.most_common(1)[0]
        if 2 * count > len(own):
            option = f"prefix={old}" if not new else f"rename={{{_spelled(old)}: {_spelled(new)}}}"
            hint += f" (init.{name}.{option})"
    return hint


def _spelled(prefix: str) -> str:
    """A prefix as the command line takes it; it has no empty keys, a dot means the same."""
    return clipped(prefix) or "."
