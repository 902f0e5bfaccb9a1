"""`bn.virtual_ranks`: one process does what that many ranks with local statistics do."""

import copy
import json

import pytest
import torch
from torch import nn

from syncbn.stats.monitor import Monitor
from syncbn.training.checkpoint.files import read
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.sampler import Sampler
from syncbn.training.models.virtual_ranks import VirtualBatchNorm, make_virtual
from tests.training.jobs import read_metrics

# 104 training samples: the last batch of an epoch has 8; with batches of 17 it has 2, and leaves ranks without samples.
SMALL = ["data=synthetic", "data.num_samples=130", "data.size=8", "model.width=4", "precision=fp64", "log_every=1",
         "schedule=constant", "eval_every=3", "tracker=none", "bn.sync=false", "save.every=99"]  # fmt: skip


def numbers(run):
    """Every loss and metric on the way, and the last checkpoint's weights and statistics."""
    records = [{k: v for k, v in r.items() if k.startswith(("train/loss", "val/"))} for r in read_metrics(run)]
    content = read(sorted((run / "checkpoints").glob("step_*.pt"))[-1], "load")
    return [record for record in records if record], content["model"], content.get("average", {})


@pytest.mark.parametrize(
    ("num_ranks", "virtual", "processes", "extra"),
    [
        (2, 2, 1, ["batch_size=16", "bn.momentum=cumulative"]),
        pytest.param(4, 4, 1, ["batch_size=17", "ema=0.5"], marks=pytest.mark.slow),
        pytest.param(4, 4, 2, ["batch_size=17", "accumulate=2"], marks=pytest.mark.slow),
    ],
    ids=["2 in 1", "4 in 1", "4 in 2"],
)
def test_a_run_is_that_of_real_ranks_resumed_too(job, num_ranks, virtual, processes, extra):
    found = []
    for name, ranks, bn in (("real", num_ranks, []), ("virtual", processes, [f"bn.virtual_ranks={virtual}"])):
        for duration in (5, 9):  # stopped and resumed in the first epoch, which ends raggedly with step 7
            run = job(*SMALL, *extra, *bn, f"run={name}", f"duration={duration}", num_ranks=ranks)
        found.append(numbers(run))
    (records, weights, averaged), (others, *_) = found
    assert len(records) > 9
    for one, other in zip(records, others, strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    assert list(weights) == list(found[1][1])  # the keys of nn.BatchNorm2d
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(dict(one), dict(other), rtol=0, atol=1e-9)
    assert bool(averaged) == ("ema=0.5" in extra)


def test_the_groups_are_cut_as_ranks_are():
    whole = Sampler(37, 10, 3, 0, 0, 1)
    ranks = [Sampler(37, 10, 3, 0, rank, 6) for rank in range(6)]
    processes = [Sampler(37, 10, 3, 0, rank, 2, groups_per_rank=3) for rank in range(2)]
    for step in range(2 * whole.steps_per_epoch):
        for number in range(len(whole.shards(step))):
            groups = [g for p in processes for g in p.shards(step)[number].index.tensor_split(3)]
            assert [g.tolist() for g in groups] == [r.shards(step)[number].index.tolist() for r in ranks]
        assert [n for p in processes for n in p.num_seen(step)] == [n for r in ranks for n in r.num_seen(step)]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_layer_is_one_layer_for_each_group(momentum):
    plain = nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    groups = [copy.deepcopy(plain) for _ in range(3)]
    layer = copy.deepcopy(plain)
    make_virtual(layer, 3)
    for _ in range(2):
        input = torch.randn(7, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        output, expected = layer(input), torch.cat([g(x) for g, x in zip(groups, input.tensor_split(3), strict=True)])
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(y.pow(3).sum(), input)[0] for y in (output, expected)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    means, variances = (torch.stack([getattr(g, f"running_{name}") for g in groups]) for name in ("mean", "var"))
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    torch.testing.assert_close(layer.running_var, variances.mean(0) + means.var(0, correction=0))
    assert layer.num_batches_tracked == 2


def test_the_state_dict_is_that_of_batch_norm_and_every_group_goes_on_from_it():
    layer, plain = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    make_virtual(layer, 2)
    plain(torch.randn(5, 2))
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert torch.equal(layer.group_mean, plain.running_mean.expand(2, 2))
    assert torch.equal(layer.group_var, plain.running_var.expand(2, 2))
    assert torch.equal(layer.eval()(torch.ones(1, 2)), plain.eval()(torch.ones(1, 2)))


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Sequential(Own(2)), "bn.virtual_ranks: 0 is a Own, expected nn.BatchNorm1d, 2d or 3d"),
        (nn.ReLU(), "bn.virtual_ranks: the model has no batch normalization; set bn.virtual_ranks=null"),
    ],
    ids=["subclass", "none"],
)
def test_a_model_that_cannot_be_is_an_error(layer, message):
    with pytest.raises(ConfigError, match=message):
        make_virtual(layer, 2)


def test_ranks_that_cannot_be_shared_out_and_statistics_that_cannot_be_frozen_are_errors(job):
    with pytest.raises(AssertionError, match=r"bn.virtual_ranks: expected a multiple of the 2 ranks.*, got 3"):
        job(*SMALL, "bn.virtual_ranks=3", "duration=1", num_ranks=2)
    with pytest.raises(ConfigError, match=r"freeze.bn_stats: backbone.stem.bn is a VirtualBatchNorm"):
        job(*SMALL, "bn.virtual_ranks=2", "duration=1", "freeze=bn_stats")


def test_the_audit_and_the_monitor_see_the_groups_and_other_tasks_plain_layers(job, tmp_path):
    run = job(*SMALL, "bn.virtual_ranks=8", "batch_size=16", "duration=2", "run=a")
    findings = json.loads((run / "audit.json").read_text())["findings"]
    assert {(one["rule"], "2 samples" in one["why"]) for one in findings} == {("few-values-per-channel", True)}
    job("task=eval", "eval.precise_bn=2", f"load={run}", "run=b", num_ranks=3)
    layer = nn.BatchNorm1d(2)
    make_virtual(layer, 4)
    monitor = Monitor(layer)
    with monitor.watch():
        layer(torch.randn(12, 2))
    assert monitor.snapshot()[""].values_per_channel == 3
    assert isinstance(copy.deepcopy(layer), VirtualBatchNorm)
