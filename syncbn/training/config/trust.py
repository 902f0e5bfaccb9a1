"""Trust: the code that a stored configuration may name. A file is data; this clone and this command are code.

A `_target_` in a stored configuration, nested or not, is called only if

* it stands in this clone's `configs/` at the same key, and the node has no keys but those of that file, with the same
  values, numbers or plain names (no path and no address, from which a target could load something else);
* this command composes it, or gives it, at the same key; or
* `trust` names it, exactly or as `package.*`, which stands for what is defined in that package.

`_args_` and `_partial_` change how a target is called, and interpolations read this machine's environment: neither is
taken from a file unless this command has the same at the same key. This clone's `configs/` are those beside the package
`syncbn`. Hydra's search path is not asked: `--config-dir`, `--config-path` and `hydra.searchpath` may add to it or
replace it, and what lies there counts where this command composes it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from syncbn.training.config.errors import ConfigError, printable
from syncbn.training.config.instantiate import is_defined_in
from syncbn.training.config.redaction import redacted

CONFIGS = Path(__file__).parents[3] / "configs"
_TARGET = "_target_"
_CALL = ("_args_", "_partial_")
_NAME = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_ABSENT = object()

Key = tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """The code that this command allows.

    Attributes:
        composed: its configuration, as plain containers.
        trust: the names that its `trust` gives.
        replaced: nested values that its overrides put in the place of those of the file.
    """

    composed: Mapping[str, Any]
    trust: Sequence[str] = ()
    replaced: Mapping[str, Any] = field(default_factory=dict)

    def gives(self, key: Key, value: Any) -> bool:
        """Whether this command has the same value at this key, or replaces the file's."""
        own = _at(self.composed, key)
        return _is_replaced(self.replaced, key) or any(
            _is_same(one, value) for one in (own, redacted(own, ".".join(key)))
        )

    def trusts(self, name: str) -> bool:
        """Whether `trust` names this target."""
        packages = [entry.removesuffix(".*") for entry in self.trust if entry.endswith(".*")]
        return name in self.trust or any(
            name.startswith(f"{package}.") and is_defined_in(name, package) for package in packages
        )


def check_stored(stored: Mapping[Any, Any], key: str, path: Path, command: Command) -> None:
    """Checks the code that a stored configuration names, before anything of it is imported, resolved or built.

    Args:
        stored: the configuration as the file holds it.
        key: the configuration key that the file comes from, for the message.
        path: the file, for the message.

    Raises:
        ConfigError: the file names code that neither this clone nor this command does. The message lists all of it, and
            the words to append to the command.
    """
    targets: dict[str, str] = {}
    refused: dict[str, Any] = {}
    for where, value, parent in _walk(stored):
        is_interpolation = isinstance(value, str) and "${" in value
        if (not (where and where[-1] in (_TARGET, *_CALL)) and not is_interpolation) or command.gives(where, value):
            continue
        name = printable(".".join(where))
        if where[-1] == _TARGET and isinstance(value, str) and _NAME.fullmatch(value):
            if not (_is_shipped(where[:-1], parent) or command.trusts(value)):
                targets[name] = value
        else:
            refused[name] = value
    if targets or refused:
        raise ConfigError(_message(targets, refused, key, path, command))


def check_origin(trust: Sequence[str], overrides: Sequence[str]) -> None:
    """Raises a ConfigError if `trust` comes from a configuration file instead of the command line."""
    if trust and not any(override.lstrip("+").startswith("trust=") for override in overrides):
        raise ConfigError(f"trust: expected on the command line alone, got {list(trust)} in a file; leave it out there")


def is_trust_entry(entry: object) -> bool:
    """Whether this is a dotted name, or a package's name with `.*`."""
    return isinstance(entry, str) and _NAME.fullmatch(entry.removesuffix(".*")) is not None


def _message(targets: Mapping[str, str], refused: Mapping[str, Any], key: str, path: Path, command: Command) -> str:
    clauses = []
    if targets:
        got = ", ".join(f"{where}={name}" for where, name in targets.items())
        words = shlex.quote(_override([*command.trust, *targets.values()]))
        package = _own_package(targets.values(), command.trust)
        whole = f", or {shlex.quote(_override([*command.trust, package]))} for all that it defines" if package else ""
        clauses.append(
            f"names code that neither this clone nor this command does: {got}; if you trust what that does, append"
            f" {words}{whole}"
        )
    if refused:
        got = ", ".join(f"{where}={_shortened(value)}" for where, value in refused.items())
        again = " ".join(f"{where}={'true' if value is True else '...'}" for where, value in refused.items())
        clauses.append(f"holds what is never taken from a file: {got}; give it on the command line: {again}")
    return f"{key}: {path} {'; it '.join(clauses)} (docs/security.md)"


def _override(names: Sequence[str]) -> str:
    """The override that trusts these names; those that Hydra's grammar does not take as they are, quoted for it."""
    words = [name if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.*-]*", name) else f"'{name}'" for name in dict.fromkeys(names)]
    return f"trust=[{','.join(words)}]"


def _own_package(names: Collection[str], trust: Sequence[str]) -> str | None:
    """`package.*`, if all names are of one package that lies in the directory where this command starts."""
    root, *others = {name.split(".")[0] for name in names}
    lies_here = Path(root).is_dir() or Path(f"{root}.py").is_file()
    return f"{root}.*" if not others and lies_here and f"{root}.*" not in trust else None


def _shortened(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 40 else f"{text[:40]}..."


def _walk(config: Any) -> Iterator[tuple[Key, Any, Any]]:
    """Every value in nested containers with its key and the container it is in; containers before their content."""
    pending: list[tuple[Key, Any, Any]] = [((), config, None)]
    while pending:  # no recursion: a file may be nested as deep as it likes
        key, value, parent = pending.pop()
        yield key, value, parent
        if isinstance(value, Mapping):
            pending.extend(((*key, str(name)), item, value) for name, item in reversed(list(value.items())))
        elif isinstance(value, list | tuple):
            pending.extend(((*key, str(index)), value[index], value) for index in reversed(range(len(value))))


def _at(node: Any, key: Key) -> Any:
    """The value at this key of nested containers; `_ABSENT` if there is none."""
    for name in key:
        if isinstance(node, Mapping) and name in node:
            node = node[name]
        elif isinstance(node, list | tuple) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return _ABSENT
    return node


def _is_replaced(replaced: Mapping[str, Any], key: Key) -> bool:
    """Whether a value of an override, which is no dictionary to be merged, stands at this key or above it."""
    node: Any = replaced
    for name in key:
        if not isinstance(node, Mapping):
            return True
        if name not in node:
            return False
        node = node[name]
    return not isinstance(node, Mapping)


def _is_same(one: Any, other: Any) -> bool:
    return one is not _ABSENT and repr(one) == repr(other)  # a file may hold tensors, which == does not compare


def _is_shipped(key: Key, node: Mapping[Any, Any]) -> bool:
    """Whether the node stands in this clone's `configs/` at this key, with those keys alone and harmless values."""
    return any(
        node[_TARGET] == shipped[_TARGET]
        and node.keys() <= shipped.keys()
        and all(_is_plain(value) or _is_same(value, shipped[name]) for name, value in node.items() if name != _TARGET)
        for shipped in _shipped_nodes().get(".".join(key), ())
    )


def _is_plain(value: Any) -> bool:
    """A number, a boolean, None, a word without slashes and colons, or a list of such."""
    if isinstance(value, list | tuple):
        return all(not isinstance(item, list | tuple) and _is_plain(item) for item in value)
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and bool(_NAME.fullmatch(value)))


@cache
def _shipped_nodes() -> dict[str, list[dict[str, Any]]]:
    """The nodes with `_target_` in `configs/`, by key."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        directive = _PACKAGE.search(path.read_text(encoding="utf-8").partition("\n")[0])
        package = directive[1] if directive else "_group_"
        group = path.relative_to(CONFIGS).parent.parts
        root = {"_global_": (), "_group_": group}.get(package, tuple(package.split(".")))
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        for key, node, _ in _walk(content):
            if isinstance(node, dict) and _TARGET in node:
                found.setdefault(".".join((*root, *key)), []).append(node)
    return found
