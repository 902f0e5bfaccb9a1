"""disable_running_stats: forwards normalize with the batch as always, and leave no trace in the statistics."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from syncbn import (
    Monitor,
    SyncBatchNorm,
    accumulate_stats,
    audit,
    convert_sync_batchnorm,
    disable_running_stats,
    freeze,
    precise_bn,
    revert_sync_batchnorm,
    unfreeze,
)
from tests.counting import collectives

X = torch.randn(6, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3


class CallsTheFunction(nn.BatchNorm2d):
    def forward(self, input):
        self.num_batches_tracked += 1
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum
        )


def network():
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), CallsTheFunction(4))
    return convert_sync_batchnorm(nn.Sequential(*parts)).double()


def check_state(model, expected):
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


def step(model, x=X):
    """Output and gradients of a step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model(x)
    output.pow(2).sum().backward()
    return output.detach(), x.grad, *(parameter.grad for parameter in model.parameters())


def test_outputs_and_gradients_are_those_of_any_forward_and_nothing_moves():
    model = network()
    model(2 * X)
    before, expected = copy.deepcopy(model.state_dict()), step(copy.deepcopy(model))
    with disable_running_stats(model):
        actual = step(model)
    check_state(model, before)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    model(X)
    assert model[1].num_batches_tracked == model[4].num_batches_tracked == 2


def test_it_nests_and_survives_exceptions():
    model = network()
    before = copy.deepcopy(model.state_dict())
    with disable_running_stats(model, "1"):
        with pytest.raises(ZeroDivisionError), disable_running_stats(model):
            model(X) / (1 / 0)
        check_state(model, before)
        model(X)
    assert [int(model[number].num_batches_tracked) for number in (1, 4)] == [0, 1]
    model(X)
    assert model[1].num_batches_tracked == 1
    assert not any("_stats_disabled" in module.__dict__ for module in model.modules())


def test_contexts_that_end_in_another_order_end_all_the_same():
    layer = SyncBatchNorm(3)
    first, second = disable_running_stats(layer), disable_running_stats(layer)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    layer(X.float())
    assert layer.num_batches_tracked == 0
    second.__exit__(None, None, None)
    layer(X.float())
    assert layer.num_batches_tracked == 1


def test_frozen_layers_stay_frozen_and_evaluation_is_evaluation():
    model = network()
    model(X)
    freeze(model, "1")
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        model.train(mode)
        expected = copy.deepcopy(model)(2 * X)
        with disable_running_stats(model):
            assert torch.equal(model(2 * X), expected)
    check_state(model, before)
    with disable_running_stats(model):
        unfreeze(model.train())
        model(X)
    check_state(model, before)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", ["forward", "backward", "both"])
def test_a_recomputation_inside_or_outside_moves_nothing_and_computes_the_same(reentrant, inside):
    model = network()
    expected, state = step(copy.deepcopy(model)), copy.deepcopy(model.state_dict())
    x = X.clone().requires_grad_()
    contexts = {name: disable_running_stats(model) for name in ("forward", "backward", "both")}
    if inside != "backward":
        contexts[inside].__enter__()
    output = checkpoint(model, x, use_reentrant=reentrant)
    if inside == "forward":
        contexts[inside].__exit__(None, None, None)
    if inside == "backward":
        state = copy.deepcopy(model.state_dict())
        contexts[inside].__enter__()
    output.pow(2).sum().backward()
    check_state(model, state)
    assert model[1].num_batches_tracked == int(inside == "backward")
    for one, other in zip((output, x.grad, *(p.grad for p in model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_compiled_code_follows_the_switch():
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4, activation="relu")).double()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for run, net in ((compiled, model), (plain, plain)):
            run(X)
            with disable_running_stats(net):
                run(2 * X)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=1e-12, atol=1e-12)
    assert model[1].num_batches_tracked == 2
    assert counters["stats"]["unique_graphs"] == 2


def check_over_ranks():
    rank = dist.get_rank()
    model = network()
    shard = X.split([4, 2])[rank]
    with collectives() as expected:
        outputs = step(copy.deepcopy(model), shard)
    before = copy.deepcopy(model.state_dict())
    with collectives() as sent, disable_running_stats(model):
        actual = step(model, shard)
    assert sent == expected
    assert len(sent) == 4
    check_state(model, before)
    for one, other in zip(actual, outputs, strict=True):
        assert torch.equal(one, other)


def test_collectives_are_the_same(ranks):
    ranks(2, check_over_ranks)


def test_micro_batches_inside_are_left_out_of_the_pool():
    layer, plain = SyncBatchNorm(3).double(), SyncBatchNorm(3).double()
    with accumulate_stats(layer):
        layer(X[:4])
        with disable_running_stats(layer):
            layer(5 * X)
    with accumulate_stats(plain):
        plain(X[:4])
    check_state(layer, plain.state_dict())
    with disable_running_stats(layer), accumulate_stats(layer):
        layer(X)
    check_state(layer, plain.state_dict())


def test_a_monitor_sees_the_batch_and_the_audit_judges_the_model():
    model = network().requires_grad_(False)
    monitor = Monitor(model)
    findings = audit(model, batch=X)
    assert findings
    with disable_running_stats(model):
        with monitor.watch():
            model(X)
        assert audit(model, batch=X) == findings
    snapshot = monitor.snapshot()["1"]
    torch.testing.assert_close(snapshot.batch_mean, model[0](X).mean((0, 2, 3)))
    assert snapshot.running_mean.abs().max() == 0


def test_precise_bn_inside_is_an_error():
    model = network()
    with disable_running_stats(model, "4"), pytest.raises(RuntimeError, match="disable_running_stats of this model"):
        precise_bn(model, [X])
    precise_bn(model, [X])


def test_copies_pickles_and_reverted_layers_know_nothing_of_the_context():
    model = network()
    with disable_running_stats(model):
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), revert_sync_batchnorm(model)]
        for other in others:
            other(X)
            assert other[1].num_batches_tracked == 1
    convert_sync_batchnorm(model)(X)
    assert model[1].num_batches_tracked == 2


def test_buffers_that_functional_call_brings_do_not_move():
    layer = SyncBatchNorm(3).double()
    brought = {name: value.clone() for name, value in layer.state_dict().items()}
    with disable_running_stats(layer):
        torch.func.functional_call(layer, brought, (X,))
    check_state(layer, brought)


def test_patterns_are_those_of_freeze():
    model = nn.Module()
    model.backbone, model.head = network(), network()
    with disable_running_stats(model, "*", exclude="head"):
        model.head(model.backbone(X)[:, :3].repeat(1, 1, 2, 2))
    assert [part[1].num_batches_tracked.item() for part in (model.backbone, model.head)] == [0, 1]
    with (
        pytest.raises(ValueError, match=r"selects no module; did you mean backbone"),
        disable_running_stats(model, "bakbone"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="selects no SyncBatchNorm with running"),
        disable_running_stats(model, "head.0"),
    ):
        pass


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (nn.BatchNorm2d, r"1 is a BatchNorm2d: .* convert the model with syncbn.convert_sync_batchnorm first"),
        (nn.SyncBatchNorm, "1 is a SyncBatchNorm: .* syncbn.convert_sync_batchnorm first"),
        (lambda width: nn.InstanceNorm2d(width, track_running_stats=True), "1 is a InstanceNorm2d .* exclude='1'"),
    ],
)
def test_a_layer_of_another_class_is_an_error_that_disables_nothing(kind, message):
    model = nn.Sequential(SyncBatchNorm(3), kind(3), nn.InstanceNorm2d(3), SyncBatchNorm(3, track_running_stats=False))
    with pytest.raises(TypeError, match=message), disable_running_stats(model):
        pass
    with disable_running_stats(model, exclude="1"):
        model[0](X.float())
    assert model[0].num_batches_tracked == 0
    model[0](X.float())
    assert model[0].num_batches_tracked == 1


def test_a_lazy_layer_counts_from_its_first_batch_outside():
    model = convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))
    with disable_running_stats(model):
        model(X.float())
    assert model[0].num_batches_tracked == 0
    model(X.float())
    assert model[0].num_batches_tracked == 1
