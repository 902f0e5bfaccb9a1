"""Options with dashes that train.py does not have: argparse would answer them with all that Hydra has."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from syncbn.training.config.errors import ConfigError, printable
from syncbn.training.launch.known_keys import known_keys
from syncbn.training.launch.other_names import here

_LONG = ("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
         "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun",
         "--info")  # fmt: skip
_SHORT = ("-h", "-c", "-p", "-r", "-m", "-sc", "-i")
_OF_TORCHRUN = ("--nproc", "--nnodes", "--node", "--rdzv", "--standalone", "--max-restarts", "--monitor", "--master",
                "--local-addr", "--tee", "--redirects", "--log-dir", "--start-method", "--role")  # fmt: skip


def check_flags(arguments: Sequence[str]) -> None:
    """Checks that the options are Hydra's.

    Raises:
        ConfigError: one is not; the message has the key that it stands for, or says where it belongs.
    """
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not name.startswith("-") or not name.strip("-"):
            continue
        if any(flag.startswith(name) for flag in _LONG) or (name[1] != "-" and name.startswith(_SHORT)):
            continue
        shown, dashed = printable(name), name.replace("_", "-")
        if dashed == "--local-rank":
            raise ConfigError(f"{shown}: torch.distributed.launch hands this over; start train.py with torchrun")
        if dashed.startswith(_OF_TORCHRUN):
            raise ConfigError(f"{shown}: is an option of torchrun, and stands before train.py: torchrun {shown} ..."
                              " train.py")  # fmt: skip
        following = arguments[position + 1] if position + 1 < len(arguments) else ""
        given = value if equals else "" if following.startswith("-") or "=" in following else following
        raise ConfigError(f"{shown}: no such option; keys are given without dashes, {_instead(dashed, given)}")


def _instead(name: str, value: str) -> str:
    key = name.strip("-").replace("-", "_")
    if words := here(key, value):
        return words
    keys = known_keys()
    near = [known for known in keys if known == key or known.endswith(f".{key}")]
    near += get_close_matches(key, keys, n=1, cutoff=0.75)
    return f"{near[0]}={printable(value) or '...'}" if near else "KEY=VALUE; python train.py --cfg job lists them"
