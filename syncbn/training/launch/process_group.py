"""The job's default process group, and what is said when it fails."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from syncbn.training.config.errors import RankError
from syncbn.training.distributed.failures import explain_timeout
from syncbn.training.distributed.network import choose_device
from syncbn.training.distributed.world import (
    agent_keeps_store,
    attempt,
    is_distributed,
    is_elastic,
    num_nodes,
    rank,
    store,
    world_size,
)
from syncbn.training.launch.explain import explain, report_failure

log = logging.getLogger(__name__)


@contextmanager
def process_group(device: str, job: str, timeout: float) -> Iterator[None]:
    """The job's default process group; destroyed on every path. Does nothing without torchrun.

    Keys carry the attempt and the job, so that neither an elastic restart nor the next job of a multirun meets stale
    ones.

    Args:
        timeout: seconds that a collective waits for the other ranks.
    """
    if not is_distributed():
        yield
        return
    import torch.distributed as dist

    choose_device()
    _warn_of_lasting_store()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.PrefixStore(f"syncbn/{job}/attempt{attempt()}", store()),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=timeout),
    )
    try:
        dist.barrier()  # all are connected: none may leave, be it with an error, while another still knocks
        yield
        dist.barrier()  # nor while another still has something to do
    except Exception as error:
        waited = explain_timeout(error, "outside of the training steps") if isinstance(error, RuntimeError) else None
        if waited is not None:
            waited.__cause__ = error
            report_failure(waited)
        # Before the group goes: then the other ranks fail too, and theirs are not the cause.
        if explain(error) is None or isinstance(error, RankError):
            report_failure(error)
        raise
    finally:
        # Without this a gloo job can abort at exit, after all of its work is done; and so it can while anything (a DDP
        # in a reference cycle, say) keeps the group's threads alive until the interpreter goes.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def _warn_of_lasting_store() -> None:
    """What torch 2.13 does with several machines and restarts: one that joins later is never told where the store is.

    It waits for that in the new round of the rendezvous, where nobody writes it again.
    """
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if rank() == 0 and is_elastic() and may_restart and num_nodes() > 1 and agent_keeps_store():
        log.warning(
            "a node that replaces another one will wait for torchrun's store in vain; set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, and name the run (docs/deploy.md)"
        )
