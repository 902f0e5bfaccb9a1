"""What the package asks of torch's private API is there, and is what `torch_compat` says it is."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, torch_compat


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.num_seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_seen += 1
        return func(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def intercepted(_=None):
    return any(active() for active in torch_compat.INTERCEPTORS)


def inside(context):
    with context:
        return intercepted()


def inside_vmap():
    seen = []
    torch.func.vmap(lambda x: seen.append(intercepted()) or x)(torch.ones(2))
    return seen[0]


def inside_trace():
    seen = []
    torch.jit.trace(lambda x: seen.append(intercepted()) or x + 1, torch.ones(2), check_trace=False)
    return seen[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.11, of its only cycle
@pytest.mark.parametrize(
    "look",
    [
        lambda: inside(Counting()),
        lambda: inside(Passing()),
        lambda: inside(profile(activities=[ProfilerActivity.CPU])),
        inside_vmap,
        inside_trace,
    ],
    ids=["dispatch mode", "function mode", "profiler", "vmap", "jit.trace"],
)
def test_what_comes_between_an_operator_and_its_implementation_is_known(look):
    assert not intercepted()
    assert look()
    assert not intercepted()


def test_the_mode_of_make_fx_and_the_level_of_forward_differentiation_are_known():
    found = []

    def look(x):
        found.append(
            (torch_compat.proxy_mode() is not None, torch_compat.forward_ad_level(), torch_compat.has_tangent(x))
        )
        return x + 1

    x = torch.ones(2)
    look(x)
    make_fx(look)(x)
    with forward_ad.dual_level():
        look(x)
        look(forward_ad.make_dual(x, x))
    look(x)
    outside = (False, -1, False)
    assert found == [outside, (True, -1, False), (False, 0, False), (False, 0, True), outside]


@pytest.mark.parametrize("has_argument", [True, False])
def test_a_layer_without_a_bias_is_built_by_every_version(monkeypatch, has_argument):
    monkeypatch.setattr(torch_compat, "_HAS_BIAS_ARGUMENT", has_argument and torch_compat._HAS_BIAS_ARGUMENT)
    layer = SyncBatchNorm(3, bias=False)
    assert (next(iter(layer.state_dict())), layer.bias) == ("weight", None)
    layer.weight.data.fill_(2.0)
    layer.reset_parameters()
    assert layer.weight.tolist() == [1.0, 1.0, 1.0]


class Buffered(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("value", torch.tensor(value))

    def forward(self, x):
        return x * self.weight + self.value


def check_buffers(has_argument):
    before = torch_compat._HAS_FORWARD_SYNC_BUFFERS
    torch_compat._HAS_FORWARD_SYNC_BUFFERS = before and has_argument
    rank = float(dist.get_rank())
    model = Buffered(rank)
    try:
        wrapped = torch_compat.ddp_without_buffer_sync(model)
    finally:
        torch_compat._HAS_FORWARD_SYNC_BUFFERS = before  # ranks are used again
    assert model.value == 0.0  # broadcast at construction
    model.value.fill_(rank)
    wrapped(torch.ones(1)).sum().backward()
    assert model.value == rank


@pytest.mark.parametrize("has_argument", [True, False])
def test_buffers_are_broadcast_when_a_model_is_wrapped_and_not_again(ranks, has_argument):
    ranks(2, check_buffers, has_argument)


def test_modes_do_not_see_what_is_hidden_from_them():
    with Counting() as mode:
        torch.ones(2) + 1
        before = mode.num_seen
        with torch_compat.hidden_from_modes():
            torch.ones(2) + 1
        assert (before > 0, mode.num_seen) == (True, before)


def test_the_arguments_of_an_operator_have_names_and_a_tensor_knows_that_it_was_written_to():
    assert torch_compat.argument_names(torch.ops.aten.dropout.default) == ["input", "p", "train"]
    tensor = torch.ones(2)
    assert not torch_compat.is_written(tensor)
    assert torch_compat.is_written(tensor.add_(1))


def test_an_optimizer_says_whether_it_takes_the_scale_of_gradients():
    parameters = [nn.Parameter(torch.ones(1))]
    assert torch_compat.takes_grad_scale(torch.optim.Adam(parameters, fused=True))
    assert not torch_compat.takes_grad_scale(torch.optim.Adam(parameters))


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


def test_a_constant_of_a_compiled_graph_is_computed_while_tracing_alone():
    calls = []

    @torch_compat.assume_constant_result
    def constant():
        calls.append(1)  # a side effect that Dynamo would refuse to trace, or repeat
        return 2.0

    compiled = torch.compile(lambda x: x * constant(), backend="eager", fullgraph=True)
    assert [compiled(torch.tensor(3.0)).item() for _ in range(3)] == [6.0] * 3
    assert len(calls) == 1


def test_an_export_is_told_from_a_compilation():
    class Told(nn.Module):
        def forward(self, x):
            return x + 1 if torch_compat.is_exporting() else x * 3

    x = torch.ones(1)
    compiled = torch.compile(Told(), backend="eager", fullgraph=True)
    assert compiled(x) == 3
    assert torch.export.export(Told(), (x,)).module()(x) == 2
    assert compiled(x) == 3
    assert not torch_compat.is_exporting()


def test_a_compiled_module_is_known_by_its_name():
    model = nn.Linear(2, 2)
    assert torch_compat.is_compiled(torch.compile(model, backend="eager"))
    assert not torch_compat.is_compiled(model)


@pytest.mark.parametrize("cls", [nn.BatchNorm2d, SyncBatchNorm])
def test_a_parametrized_class_is_the_one_that_register_parametrization_makes(cls):
    layer = cls(3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    made = torch_compat.parametrized_class(cls)
    assert (made.__name__, made.__module__, made.__bases__) == (
        type(layer).__name__,
        parametrize.__name__,
        type(layer).__bases__,
    )
    assert {*vars(made), "weight"} == {*vars(type(layer))}
    assert torch_compat.parametrized_class(cls) is not made


class HasEps(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1.0

    @property
    def eps(self):
        return torch_compat.eps_in_dynamo(self)

    @eps.setter
    def eps(self, value):
        torch_compat.set_eps(self, value)

    def forward(self, input):
        return input + self.eps


def test_dynamo_reads_an_eps_that_is_a_property_and_guards_it():
    torch._dynamo.reset()
    module = HasEps()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(torch.ones(())) == 2.0
    module.eps = 2.0
    assert compiled(torch.ones(())) == 3.0
    assert module.__dict__["eps"] == module.eps == 2.0


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


@pytest.mark.parametrize("make", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_the_vectors_that_spectral_norm_moves_are_named_with_what_removes_them(make):
    module = make(nn.Linear(4, 3))
    [(names, removal)] = torch_compat.power_iterations(module)
    buffers = dict(module.named_buffers())
    before = {name: buffers[name].clone() for name in names.split(" and ")}
    module(torch.randn(2, 4))
    assert not any(torch.equal(value, buffers[name]) for name, value in before.items())
    eval(removal, {"torch": torch, "module": module})
    assert list(torch_compat.power_iterations(module)) == []
    assert list(torch_compat.power_iterations(parametrizations.weight_norm(nn.Linear(4, 3)))) == []


def test_a_replica_of_data_parallel_is_known_and_is_given_its_buffers():
    layer = SyncBatchNorm(3).freeze()
    replica = layer._replicate_for_data_parallel()
    assert torch_compat.is_replica(replica)
    assert not torch_compat.is_replica(layer)
    replica.num_batches_tracked = layer.num_batches_tracked
    replica.running_mean = mean = layer.running_mean.clone()
    assert replica.running_mean is mean


def test_a_schedule_may_step_before_an_optimizer_that_counts_as_stepped():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    torch_compat.count_as_stepped(optimizer)
    schedule.step()  # a warning would be an error
    assert schedule.last_epoch == 1
