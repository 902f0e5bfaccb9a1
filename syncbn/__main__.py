"""Command line: `python -m syncbn audit PATH` audits a checkpoint, `python -m syncbn report RUN...` writes a report.

Neither needs the code of the model. `python -m syncbn parity MODULE:BUILD MODULE:LOSS` imports it, and compares
training on several ranks with training in one process. Exit code 0: success, without findings of severity error (of
parity: any that is no info); 1: such findings; 2: a mistake in the command, or a file that cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from torch import Tensor


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exits with code 2 and a message of one line, without printing the usage."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments (None: those of the process), runs the command and returns its exit code."""
    parser = _Parser(prog="python -m syncbn", description="Looks at what training leaves behind.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_audit(commands)
    _add_report(commands)
    _add_parity(commands)
    options = parser.parse_args(arguments)
    exit_code: int = options.run(options)
    return exit_code


def _add_audit(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Names the classic batch normalization mistakes that a checkpoint shows; see docs/audit.md."
    command = commands.add_parser("audit", help="mistakes that a checkpoint shows", description=description)
    command.add_argument("path", type=Path, metavar="PATH", help="a checkpoint of train.py, a run directory (its best"
                         " checkpoint), or a state dict saved by torch or safetensors")  # fmt: skip
    command.add_argument("--json", action="store_true", help="findings as JSON")
    command.set_defaults(run=_audit)


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    from syncbn.report import write

    description = (
        "Writes one HTML file about a run, or several side by side; it needs no network. See docs/monitoring.md."
    )
    command = commands.add_parser("report", help="an HTML report of runs", description=description)
    write.add_arguments(command)
    command.set_defaults(run=write.command)


def _add_parity(commands: argparse._SubParsersAction[_Parser]) -> None:
    description = "Does a model train the same on several ranks as in one process? See docs/parity.md."
    command = commands.add_parser("parity", help="whether a model trains the same on several ranks",
                                  description=description)  # fmt: skip
    command.add_argument("build", metavar="MODULE:BUILD", help="a function that returns the model in training mode")
    command.add_argument("loss", metavar="MODULE:LOSS", help="loss(outputs, targets): a scalar, or a sum and a count")
    command.add_argument("batch", metavar="MODULE:BATCH", nargs="?", help="(inputs, targets), or a function that"
                         " returns them; without it, batch in the module of BUILD")  # fmt: skip
    command.add_argument("--world-sizes", default="1,2", metavar="1,2", help="numbers of ranks to compare")
    command.add_argument("--steps", type=int, default=2, help="training steps (2)")
    command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for everything (600)")
    command.add_argument("--json", action="store_true", help="findings as JSON")
    command.set_defaults(run=_parity)


def _parity(options: argparse.Namespace) -> int:
    from syncbn.auditing.parity.command import command

    return command(options)


def _audit(options: argparse.Namespace) -> int:
    from syncbn.auditing.rules import table
    from syncbn.auditing.state_dicts import audit_state_dict, bn_layers
    from syncbn.training.checkpoint.weights import read_model_weights
    from syncbn.training.config.errors import ConfigError, printable

    try:
        state = read_model_weights(options.path, "PATH")
        layers = bn_layers(state)
        _require_judgeable(options.path, layers)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    findings = audit_state_dict(state)
    if options.json:
        content = {"path": str(options.path), "layers": len(layers), "findings": [one.as_dict() for one in findings]}
        print(json.dumps(content, indent=2))
    else:
        print(f"{options.path}: {len(layers)} batch normalization layers")
        print(table(replace(one, layer=printable(one.layer)) for one in findings))  # names out of the file
    return int(any(finding.severity == "error" for finding in findings))


def _require_judgeable(path: Path, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raises a ConfigError if there is nothing to audit, or anything of it that cannot be read."""
    from syncbn.auditing.state_dicts import misshapen, statistics_of
    from syncbn.training.checkpoint.contents import MalformedError, clipped, require_usable
    from syncbn.training.config.errors import ConfigError

    if not layers:
        raise ConfigError(f"PATH: {str(path)!r} has no batch normalization (no running_mean, no running_var, no"
                          " num_batches_tracked), so there is nothing to judge")  # fmt: skip
    try:
        require_usable(statistics_of(layers))
    except MalformedError as error:
        raise ConfigError(f"PATH: {str(path)!r} {error}; nothing was judged") from None
    if (problem := misshapen(layers)) is not None:
        raise ConfigError(f"PATH: {str(path)!r} cannot be judged: {clipped(problem)}")


if __name__ == "__main__":
    sys.exit(main())
