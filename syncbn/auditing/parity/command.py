"""`python -m syncbn parity MODULE:BUILD MODULE:LOSS [MODULE:BATCH]`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from syncbn.auditing.parity.errors import ParityError, type_and_message
from syncbn.auditing.parity.parity import compare
from syncbn.auditing.parity.rules import is_fault
from syncbn.auditing.rules import table


def command(options: argparse.Namespace) -> int:
    """Compares, prints the findings, and returns the exit code: 1 with findings, 2 where nothing can be said."""
    try:
        sizes = [int(size) for size in options.world_sizes.split(",")]
    except ValueError:
        return _failed(f"--world-sizes: expected numbers such as 1,2,4, got {options.world_sizes!r}")
    try:
        build, loss = imported("MODULE:BUILD", options.build), imported("MODULE:LOSS", options.loss)
        batch = imported("MODULE:BATCH", options.batch or f"{options.build.partition(':')[0]}:batch")
        batch = batch() if callable(batch) else batch
        result = compare(build, loss, batch, world_sizes=sizes, steps=options.steps, timeout=options.timeout,
                         report=_say)  # fmt: skip
    except (ParityError, ValueError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    if options.json:
        content = {"world_sizes": [asdict(one) for one in result.sizes],
                   "findings": [one.as_dict() for one in result.findings]}  # fmt: skip
        print(json.dumps(content, indent=2))
    else:
        print(table(result.findings))
    return int(any(map(is_fault, result.findings)))


def imported(argument: str, name: str) -> Any:
    """What `module:name` denotes, looked for in the working directory too.

    Raises:
        ParityError: no such module, or nothing of that name in it.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ParityError(f"{argument}: expected a module and a name in it, as in train:build, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ParityError(f"{argument}: {module} cannot be imported ({type_and_message(error)})") from None
    if not hasattr(found, attribute):
        raise ParityError(f"{argument}: {module} has nothing of the name {attribute!r}")
    return getattr(found, attribute)


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
