"""Ctrl-C outside of training, and ranks whose torchrun has died.

Training saves before it leaves (`stopping`). Before and after it there is nothing to save: the process leaves at once,
with one line. `begin` is the first thing that `train.py` does, so this module imports nothing that takes long.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # a shell's exit status for a process that Ctrl-C ended
TERMINATED = 128 + signal.SIGTERM

_LOOK_EVERY = 1.0  # seconds between two looks at whether torchrun is alive, where its death is not told
_leaving = threading.Lock()
_process = os.getpid()


def begin() -> None:
    """From now on Ctrl-C ends this process with one line, and the death of torchrun ends it with SIGTERM.

    A thread sees to both, because the main thread may be inside of a collective or an import, where no handler of
    Python's runs. Where Ctrl-C is ignored, as in a job in the background of a shell, it stays so.
    """
    reader, writer = os.pipe()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to by the C part of every handler
        signal.signal(signal.SIGINT, _leave_at_once)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    threading.Thread(target=_watch, args=(reader, agent), name="interrupts", daemon=True).start()


def leave(code: int, line: str, *, every_rank: bool = False) -> None:
    """Prints a line, on the first rank of the machine alone unless `every_rank`, and ends the process at once.

    Returns only where the process is being ended already: in a signal handler inside of this call, or beside it.
    """
    if _leaving.acquire(blocking=False):
        if os.getpid() == _process:  # not a fork, which inherits the handlers
            _print(line, every_rank=every_rank)
        os._exit(code)


def _print(line: str, *, every_rank: bool = False) -> None:
    """Writes past Python's buffers, which the interrupted thread may be in the middle of."""
    if every_rank or os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":
        # A terminal has echoed ^C, and a progress bar may have hidden the cursor.
        start = "\x1b[?25h\n" if os.isatty(2) else ""
        with suppress(OSError):  # whoever read it may be gone
            os.write(2, f"{start}{line}\n".encode())


def _leave_at_once(_number: int, _: FrameType | None) -> None:
    leave(INTERRUPTED, "interrupted (Ctrl-C); no training was going on, so there was nothing to save")


def _watch(signals: int, agent: int | None) -> None:
    """The thread: waits for Ctrl-C and for the death of the agent."""
    sources, pause = [signals], None
    if agent is not None:
        try:
            sources.append(os.pidfd_open(agent))  # ready when the process is gone
        except (AttributeError, OSError):  # not on Linux 5.3 or newer, or gone already
            pause = _LOOK_EVERY
    while agent is None or os.getppid() == agent:
        ready, _, _ = select.select(sources, [], [], pause)
        is_ctrl_c = signals in ready and signal.SIGINT in os.read(signals, 64)
        if is_ctrl_c and signal.getsignal(signal.SIGINT) is _leave_at_once:  # training has a handler of its own
            _leave_at_once(signal.SIGINT, None)
    _leave_after(agent)


def _leave_after(agent: int | None) -> None:
    """Asks this process to stop, as SIGTERM does, and ends it after the time that torchrun gives its ranks to leave."""
    seconds = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))
    _print(f"torchrun (process {agent}) has died: this job saves and leaves, within {seconds:g} s")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
    rank = os.environ.get("RANK", "0")
    leave(TERMINATED, f"rank {rank}: not done {seconds:g} s after torchrun has died, left without", every_rank=True)
