"""The job's default process group, and the report of a failure in it."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

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
from syncbn.training.launch.explain import is_of_one_rank, report_failure

log = logging.getLogger(__name__)


@contextmanager
def process_group(device: str, job: str, timeout: float) -> Iterator[None]:
    """Context with the job's default process group, which is destroyed on every path; does nothing without torchrun.

    Keys in the store contain the attempt and the job, so that neither an elastic restart nor the next job of a multirun
    reads stale ones. A timeout, a RankError or an unexpected exception is reported here, with its rank.

    Args:
        device: "cuda" adds NCCL for CUDA tensors to gloo for CPU tensors; any other is gloo alone.
        job: a name that differs between the jobs of one multirun.
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
        dist.barrier()  # no rank may leave, even with an error, while another is still connecting
        yield
        dist.barrier()  # nor while another is still working
    except Exception as error:
        waited = explain_timeout(error, "outside of the training steps") if isinstance(error, RuntimeError) else None
        if waited is not None:
            waited.__cause__ = error
            report_failure(waited)
        # Reported before the group is destroyed: then the other ranks fail too, with errors that are not the cause.
        if is_of_one_rank(error):
            report_failure(error)
        raise
    finally:
        # A gloo job can abort at interpreter exit, after all of its work is done, if the group is not destroyed, or if
        # an object (a DDP in a reference cycle, say) keeps the group's threads alive until then.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def _warn_of_lasting_store() -> None:
    """Warns that with several machines and restarts, torch 2.13 never gives a later node the address of the store.

    That node waits for the address in the new round of the rendezvous, in which nobody writes it again.
    """
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if rank() == 0 and is_elastic() and may_restart and num_nodes() > 1 and agent_keeps_store():
        log.warning(
            "a node that replaces another one will wait for torchrun's store in vain; set"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node, and name the run (docs/deploy.md)"
        )
