"""Freezing and unfreezing under DistributedDataParallel: a stale wrapper is an error, a new one is right."""

import hashlib

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import convert_sync_batchnorm, freeze, unfreeze
from syncbn.torch_compat import ddp_without_buffer_sync
from tests.reference import make_batch, max_error, set_affine


def make_model():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
    return convert_sync_batchnorm(nn.Sequential(body, nn.ReLU(), nn.Linear(6, 1)).double())


def wrap(model):
    return ddp_without_buffer_sync(model) if dist.get_world_size() > 1 else model


def digest(model):
    state = {name: value for name, value in model.state_dict().items() if name.startswith("0.")}
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()


def train(model, num_steps, first_step=0):
    """Steps on uneven shards of the same global batches, whatever the world; a wrapper and an optimizer per call."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    model.train()
    for step in range(first_step, first_step + num_steps):
        input, _ = make_batch((9, 4), seed=step)
        optimizer.zero_grad()
        mine = input.tensor_split(world_size)[rank]
        (wrapped(mine).square().sum() * world_size / 9).backward()
        optimizer.step()


def check_stale():
    model = make_model()
    wrapped = wrap(model)
    wrapped(make_batch((4, 4))[0]).sum().backward()
    for change, verb in ((freeze, "frozen"), (unfreeze, "unfrozen")):
        change(model, "0.4")
        with pytest.raises(RuntimeError, match=rf"stale: 0.4.bias has been {verb} .*wrap again"):
            wrapped(make_batch((4, 4))[0])
        with torch.no_grad():
            wrapped.eval()(make_batch((4, 4))[0])  # in evaluation nothing can go wrong
        wrapped.train()
        wrapped = wrap(model)
        wrapped(make_batch((4, 4))[0]).sum().backward()


def test_the_next_forward_under_a_stale_wrapper_raises_on_every_rank(ranks):
    """Elsewhere: gradients that differ per rank without an error, or "Expected to have finished reduction"."""
    ranks(2, check_stale)


def check_swapped():
    model = make_model()
    freeze(model, "0.1")
    wrapped = wrap(model)
    wrapped(make_batch((4, 4))[0]).sum().backward()
    unfreeze(model, "0.1")
    freeze(model, "0.4")  # as many parameters as before, but others
    with pytest.raises(RuntimeError, match="stale"):
        wrapped(make_batch((4, 4))[0])


def test_a_swap_of_as_many_parameters_is_noticed(ranks):
    ranks(2, check_swapped)


def check_before_first_forward():
    model = make_model()
    wrapped = wrap(model)
    freeze(model, "0.4")
    with pytest.raises(RuntimeError, match="stale: 10 parameters were trained when it wrapped the model, 8 are now"):
        wrapped(make_batch((4, 4))[0])


def test_a_change_before_the_first_forward_is_noticed(ranks):
    ranks(2, check_before_first_forward)


def check_toggles():
    """A GAN switches its discriminator off by hand while the generator trains; freezing something else is no matter."""
    model, other = make_model(), make_model()
    freeze(other)
    wrapped = wrap(model)
    for _ in range(2):
        model.requires_grad_(False)
        input = make_batch((4, 4))[0].requires_grad_()
        wrapped(input).sum().backward()
        model.requires_grad_(True)
        wrapped(make_batch((4, 4))[0]).sum().backward()
        freeze(other, "0.1")
        unfreeze(other, "0.1")


def test_requires_grad_switched_by_hand_and_freezing_elsewhere_are_no_matter(ranks):
    ranks(2, check_toggles)


def check_reentrant():
    model = make_model()
    wrapped = wrap(Checkpointed(model))
    wrapped(make_batch((4, 4))[0].requires_grad_()).sum().backward()
    freeze(model, "0.4")
    with pytest.raises(RuntimeError, match="stale"):
        wrapped(make_batch((4, 4))[0].requires_grad_())


class Checkpointed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=True)


def test_a_stale_wrapper_is_noticed_under_reentrant_checkpointing(ranks):
    ranks(2, check_reentrant)


def check_fresh_wrappers_cost_nothing():
    model = make_model()
    freeze(model, "0.1")
    wrapped = wrap(model)
    wrapped(make_batch((4, 4))[0]).sum().backward()
    calls = []
    original = DistributedDataParallel._get_ddp_logging_data
    DistributedDataParallel._get_ddp_logging_data = lambda self: calls.append(1) or original(self)
    try:
        for _ in range(3):
            wrapped(make_batch((4, 4))[0]).sum().backward()
    finally:
        DistributedDataParallel._get_ddp_logging_data = original
    assert calls == []


def test_a_wrapper_that_fits_is_looked_at_once(ranks):
    ranks(2, check_fresh_wrappers_cost_nothing)


def check_two_hundred_steps():
    model = make_model()
    train(model, 3)
    freeze(model, "0", weights=True)
    before, head = digest(model), model[2].weight.clone()
    train(model, 200)
    assert digest(model) == before
    assert not torch.equal(model[2].weight, head)
    return before


def test_a_frozen_part_is_equal_by_sha256_after_two_hundred_steps_on_two_ranks(ranks):
    first, second = ranks(2, check_two_hundred_steps)
    assert first == second


def assert_equal_on_all_ranks(model):
    for value in model.state_dict().values():
        gathered = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, value)
        assert all(torch.equal(other, gathered[0]) for other in gathered)


def check_round_trip():
    """Freeze, 50 steps, unfreeze, 50 steps; the whole state bit-equal on all ranks after each."""
    model = make_model()
    freeze(model, "0", weights=True)
    train(model, 50)
    assert_equal_on_all_ranks(model)
    unfreeze(model, "0", weights=True)
    train(model, 50, first_step=50)
    assert_equal_on_all_ranks(model)
    assert model[0][1].num_batches_tracked == 50
    return model.state_dict()


def test_freeze_train_unfreeze_train_is_equal_at_one_and_two_ranks(ranks):
    [alone], [pair, _] = ranks(1, check_round_trip), ranks(2, check_round_trip)
    for name, value in alone.items():
        assert max_error(pair[name], value.double()) < 1e-9, name


def check_synchronizes_again():
    model = make_model()
    layer, parameters = model[0][1], dict(model.named_parameters())
    freeze(model)
    model(make_batch((4, 4))[0])
    unfreeze(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert (type(layer).__name__, layer.momentum, int(layer.num_batches_tracked)) == ("SyncBatchNorm", 0.1, 0)
    whole, rank = make_batch((6, 4))[0], dist.get_rank()
    hidden = model[0][0](whole)
    model[0][1](hidden.chunk(2)[rank])
    assert max_error(layer.running_mean, 0.1 * hidden.mean(0)) < 1e-12


def test_after_unfreeze_it_is_the_same_layer_and_synchronizes_again(ranks):
    """timm and detectron2 bring it back as another class, with momentum 0.1, counter 0 and new parameters."""
    ranks(2, check_synchronizes_again)


def check_mixed_precision(dtype):
    """A float32 frozen layer inside a half network, and a fully half one."""
    for parameter_dtype in (torch.float32, dtype):
        layer = convert_sync_batchnorm(nn.BatchNorm1d(4))
        layer(torch.randn(64, 4) * 3 + 50)
        set_affine(layer)
        layer = layer.to(parameter_dtype).freeze()
        input = (torch.randn(5, 4) * 3 + 5).to(dtype).requires_grad_()
        output = layer.train()(input)
        output.sum().backward()
        assert output.dtype == input.grad.dtype == dtype
        assert torch.equal(output, layer.eval()(input))
        state = {name: value.double() for name, value in layer.state_dict().items()}
        scale = state["weight"] / (state["running_var"] + layer.eps).sqrt()
        expected = (input.double() - state["running_mean"]) * scale + state["bias"]
        # One rounding of the result: everything before it is wide.
        assert max_error(output, expected) <= 1.02 * torch.finfo(dtype).eps / 2 * float(expected.abs().max())
        assert max_error(input.grad, scale.expand_as(input)) <= 1.02 * torch.finfo(dtype).eps / 2 * float(
            scale.abs().max()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_frozen_layer_in_mixed_precision(ranks, dtype):
    ranks(2, check_mixed_precision, dtype)
