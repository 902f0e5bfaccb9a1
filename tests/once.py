"""What takes long to make is made once for all test processes: `made_once(tmp_path_factory, name, make)`."""

import fcntl
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What `make(directory)` returns, called by the first test process that needs it; the others wait for it.

    Tests must not change what it has made in `directory`, because processes share that.

    Args:
        name: differs from those of all other calls in the tests.
        make: its result is pickled for the other processes. After an exception the next process tries again.
    """
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    directory, result = common / f"once-{name}", common / f"once-{name}.pickle"
    with open(common / f"once-{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            made = pickle.dumps(make(directory))
            result.write_bytes(made)
        return pickle.loads(result.read_bytes())
