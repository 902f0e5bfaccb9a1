"""Ranks that run out of data go on with empty batches until all are done, and the result is that of one process."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, even_steps, precise_bn
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


@dataclass
class Batch:
    x: torch.Tensor


class Mine:
    """Of which nobody can know where it has rows."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)


KINDS = [lambda x: UserDict(x=x), Batch, lambda x: {"x": x.numpy()}]


def check_kinds():
    rank = dist.get_rank()
    for make in KINDS:
        batches = list(even_steps([make(torch.ones(2, 4)) for _ in range((1, 3)[rank])]))
        rows = [len(batch["x"] if hasattr(batch, "keys") else batch.x) for batch in batches]
        assert rows == ([2, 0, 0], [2, 2, 2])[rank]
        assert {type(batch) for batch in batches} == {type(make(torch.ones(2, 4)))}


def test_a_rank_that_ran_out_never_sees_its_data_again_whatever_class_holds_them(ranks):
    ranks(2, check_kinds)


def check_odd_batches():
    rank = dist.get_rank()
    with pytest.raises(TypeError, match=r"rank 1: loader: cannot make an empty batch of .*Mine"):
        next(even_steps([torch.ones(2)] * 2 if rank == 0 else [Mine(torch.ones(2))]))
    steps = even_steps([Mine(torch.ones(2))] * (1 + rank), empty=lambda batch: Mine(batch.x[:0]))
    assert [len(batch) for batch in steps] == ([2, 0], [2, 2])[rank]
    local = type("Local", (UserDict,), {})  # no other rank can import it
    assert [len(batch["x"]) for batch in even_steps([local(x=torch.ones(2))] * (1 + rank))] == ([2, 0], [2, 2])[rank]
    with pytest.raises(TypeError, match=r"a rank has no batch, and an empty one cannot be sent to it: .*Local"):
        next(even_steps([local(x=torch.ones(2))] * rank))
    with pytest.raises(TypeError, match="rank 0: ZeroDivisionError"):
        next(even_steps([torch.ones(2)] * (1 - rank), empty=lambda batch: 1 / 0))


def test_a_batch_that_cannot_be_cut_or_sent_is_an_error_on_every_rank_before_the_first_step(ranks):
    ranks(2, check_odd_batches)


class TakesEncoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = SyncBatchNorm(4, dtype=torch.float64)

    def forward(self, batch):
        return self.bn(batch["x"])


def check_precise():
    rank, sizes = dist.get_rank(), [(3,), (2, 5)]
    model = TakesEncoding()
    every = [[batch["x"] for batch in make_batches(size)] for size in sizes]
    precise_bn(model, [UserDict(x=x) for x in every[rank]])
    union = torch.cat([x for own in every for x in own])
    assert max_error(model.bn.running_mean, union.mean(0)) < 1e-12
    assert max_error(model.bn.running_var, union.var(0)) < 1e-12


def test_precise_bn_counts_every_encoding_once(ranks):
    ranks(2, check_precise)


def check_nothing():
    with pytest.raises(ValueError, match="loader: expected a batch on at least one rank"):
        list(even_steps([]))


def test_no_batch_on_any_rank_is_an_error_on_every_rank(ranks):
    ranks(2, check_nothing)


def test_without_a_job_it_is_the_loader():
    assert list(even_steps([1, 2])) == [1, 2]
