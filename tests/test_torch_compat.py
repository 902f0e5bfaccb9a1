"""What the package asks of torch's private API is there, and is what `torch_compat` says it is."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from syncbn import torch_compat


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_seen += 1
        return func(*args, **(kwargs or {}))


def test_modes_do_not_see_what_is_hidden_from_them():
    with Counting() as mode:
        torch.ones(2) + 1
        before = mode.num_seen
        with torch_compat.hidden_from_modes():
            torch.ones(2) + 1
        assert (before > 0, mode.num_seen) == (True, before)


def test_a_backward_pass_has_a_number_and_outside_there_is_none():
    numbers = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: numbers.append(torch_compat.backward_pass()))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert torch_compat.backward_pass() == -1
    assert -1 not in numbers
    assert len(set(numbers)) == 2


def test_the_hooks_that_intercept_saved_tensors_are_those_that_were_set():
    assert torch_compat.saved_tensor_hooks() is None

    def pack(tensor):
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        hooks = torch_compat.saved_tensor_hooks()
        assert hooks == (pack, unpack)
        assert torch_compat.checkpoint_frame(pack) is None  # somebody else's


def test_both_runs_of_a_checkpoint_have_the_same_frame_and_another_checkpoint_another_one():
    frames = []

    def forward(x):
        frames.append(torch_compat.checkpoint_frame(torch_compat.saved_tensor_hooks()[0]))
        return (x * 2).sin()

    for _ in range(2):
        checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    first, first_again, second, second_again = frames
    assert first is first_again is not None
    assert second is second_again is not first


def test_an_assertion_on_the_device_raises_on_the_cpu():
    torch_compat.assert_on_device(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="what is wrong"):
        torch_compat.assert_on_device(torch.tensor(False), "what is wrong")


class SeesItsWrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        self.wrapper = torch_compat.ddp_around()
        return self.trained(x)


def check_wrapper_and_timeout():
    model = SeesItsWrapper()
    wrapped = DistributedDataParallel(model)
    wrapped(torch.ones(1, 2))
    assert model.wrapper is wrapped
    assert torch_compat.ddp_around() is None
    assert torch_compat.num_parameters_reduced_by(wrapped) == 2
    group = dist.new_group(timeout=torch_compat.timeout_of(dist.group.WORLD) / 2)
    assert torch_compat.timeout_of(group) * 2 == torch_compat.timeout_of(dist.group.WORLD, "cpu")


def test_the_wrapper_around_a_forward_what_it_reduces_and_how_long_a_group_waits(ranks):
    ranks(2, check_wrapper_and_timeout)


def test_a_compiled_module_is_known_by_its_name():
    model = nn.Linear(2, 2)
    assert torch_compat.is_compiled(torch.compile(model, backend="eager"))
    assert not torch_compat.is_compiled(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_element_that_is_not_finite_is_found_and_nothing_changes(bad, dtype):
    tensors = [torch.randn(3, dtype=dtype), torch.randn(2, 2, dtype=dtype)]
    before = [tensor.clone() for tensor in tensors]
    assert torch_compat.has_non_finite(tensors) == 0
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
    tensors[1][1, 0] = bad
    assert torch_compat.has_non_finite(tensors) == 1


def test_the_state_of_a_loss_scaler_is_that_of_its_state_dict():
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(torch.ones(()))  # makes the tensors
    scale, age = torch_compat.scaler_state(scaler)
    assert (scale.item(), age.item()) == (scaler.state_dict()["scale"], scaler.state_dict()["_growth_tracker"])
