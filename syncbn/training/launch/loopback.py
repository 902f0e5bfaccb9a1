"""torchrun for a job on one machine, whose store no other machine reaches: `python -m syncbn.training.launch.loopback`.

It takes torchrun's options for one machine (`--nproc-per-node 2 train.py ...`). torchrun's own store listens on all
network devices whatever address it is given, and asks for no password. While torchrun is being imported, another
process checks the configuration; where a rank fails, its own words are the last, without torchrun's traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from itertools import pairwise

from syncbn.training.distributed import interrupts
from syncbn.training.launch.announce import CHECKED, announce_start, runs


def main(arguments: Sequence[str]) -> None:
    """Runs torchrun with a store on the loopback device.

    A store of the same port in the same process is shared (`multi_tenant`), so torchrun takes the one that is there.
    After a signal torchrun ends its ranks and raises; here that is an exit code (Ctrl-C: 130) without a traceback.
    """
    check = _checking(arguments)
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    if check is not None:
        check.join()
    # What it says when it ends ranks, and that one has failed: that rank has said why.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    store = TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )
    # A run id of its own, because torchrun's default names no job.
    options = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--rdzv-id", uuid.uuid4().hex]
    try:
        torchrun([*options, "--local-addr", "localhost", *arguments])
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        sys.exit(_exit_code(error))
    finally:
        del store  # alive until here


def _checking(arguments: Sequence[str]) -> threading.Thread | None:
    """Starts train.py where it ends after its checks, which takes a third of the time that torchrun's import takes.

    The thread ends this process if they find a mistake. None for another program, or a command that only prints.
    """
    script = next((position for position, text in enumerate(arguments) if text.endswith("train.py")), None)
    if script is None or not runs(arguments[script + 1 :]):
        return None
    number = dict(pairwise(arguments[: script + 1])).get("--nproc-per-node", "1")
    if not number.isdecimal() or number == "0":
        print(f"error: NPROC (--nproc-per-node): expected 1 rank or more, got {number!r}", file=sys.stderr)
        sys.exit(2)
    announce_start(arguments[script + 1 :], number)
    # A session of its own: Ctrl-C is for this process, whose line is the only one then.
    check = subprocess.Popen(
        [sys.executable, *arguments[script:]],
        env={**os.environ, CHECKED: "only"},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    os.environ[CHECKED] = "told"

    def wait() -> None:
        _, told = check.communicate()
        if check.returncode == 2:
            print(told, end="", file=sys.stderr, flush=True)
            os._exit(2)  # no rank has been started, and the main thread is importing

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def _exit_code(error: Exception) -> int:
    """That of the rank that failed first; of one that a signal has ended, as a shell has it, after a line about it."""
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    if failure.exitcode >= 0:
        return int(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    why = "; the machine may have run out of memory (dmesg tells)" if name == "SIGKILL" else ""
    print(f"error: rank {rank} (process {failure.pid}) was ended by {name}{why}", file=sys.stderr, flush=True)
    return 128 - int(failure.exitcode)


if __name__ == "__main__":
    interrupts.begin()  # until torchrun has handlers of its own
    main(sys.argv[1:])
