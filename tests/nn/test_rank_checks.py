"""Ranks that are not in the same place: an error on every rank instead of a wait, and a name in every error."""

import subprocess
import sys
from datetime import timedelta
from importlib.util import module_from_spec
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, new_bn_groups, sync_batch_norm
from syncbn.nn import collectives as nn_collectives
from syncbn.nn import rank_checks
from tests.counting import collectives
from tests.training.jobs import ROOT


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3))
        self.head = nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3))

    def forward(self, x):
        return self.head(self.stem(x))


def message_of(step):
    """The error that `step` ends with, in debug mode."""
    with mock.patch.object(rank_checks, "enabled", True):
        try:
            step()
        except rank_checks.CollectiveError as error:
            return str(error)
    raise AssertionError("no error")


def check_matching_steps(world_size_of_groups):
    net = Net()
    if world_size_of_groups:
        group = new_bn_groups(world_size_of_groups)
        for layer in (net.stem[1], net.head[1]):
            layer.process_group = group
    ddp = nn.parallel.DistributedDataParallel(net)
    with mock.patch.object(rank_checks, "enabled", True):
        for _ in range(2):
            ddp(torch.randn(4, 3)).sum().backward()
    return net.stem[1].running_mean


@pytest.mark.parametrize("groups", [None, 2])
def test_ranks_that_agree_are_not_disturbed(ranks, groups):
    means = ranks(2 if groups is None else 4, check_matching_steps, groups)
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=0)


def check_another_layer():
    net = Net()
    if dist.get_rank() == 1:
        net.stem.eval()  # a layer that one rank alone has in evaluation mode: mmengine #1624
    return message_of(lambda: nn.parallel.DistributedDataParallel(net)(torch.randn(4, 3)))


def test_another_layer_is_named_with_its_rank_on_every_rank(ranks):
    messages = ranks(3, check_another_layer)
    assert len(set(messages)) == 1
    assert messages[0].endswith(
        "rank 0: the forward pass of stem.1, call 1; rank 1: the forward pass of head.1, call 1;"
        " rank 2: the forward pass of stem.1, call 1"
    )


def check_another_direction():
    net = Net()
    if dist.get_rank() == 1:
        net.head.eval()
    return message_of(lambda: net(torch.randn(4, 3)).sum().backward())


def test_another_direction_is_named(ranks):
    [first, second] = ranks(2, check_another_direction)
    assert first == second
    assert "rank 0: the forward pass of head.1, call 1; rank 1: the backward pass of stem.1, call 1" in first


def check_another_step():
    net = Net()
    with mock.patch.object(rank_checks, "enabled", True):
        net(torch.randn(4, 3))
    if dist.get_rank() == 1:
        rank_checks._calls[net.stem[1]]["forward"] += 1  # as if it had counted one more
    return message_of(lambda: net(torch.randn(4, 3)))


def test_another_step_is_named(ranks):
    [message, _] = ranks(2, check_another_step)
    assert "rank 0: the forward pass of stem.1, call 2; rank 1: the forward pass of stem.1, call 3" in message


def check_a_rank_that_does_not_come(debug):
    group = dist.new_group(timeout=timedelta(seconds=2))
    net = Net()
    for layer in (net.stem[1], net.head[1]):
        layer.process_group = group
    if dist.get_rank() == 1:
        return None
    with mock.patch.object(rank_checks, "enabled", debug), pytest.raises(rank_checks.CollectiveError) as error:
        net(torch.randn(4, 3))
    return str(error.value)


@pytest.mark.parametrize("debug", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_rank_that_does_not_come_fails_the_others_within_the_group_s_timeout_with_the_layer_s_name(ranks, debug):
    message = ranks(2, check_a_rank_that_does_not_come, debug)[0]
    assert "the forward pass of stem.1" in message
    assert ("have come to a layer of this group" in message) == debug


DIES = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from syncbn import SyncBatchNorm

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
net = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(3, 3), SyncBatchNorm(3))})
net["stem"](torch.randn(4, 3))
if rank == 1:
    os._exit(9)
try:
    net["stem"](torch.randn(4, 3))
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)  # the group is broken: no orderly end
"""


def test_a_rank_that_dies_fails_the_others_at_once_with_the_layer_s_name(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", DIES, str(rank), str(tmp_path / "store")], text=True, cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    output, _ = processes[0].communicate(timeout=60)  # far below gloo's own timeout of 30 minutes
    processes[1].communicate(timeout=60)
    assert "rank 0: the sum over ranks in the forward pass of stem.1 failed: " in output


def check_the_backward_pass_is_named():
    group = dist.new_group(timeout=timedelta(seconds=2))
    net = Net()
    net.head[1].process_group = group
    output = net(torch.randn(4, 3))
    if dist.get_rank() == 0:
        with pytest.raises(rank_checks.CollectiveError, match=r"the backward pass of head\.1 failed"):
            output.sum().backward()


def test_a_failing_backward_pass_is_named_too(ranks):
    ranks(2, check_the_backward_pass_is_named)


def check_double_backward(mismatch):
    net = Net()
    x = torch.randn(4, 3, requires_grad=True)
    if mismatch and dist.get_rank() == 1:
        net.head.eval()

    def step():
        [gradient] = torch.autograd.grad(net(x).pow(2).sum(), x, create_graph=True)
        gradient.square().sum().backward()

    if mismatch:
        return message_of(step)
    with (
        mock.patch.object(rank_checks, "check", wraps=rank_checks.check) as check,
        mock.patch.object(rank_checks, "enabled", True),
        collectives() as sent,
    ):
        step()
    assert check.call_count == len([kind for _, kind in sent if kind == torch.float64]) > 4
    return None


@pytest.mark.parametrize("mismatch", [False, True])
def test_every_collective_of_a_double_backward_is_checked_too(ranks, mismatch):
    ranks(2, check_double_backward, mismatch)


def check_names_that_differ_by_what_holds_the_model():
    net = Net()
    holder = nn.ModuleDict({"ema_source": net}) if dist.get_rank() == 0 else None
    with mock.patch.object(rank_checks, "enabled", True):
        net(torch.randn(4, 3)).sum().backward()
    del holder
    # A layer that is gone leaves its count to nobody, whatever takes its place in memory.
    for _ in range(5 if dist.get_rank() == 0 else 1):
        SyncBatchNorm(3)
    layer = SyncBatchNorm(3)
    with mock.patch.object(rank_checks, "enabled", True):
        layer(torch.randn(4, 3))


def test_a_rank_may_hold_its_model_in_something_larger(ranks):
    ranks(2, check_names_that_differ_by_what_holds_the_model)


def check_the_bare_function():
    x = torch.randn(4, 3 + dist.get_rank())
    with mock.patch.object(rank_checks, "enabled", True):
        sync_batch_norm(x[:, :3], None, None, training=True)


def test_the_bare_function_goes_by_its_own_name(ranks):
    ranks(2, check_the_bare_function)
    assert rank_checks.name_of(None) == "sync_batch_norm"


def count_checks(enabled):
    with mock.patch.object(rank_checks, "enabled", enabled), mock.patch.object(rank_checks, "check") as check:
        Net()(torch.randn(4, 3, requires_grad=True)).sum().backward()
    return check.call_count


def test_off_it_checks_nothing_and_on_every_collective(ranks):
    assert ranks(2, count_checks, False) == [0, 0]
    assert ranks(2, count_checks, True) == [4, 4]


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_switches_it(monkeypatch, value, expected):
    monkeypatch.delenv("SYNCBN_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("SYNCBN_DEBUG", value)
    fresh = module_from_spec(rank_checks.__spec__)  # another one, as a new process would import it
    rank_checks.__spec__.loader.exec_module(fresh)
    assert fresh.enabled is expected


def test_the_layer_is_named_by_the_largest_module_without_wrappers():
    net = Net()
    outer = nn.ModuleDict({"a": net})
    assert rank_checks.name_of(net.head[1]) == "a.head.1"
    del outer
    assert rank_checks.name_of(SyncBatchNorm(2)) == "a SyncBatchNorm"


@pytest.mark.parametrize("is_coalescing", [False, True])
def test_a_sum_inside_of_a_coalescing_context_is_left_to_torch(monkeypatch, is_coalescing):
    summed = []
    monkeypatch.setattr(nn_collectives, "GATHER_UP_TO", 0)
    monkeypatch.setattr(rank_checks, "coalescing_groups", lambda: {"a group": []} if is_coalescing else {})
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: summed.append(group))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    group = mock.Mock(**{"size.return_value": 2})
    rank_checks.sum_in_place(torch.ones(2), group, None, "forward")
    assert (summed == [group], group.allreduce.called) == (is_coalescing, not is_coalescing)
