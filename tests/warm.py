"""Programs in an interpreter that has its imports behind it: `run_warm([script, *arguments], cwd, environment)`.

Starting Python and importing torch, Hydra and torchmetrics takes seconds, and many tests start `train.py` as a user
does. So one process imports what others wrote (nothing of this project), and forks for each program: the fork has the
working directory, environment, arguments and output of its own, runs the script as `__main__`, and ends. What differs
from a fresh `python script.py` is that imports are quick and the order of them is not the script's.

This file is both ends: imported, the client; run, the process that forks.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
_PRELOADED = ("hydra", "omegaconf", "yaml", "rich.console", "rich.progress", "rich.table", "numpy", "torch",
              "torch.distributed", "torch.distributed.device_mesh", "torch.nn.parallel", "torch.optim.swa_utils",
              "torchmetrics", "torchmetrics.classification", "sklearn.datasets", "sklearn.model_selection", "PIL.Image",
              "safetensors.torch", "bokeh.plotting", "hydra.core.override_parser.overrides_parser")  # fmt: skip


def run_warm(
    command: list[str], cwd: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *command], ..., capture_output=True, text=True)` does.

    Raises:
        subprocess.TimeoutExpired: it took longer; it has been killed.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as directory:
        outputs = [os.path.join(directory, name) for name in ("stdout", "stderr")]
        request = {"command": command, "cwd": str(cwd), "environment": environment, "outputs": outputs,
                   "timeout": timeout}  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that forks has ended"
        stdout, stderr = (Path(output).read_text(encoding="utf-8", errors="replace") for output in outputs)
    code = json.loads(answer)
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


@cache
def _server() -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=environment)  # fmt: skip
    atexit.register(server.kill)
    return server


def _serve() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        print(json.dumps(_wait(child, request["timeout"])), flush=True)


def _wait(child: int, timeout: float) -> int | None:
    """Its exit code, negative for a signal; None after the timeout, when all of its process group is killed."""
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, timeout)
    _, status = os.waitpid(child, 0)
    ran_out = signal.setitimer(signal.ITIMER_REAL, 0)[0] == 0
    code = os.waitstatus_to_exitcode(status)
    return None if ran_out and code == -signal.SIGKILL else code


def _become(request: dict[str, Any]) -> NoReturn:
    """The rest of the life of a fork."""
    code: Any = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for descriptor, path in zip((1, 2), request["outputs"], strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0)  # noqa: SIM115 - for the life of the process
        sys.argv = list(request["command"])
        sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(0 if code is None else int(code))


if __name__ == "__main__":
    _serve()
