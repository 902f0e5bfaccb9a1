"""What a layer step costs the host, counted: Python frames of the package, launches, collectives."""

import pytest

pytest.importorskip("triton", reason="Triton is there on Linux only")

from contextlib import nullcontext

from benchmarks.host import collectives_of, frames_of, model_step, stubbed_collectives, stubbed_device
from syncbn import SyncBatchNorm
from tests.training.jobs import ROOT


@pytest.mark.parametrize(("is_distributed", "launches", "collectives"), [(False, 2, 0), (True, 5, 2)])
def test_a_layer_step_on_cuda_enters_at_most_15_frames(is_distributed, launches, collectives):
    with stubbed_device() as started, stubbed_collectives() if is_distributed else nullcontext():
        step = model_step(SyncBatchNorm, num_layers=3)
        step()
        started.clear()
        assert frames_of(step, ROOT / "syncbn") <= 3 * 15
        assert len(started) == 3 * launches
        assert collectives_of(step) == 3 * collectives
