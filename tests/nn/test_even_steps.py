"""Ranks that run out of data go on with empty batches until all are done, and the result is that of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, even_steps
from syncbn.torch_compat import ddp_without_buffer_sync
from tests.reference import max_error


def make_batches(sizes):
    """One rank's batches, of these sizes."""
    generator = torch.Generator().manual_seed(sum(sizes) + len(sizes))
    return [
        {"x": torch.randn(size, 4, generator=generator, dtype=torch.float64), "y": [torch.arange(size)], "name": "b"}
        for size in sizes
    ]


def check_counts(sizes):
    batches = list(even_steps(make_batches(sizes[dist.get_rank()])))
    assert len(batches) == max(len(size) for size in sizes)
    own = len(sizes[dist.get_rank()])
    assert [len(batch["x"]) for batch in batches] == [*sizes[dist.get_rank()], *[0] * (len(batches) - own)]
    for batch in batches:
        assert batch["x"].shape[1:] == (4,)
        assert batch["x"].dtype == torch.float64
        assert len(batch["y"][0]) == len(batch["x"])
        assert batch["name"] == "b"


@pytest.mark.parametrize("sizes", [[(3, 3), (2, 2)], [(3,), (2, 2, 1)], [(), (2, 1)], [(1,), (), (2, 2, 2)]], ids=str)
def test_all_ranks_take_as_many_steps_as_the_longest(ranks, sizes):
    ranks(len(sizes), check_counts, sizes)


def check_training(sizes):
    """A whole epoch with DDP, against one process that sees the union of each step's batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def make_model(norm):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), norm(5), nn.Linear(5, 1)).double()

    model, single = make_model(SyncBatchNorm), make_model(nn.BatchNorm1d)
    wrapped = ddp_without_buffer_sync(model)
    every = [make_batches(size) for size in sizes]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, single)]
    for step, batch in enumerate(even_steps(every[rank])):
        union = torch.cat([batches[step]["x"] for batches in every if step < len(batches)])
        for optimizer in optimizers:
            optimizer.zero_grad()
        (wrapped(batch["x"]).square().sum() * world_size / len(union)).backward()
        single(union).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in single.state_dict().items():
        assert max_error(model.state_dict()[name], value.double()) < 1e-12, name


@pytest.mark.parametrize("sizes", [[(3,), (2, 2, 3)], [(4, 4), (3, 3)], [(2, 2, 2), (), (3,)]], ids=str)
def test_an_epoch_of_uneven_loaders_equals_one_process(ranks, sizes):
    ranks(len(sizes), check_training, sizes)


def check_nothing():
    with pytest.raises(ValueError, match="loader: expected a batch on at least one rank"):
        list(even_steps([]))


def test_no_batch_on_any_rank_is_an_error_on_every_rank(ranks):
    ranks(2, check_nothing)


def test_without_a_job_it_is_the_loader():
    assert list(even_steps([1, 2])) == [1, 2]
