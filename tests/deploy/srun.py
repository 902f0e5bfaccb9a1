#!/usr/bin/env python3
"""Stands in for Slurm's srun in tests: starts the command on every host at once, and hands SIGTERM on to it.

The environment says where: HOSTS has a line for each, the process id that holds its namespaces. Slurm's own variables
are those that torchrun's options in slurm.sbatch need.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--kill-on-bad-exit")]
hosts = os.environ["HOSTS"].split()
nodes = [
    subprocess.Popen(
        ["nsenter", "--target", host, "--net", "--uts", "--pid", "--mount", f"--wd={os.getcwd()}", *arguments],
        env={**os.environ, "SLURM_NODEID": str(number), "SLURM_NNODES": str(len(hosts))},
    )
    for number, host in enumerate(hosts)
]


def hand_on(number: int, _: object) -> None:
    """To what nsenter has started: nsenter itself would only die of it."""
    for node in nodes:
        with suppress(OSError):
            for child in Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split():
                os.kill(int(child), number)


signal.signal(signal.SIGTERM, hand_on)
sys.exit(max(abs(node.wait()) for node in nodes))
