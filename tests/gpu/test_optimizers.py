"""On a GPU an optimizer leaves a step out without a trace, and without the host where it has kernels for that."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from syncbn.training.optim.optimizers import build_optimizer
from syncbn.training.optim.update import Update
from tests.training.optim.test_optimizers import OF_TORCH, network, of_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_step_left_out_on_a_gpu_leaves_no_trace(name):
    model = network().to(CUDA)
    built = build_optimizer(of_torch(name), model)
    assert built.skips_on_device or name not in ("SGD", "Adam", "AdamW")
    schedule = LambdaLR(built.optimizer, lambda _: 1.0)
    update = Update(model, built.optimizer, schedule, CUDA, skips_on_device=built.skips_on_device)
    one, batch = torch.ones((), dtype=torch.float64, device=CUDA), torch.randn(8, 3, device=CUDA)
    for factor in (torch.nan, 1.0, torch.nan, 1.0):
        before = copy.deepcopy((model.state_dict(), built.optimizer.state_dict()["state"]))
        update.begin()
        loss = model(batch).square().sum()
        loss.backward()
        seen = loss.detach().double() * factor
        torch.cuda.set_sync_debug_mode("error" if built.skips_on_device else "default")
        try:
            update.finish(seen, one, halt=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = (model.state_dict(), built.optimizer.state_dict()["state"])
        if factor == 1.0:
            assert not torch.equal(after[0]["0.weight"], before[0]["0.weight"])
            assert all(value.isfinite().all() for value in after[0].values())
        else:
            torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
            for number, state in before[1].items():
                torch.testing.assert_close(after[1][number], state, rtol=0, atol=0)
