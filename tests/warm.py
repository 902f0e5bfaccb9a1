"""Programs in an interpreter that has its imports behind it: `run_warm([script, *arguments], ...)`, `warm_ranks()`.

Starting Python and importing torch, Hydra and torchmetrics takes seconds, and many tests start `train.py` as a user
does, with one process or several. So one server imports these and the modules of this project, and forks for each
program: the fork has the working directory, environment, arguments and output of its own, runs the script as
`__main__`, and ends. What differs from a fresh `python script.py` is that imports are quick.

Who wants a program starts a small client process in its place, which hands its own output over to the fork, passes
SIGTERM and SIGINT on, and ends with the fork's exit code: so torchrun can start ranks that way. A client that is killed
takes its fork along.

This file is all three: imported, it starts programs; `warm.py SOCKET` serves; `warm.py SOCKET SCRIPT ...` is a client.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys

# Also what ranks are forked from in tests/ranks.py.
SERVER_IMPORTS = ("hydra", "omegaconf", "yaml", "rich.console", "rich.progress", "rich.table", "numpy", "torch",
                  "torch.distributed", "torch.distributed.device_mesh", "torch.nn.parallel", "torch.optim.swa_utils",
                  "torch.distributed.run", "torch._dynamo", "torchmetrics", "torchmetrics.classification",
                  "sklearn.datasets", "sklearn.model_selection", "PIL.Image", "safetensors.torch",
                  "bokeh.plotting", "hydra.core.override_parser.overrides_parser",
                  "hydra.experimental.callback")  # fmt: skip
# Of this project: they import all that a task of train.py needs.
_OWN_IMPORTS = ("syncbn.training.tasks.run", "syncbn.training.tasks.train", "syncbn.training.launch.announce",
                "syncbn.training.launch.preflight", "syncbn.report.write", "syncbn.report.page",
                "syncbn.report.gallery")  # fmt: skip
_READ_AT_IMPORT = ("SYNCBN_DEBUG",)  # variables that decide what an import does
GC_THRESHOLD = 50_000, 20, 50  # objects made, then passes, before cyclic garbage is looked for; usually 700, 10, 10
_LARGEST = 2**20  # bytes of a request


def command_of(*program: str) -> list[str]:
    """The command line of a client that runs a script with its arguments (or `torchrun` with its options)."""
    return [sys.executable, "-S", "-E", os.path.abspath(__file__), _server(), *program]


_address: str | None = None


def _server() -> str:
    """The address of this process's server, which is started at its first use and ends with this process."""
    global _address
    if _address is None:
        import atexit
        import subprocess
        import tempfile

        directory = tempfile.mkdtemp(prefix="warm")
        _address = os.path.join(directory, "socket")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([sys.executable, __file__, _address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  env=environment)  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline(), "the server of warm interpreters did not start"
        atexit.register(server.kill)
    return _address


def _client(address: str, command: list[str]) -> int:
    """Runs a command on the server, with the output, directory and environment of this process."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    request = json.dumps({"command": command, "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [1, 2])
    connection.sendall(request)
    child = int.from_bytes(connection.recv(8), "big", signed=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    answer = connection.recv(8)
    if not answer:
        return 1
    code = int.from_bytes(answer, "big", signed=True)
    if code < 0:  # ended by a signal: so do we
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _serve(address: str) -> None:
    import importlib
    import select

    for name in SERVER_IMPORTS:
        importlib.import_module(name)
    composing = importlib.import_module("composing")  # beside this file
    composing.remember_files()
    composing.read_ahead()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(0, root)
    for name in _OWN_IMPORTS:
        importlib.import_module(name)
    sys.path.remove(root)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: os.write(waker, b"x"))
    running: dict[int, socket.socket] = {}  # by process id
    while True:
        ready, _, _ = select.select([listener, wake, sys.stdin, *running.values()], [], [])
        if sys.stdin in ready:  # who has started us is gone
            return
        if wake in ready:
            os.read(wake, 4096)
            while running and (done := os.waitpid(-1, os.WNOHANG))[0]:
                connection = running.pop(done[0])
                _send(connection, os.waitstatus_to_exitcode(done[1]))
                connection.close()
        for child, connection in list(running.items()):
            if connection in ready:  # nothing more is sent: the client is gone
                os.kill(child, signal.SIGKILL)
        if listener in ready:
            connection, _ = listener.accept()
            head, outputs, _, _ = socket.recv_fds(connection, 8, 2)
            request = b""
            while len(request) < int.from_bytes(head, "big"):
                request += connection.recv(_LARGEST)
            child = os.fork()
            if child == 0:
                for other in (listener, connection, *running.values()):
                    other.close()
                _become(json.loads(request), outputs)
            for output in outputs:
                os.close(output)
            _send(connection, child)
            running[child] = connection


def _send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the client is gone
        connection.sendall(number.to_bytes(8, "big", signed=True))


def _become(request: dict, outputs: list[int]) -> None:
    """The rest of the life of a fork."""
    import atexit
    import runpy
    import traceback

    at_import = [os.environ.get(name) for name in _READ_AT_IMPORT]

    code: object = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = list(request["command"])
        if [os.environ.get(name) for name in _READ_AT_IMPORT] != at_import:
            sys.exit(f"warm.py: {_READ_AT_IMPORT} are read when this project is imported; start this program cold")
        if sys.argv[0] == "torchrun":
            from torch.distributed.run import main

            main()
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(_client(sys.argv[1], sys.argv[2:]))
    _serve(sys.argv[1])
