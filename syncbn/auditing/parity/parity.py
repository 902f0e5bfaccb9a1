"""parity(): does a model train the same on several ranks as in one process?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from syncbn.auditing.parity.batches import num_samples, uneven
from syncbn.auditing.parity.comparison import SizeResult
from syncbn.auditing.parity.diagnosis import Diagnosis
from syncbn.auditing.parity.processes import RankProcesses, refuse_recursion
from syncbn.auditing.rules import Finding

TIMEOUT = 600.0  # seconds


def parity(
    build: Callable[[], nn.Module],
    loss: Callable[[Any, Any], Any],
    batch: tuple[Any, Any],
    *,
    world_sizes: Sequence[int] = (1, 2),
    steps: int = 2,
    timeout: float = TIMEOUT,
    report: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Whether a model trains on several ranks as it does in one process; if not, which layer is the cause, and why.

    Fresh processes on this machine train the model for some steps in float64 on the CPU, once as one process with the
    whole batch, and at each world size on uneven shards of it ([7, 5] of 12). What differs is ablated: batch
    normalization is synchronized, randomness silenced, the loss divided by the global count, and what is left is
    searched for layers that mix samples and for buffers that go their own way. See docs/parity.md. The model of this
    process, if there is one, is not involved, and nothing is written.

    Args:
        build: returns the model in training mode, the same at every call; a function at the top level of a module or
            of a script with a main guard, because new processes import it. It may ask `torch.distributed` for rank
            and world size: a gloo group is there.
        loss: `loss(outputs, targets)` returns the sum of what it measures and how many these are (then the sum over
            all ranks is divided by the count over all ranks), or a scalar (then DDP's average over ranks is what
            trains, and a mean over unequal shards is a finding). Importable, or an object that pickles.
        batch: inputs and targets on the CPU, samples in the first dimension; inputs are a tensor, a tuple or list
            (`model(*inputs)`) or a dictionary (`model(**inputs)`), targets any tree of tensors. A dozen samples are
            enough; at least one more than ranks.
        world_sizes: numbers of ranks to compare with one process; 1 stands for that process, and may be left out.
        steps: training steps; state that is fed by a step is seen in the next one.
        timeout: seconds for everything together.
        report: called with a line about each comparison as it begins or ends.

    Returns:
        The causes in the order of the network; empty if the model trains the same. A finding of severity info (float64
        refused) says how well the comparison could be made, and is no difference.

    Raises:
        ValueError: a batch without samples or with too few for the world sizes, sizes or steps below 1.
        ParityError: nothing can be said: new processes cannot import build or loss, the model fails in one process
            already, the time is up.
    """
    return compare(build, loss, batch, world_sizes=world_sizes, steps=steps, timeout=timeout, report=report).findings


@dataclass(frozen=True)
class Result:
    """The findings, and what each world size showed before anything was remedied."""

    findings: list[Finding]
    sizes: list[SizeResult]


def compare(
    build: Callable[[], nn.Module],
    loss: Callable[[Any, Any], Any],
    batch: tuple[Any, Any],
    *,
    world_sizes: Sequence[int],
    steps: int,
    timeout: float,
    report: Callable[[str], None] | None,
) -> Result:
    """What `parity` does with these arguments, with a result for each world size beside the findings."""
    refuse_recursion()
    if (
        isinstance(world_sizes, int)
        or not world_sizes
        or not all(isinstance(size, int) and size >= 1 for size in world_sizes)
    ):
        raise ValueError(f"world_sizes: expected numbers of ranks, 1 or more, got {world_sizes!r}")
    if max(world_sizes) == 1:
        raise ValueError("world_sizes: expected one above 1 to compare one process with, got 1 alone")
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps!r}")
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise ValueError(f"batch: expected (inputs, targets), got {type(batch).__name__}")
    num = num_samples(batch[0])
    for size in world_sizes:
        uneven(num, size)
    with RankProcesses(max(world_sizes)) as ranks:
        ranks.load((build, loss, (batch[0], batch[1])), timeout)
        diagnosis = Diagnosis(ranks, num, world_sizes, steps, report or (lambda line: None))
        return Result(diagnosis.run(), diagnosis.sizes)
