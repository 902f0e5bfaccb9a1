"""`metrics.jsonl`: the records of a run, an object per line."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from syncbn.training.config.errors import RankError
from syncbn.training.config.output import unwritable

log = logging.getLogger(__name__)


class Records:
    """A file of records that is open for appending.

    A record is in the file as soon as it is complete, so that a kill loses none before it. One that cannot be written,
    as on a full disk, is kept and tried again with the next: once there is space, the file is whole. A warning says so.

    Raises:
        RankError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RankError(unwritable(error)) from None
        self._waiting = b""  # of records, from the first byte that is not in the file
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record; numbers that are not finite become strings."""
        line = json.dumps({key: jsonable(value) for key, value in record.items()}) + "\n"
        self._waiting += line.encode()
        failure = self._write()
        if failure is not None and not self._warned:
            self._warned = True
            log.warning("%s; training goes on, and its records are written as soon as possible", unwritable(failure))

    def close(self) -> None:
        """Tries once more what is not written yet, and closes the file.

        Raises:
            RankError: records could not be written.
        """
        failure = self._write()
        self._file.close()
        if failure is not None:
            count = len(self._waiting.splitlines())
            raise RankError(
                f"{unwritable(failure)}; its last {count} records are lost; the same command, with this run's name,"
                " writes those again that come after its last checkpoint"
            )

    def _write(self) -> OSError | None:
        """Writes what is waiting, as far as possible; returns the error that stopped it."""
        try:
            while self._waiting:
                written = os.write(self._file.fileno(), self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            error.filename = str(self.path)
            return error
        return None


def jsonable(value: Any) -> Any:
    """The value, or its string if it is a number that JSON does not have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
