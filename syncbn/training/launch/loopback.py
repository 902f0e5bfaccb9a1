"""torchrun for a job on one machine, whose store no other machine reaches: `python -m syncbn.training.launch.loopback`.

It takes torchrun's options for one machine (`--nproc-per-node 2 train.py ...`). torchrun's own store listens on all
network devices whatever address it is given, and asks for no password.
"""

from __future__ import annotations

import socket
import sys
import uuid
from collections.abc import Sequence

from syncbn.training.distributed import interrupts


def main(arguments: Sequence[str]) -> None:
    """Runs torchrun with a store on the loopback device.

    A store of the same port in the same process is shared (`multi_tenant`), so torchrun takes the one that is there.
    After a signal torchrun ends its ranks and raises; here that is an exit code (Ctrl-C: 130) without a traceback.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as torchrun

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
    finally:
        del store  # alive until here


if __name__ == "__main__":
    interrupts.begin()  # until torchrun has handlers of its own
    main(sys.argv[1:])
