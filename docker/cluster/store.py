"""A rendezvous store on an address of its own, so that any node of the job may die: `python store.py [port]`.

Nodes name it as `--rdzv-endpoint HOST:PORT --rdzv-conf is_host=false`. It keeps the state of every job (`--rdzv-id`)
in memory and does nothing else; it ends on SIGTERM.
"""

import signal
import sys
from datetime import timedelta

from torch.distributed import TCPStore

port = int(sys.argv[1]) if len(sys.argv) > 1 else 29400
signals = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before the store starts its threads, which inherit it
store = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
print(f"rendezvous store on port {store.port}", flush=True)
signal.sigwait(signals)
