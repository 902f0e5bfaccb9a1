"""Tools that look at operators (export, `torch.func`, `torch.fx`, traces) find `nn.BatchNorm`'s in a group of one.

A sum over ranks is an error there.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from syncbn import Monitor, SyncBatchNorm, accumulate_stats, convert_sync_batchnorm, disable_running_stats, freeze, fuse
from syncbn.training.models.resnet import ResnetSmall
from tests.reference import max_error


def make_pair(**options):
    """A small network as torch has it, and converted; float64, equal weights."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU()).double()
    return theirs, convert_sync_batchnorm(copy.deepcopy(theirs))


INPUTS = [
    torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 3.0
    for seed in range(5)
]


def make_input(seed=0):
    return INPUTS[seed].clone()


def targets(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


class Doubles(nn.BatchNorm2d):
    """A subclass with a forward of its own."""

    def forward(self, input):
        return super().forward(input) * 2


def make_subclass():
    theirs, ours = make_pair()
    for model in (theirs, ours):
        model[1] = Doubles(4).double()
    return theirs, convert_sync_batchnorm(ours)


def make_resnet():
    torch.manual_seed(0)
    theirs = ResnetSmall(3, 2, width=4, depth=1, stages=2).double()
    return theirs, convert_sync_batchnorm(copy.deepcopy(theirs))


def make_frozen():
    theirs, ours = make_pair()
    theirs[1].eval()
    freeze(ours, "1")
    return theirs, ours


def make_evaluated(**options):
    return tuple(model.eval() for model in make_pair(**options))


EXPORTED = {
    "plain": make_pair,
    "untracked": lambda: make_pair(track_running_stats=False),
    "without weight and bias": lambda: make_pair(affine=False),
    "subclass": make_subclass,
    "whole network": make_resnet,
    "frozen": make_frozen,
    "evaluation": make_evaluated,
    "evaluation, untracked": lambda: make_evaluated(track_running_stats=False),
}


def compare_steps(ours, theirs, steps=3):
    for step in range(steps):
        x = make_input(step)
        assert max_error(ours(x), theirs(x)) < 1e-12
    ours, theirs = ours.state_dict(), theirs.state_dict()
    for name, value in theirs.items():
        if name in ours:  # a strict export leaves out buffers that it does not read
            assert max_error(ours[name], value.double()) < 1e-12, name


@pytest.mark.filterwarnings("ignore:.*certain side effects:UserWarning")  # a subclass counts on a scratch counter
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["non-strict", "strict"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_an_export_is_that_of_batch_norm_and_moves_buffers_as_it_does(kind, strict):
    theirs, ours = EXPORTED[kind]()
    program = torch.export.export(ours, (make_input(),), strict=strict)
    exported = program.module()
    assert not [name for name in targets(program) if "syncbn" in name]
    if "evaluation" not in kind and kind not in ("frozen", "subclass"):
        expected = torch.export.export(theirs, (make_input(),), strict=strict)
        assert targets(program) == targets(expected)
    compare_steps(exported, theirs)
    assert not any(buffer.requires_grad for buffer in exported.buffers())
    exported(make_input()).sum().backward()
    assert not any(buffer.requires_grad for buffer in exported.buffers())


class Special(nn.Module):
    """What only this layer has: a mask, a residual, an activation, less memory, a cumulative average."""

    def __init__(self, **options):
        super().__init__()
        self.bn = SyncBatchNorm(3, dtype=torch.float64, **options)

    def forward(self, x, mask=None, residual=None):
        return self.bn(x, mask, residual)


ADDED = make_input(4)
MASK = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
SPECIAL = [
    ({"momentum": None}, (None, None)),
    ({"momentum": None}, (MASK, None)),
    ({}, (MASK, ADDED)),
    ({"activation": "relu"}, (None, ADDED)),
    ({"activation": "silu"}, (MASK, None)),
    ({"activation": "leaky_relu", "memory": "lean"}, (None, None)),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("options", "others"), SPECIAL, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_what_only_this_layer_has_is_exported_too(options, others, training):
    model = Special(**options).train(training)
    program = torch.export.export(copy.deepcopy(model), (make_input(), *others))  # which shares the buffers
    assert not [name for name in targets(program) if "syncbn" in name]
    exported = program.module()
    for step in range(3):
        assert max_error(exported(make_input(step), *others), model(make_input(step), *others)) < 1e-12
    for name, value in model.state_dict().items():
        assert max_error(exported.state_dict()[name], value.double()) < 1e-12, name
    results = []
    for one in (exported, model):
        leaf = make_input(3).requires_grad_()
        one(leaf, *others).sin().sum().backward()
        results.append(leaf.grad)
    assert max_error(*results) < 1e-11


def test_an_exported_layer_passes_over_a_batch_that_is_not_finite():
    model = Special(skip_nonfinite=True)
    exported = torch.export.export(copy.deepcopy(model), (make_input(),)).module()
    bad = make_input(1)
    bad[0, 0, 0, 0] = torch.inf
    for x in (make_input(), bad, make_input(2)):
        exported(x), model(x)
    assert model.bn.num_batches_tracked == 2
    for name, value in model.state_dict().items():
        assert max_error(exported.state_dict()[name], value.double()) < 1e-12, name


def test_an_export_with_disabled_statistics_moves_none():
    theirs, ours = make_pair()
    with disable_running_stats(ours):
        exported = torch.export.export(ours, (make_input(),)).module()
    assert max_error(exported(make_input()), theirs(make_input())) < 1e-12
    assert not any(name.endswith("running_mean") and value.any() for name, value in exported.state_dict().items())


def test_an_export_takes_any_batch_size():
    theirs, ours = make_pair()
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(ours, (make_input(),), dynamic_shapes=({0: batch},)).module()
    assert max_error(exported(make_input()[:5]), theirs(make_input()[:5])) < 1e-12


def losses(model):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return parameters, buffers, lambda p, b, x: functional_call(model, (p, b), (x,)).square().mean()


def plain_gradient(model):
    parameters, _, loss = losses(model)
    return grad(lambda p: loss(p, {}, make_input()))(parameters)


def gradient_with_buffers(model):
    parameters, buffers, loss = losses(model)
    return grad(lambda p: loss(p, buffers, make_input()))(parameters)


def per_sample_gradients(model):
    parameters, _, loss = losses(model)
    return vmap(grad(lambda p, x: loss(p, {}, x)), (None, 0))(parameters, make_input()[:, None])


def batched_forward(model):
    return vmap(model)(make_input().unflatten(0, (2, 4)))


def ensemble(model):
    parameters, buffers = stack_module_state([copy.deepcopy(model) for _ in range(2)])
    out = vmap(lambda p, b: functional_call(model, (p, b), (make_input(),)))(parameters, buffers)
    return out, buffers


def forward_derivative(model):
    return jvp(model, (make_input(),), (make_input(1),))


def reverse_jacobian(model):
    return jacrev(lambda s: model(make_input() * s).square().mean((0, 2, 3)))(torch.ones(3, 1, 1).double())


def forward_jacobian(model):
    return jacfwd(lambda s: model(make_input() * s).square().mean((0, 2, 3)))(torch.ones(3, 1, 1).double())


def second_derivative(model):
    return hessian(lambda s: model(make_input().square() * s).square().sum())(torch.tensor(1.5).double())


def dual_numbers(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(make_input(), make_input(1)))).tangent


def batched_gradients(model):
    output = model(make_input().requires_grad_())
    several = torch.stack([torch.ones_like(output), output.detach().square()])
    return torch.autograd.grad(output, list(model.parameters()), several, is_grads_batched=True)


def batched_backward(model):
    """Gradients of a graph that was recorded before."""
    output = model(make_input().requires_grad_())
    several = torch.stack([torch.ones_like(output), output.detach().square()])
    return vmap(lambda one: torch.autograd.grad(output, list(model.parameters()), one))(several)


def vectorized_jacobian(model):
    def function(scale):
        return model(make_input() * scale).square().mean((0, 2, 3))

    return torch.autograd.functional.jacobian(function, torch.ones(3, 1, 1).double(), vectorize=True)


def functional(model):
    _, buffers, _ = losses(model)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    return functional_call(model, buffers, (make_input(),)), buffers


TRANSFORMS = [
    plain_gradient, gradient_with_buffers, per_sample_gradients, batched_forward, ensemble, forward_derivative,
    reverse_jacobian, forward_jacobian, second_derivative, dual_numbers, batched_gradients, batched_backward,
    vectorized_jacobian, functional,
]  # fmt: skip
LAYERS = {
    "tracked": {},
    "untracked": {"track_running_stats": False},
    "evaluation": {},
}


def outcome(transform, model):
    """What it returns, or its error; and the model's buffers after it."""
    try:
        result = transform(model)
    except RuntimeError as error:
        result = str(error).splitlines()[0]
    return result, dict(model.named_buffers())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda function: function.__name__)
def test_transforms_do_what_they_do_to_batch_norm(transform, layer):
    pair = make_pair(**LAYERS[layer])
    (expected, buffers), (actual, moved) = (outcome(transform, model.train(layer != "evaluation")) for model in pair)
    if isinstance(expected, str):
        assert actual == expected
        assert moved["1.num_batches_tracked"] == 0
        assert not moved["1.running_mean"].any()
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(moved, buffers, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "transform",
    [
        plain_gradient,
        *(pytest.param(other, marks=pytest.mark.slow) for other in (per_sample_gradients, batched_forward, ensemble)),
    ],
)
def test_a_transform_inside_of_a_compiled_function_is_that_of_batch_norm(transform):
    theirs, ours = make_pair(track_running_stats=transform is ensemble)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: transform(ours), backend="aot_eager", fullgraph=transform is plain_gradient)
    torch.testing.assert_close(compiled(), transform(theirs), rtol=1e-9, atol=1e-10)


def test_an_ensemble_with_a_cumulative_average_needs_no_number_on_the_host():
    """torch's own reads the counter there, which vmap refuses."""
    theirs, ours = make_pair(momentum=None)
    _, buffers = ensemble(ours)
    theirs(make_input())
    assert max_error(buffers["1.running_var"][1], theirs[1].running_var) < 1e-12


def watching(model):
    return Monitor(model).watch()


@pytest.mark.parametrize(
    ("context", "training", "attempt"),
    [
        (accumulate_stats, True, batched_forward),
        (watching, True, batched_forward),
        (watching, False, batched_forward),
        (watching, True, lambda model: torch.export.export(model, (make_input(),))),
        (watching, False, lambda model: torch.export.export(model, (make_input(),))),
    ],
)
def test_a_context_that_collects_statistics_is_left_first(context, training, attempt):
    _, ours = make_pair()
    ours.train(training)
    with context(ours), pytest.raises(RuntimeError, match="leave that context first"):
        attempt(ours)
    attempt(ours.eval())


def test_only_the_residual_may_be_batched():
    for layer in (SyncBatchNorm(3, activation="relu").double().eval(), SyncBatchNorm(3, track_running_stats=False)):
        input, residuals = make_input(), torch.stack([ADDED, ADDED + 1.0])
        output = vmap(lambda one, layer=layer: layer.double()(make_input(), residual=one))(residuals)
        assert max_error(output[1], layer(input, residual=residuals[1])) < 1e-12


def test_a_lean_layer_refuses_batched_gradients():
    layer = SyncBatchNorm(3, memory="lean", dtype=torch.float64)
    output = layer(make_input().requires_grad_())
    with pytest.raises(RuntimeError, match=r"differentiated or batched .create_graph=True, vmap.; use memory="):
        vmap(lambda one: torch.autograd.grad(output, layer.weight, one))(torch.ones(2, *output.shape).double())


def check_strict():
    x = make_input()
    with pytest.raises(Exception, match=r"sums over 2 ranks.*call model.eval\(\), freeze"):
        torch.export.export(make_pair()[1], (x,), strict=True)
    model = make_pair()[1].eval()
    assert max_error(torch.export.export(model, (x,), strict=True).module()(x), model(x)) < 1e-12


@pytest.mark.slow
def test_a_sum_over_ranks_is_an_error_of_a_strict_export_too(ranks):
    ranks(2, check_strict)


def check_group():
    x = make_input().chunk(2)[dist.get_rank()]
    for model in (make_pair()[1], make_pair(track_running_stats=False)[1]):
        before = copy.deepcopy(model.state_dict())
        for attempt in (
            lambda model=model: torch.export.export(model, (x,)),
            lambda model=model: torch.jit.trace(model, x),
            lambda model=model: grad(lambda p: functional_call(model, p, (x,)).sum())(dict(model.named_parameters())),
            lambda model=model: vmap(model)(x[:, None]),
            lambda model=model: jvp(model, (x,), (x,)),
            lambda model=model: dual_numbers(model),
            lambda model=model: make_fx(model)(x),
        ):
            with pytest.raises(Exception, match=r"sums over 2 ranks.*call model.eval\(\), freeze"):
                attempt()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        model.eval()
        exported = torch.export.export(model, (x,))
        assert not [name for name in targets(exported) if "syncbn" in name]
        assert max_error(exported.module()(x), model(x)) < 1e-12
        assert max_error(vmap(model)(x[:, None])[0], model(x[:1])) < 1e-12
    model = make_pair()[1]
    with pytest.raises(RuntimeError, match="sums over 2 ranks"):
        batched_backward(model)
    with pytest.raises(RuntimeError, match="sum over ranks in the backward pass of 1 failed: Batching rule not impl"):
        batched_gradients(model)
    freeze(model, "1")
    assert max_error(torch.export.export(model, (x,)).module()(x), model(x)) < 1e-12


def test_a_sum_over_ranks_is_an_error_that_says_so_and_evaluation_is_none(ranks):
    ranks(2, check_group)


def calls(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("make", [make_pair, make_subclass], ids=["layer", "subclass"])
def test_fx_records_a_layer_as_one_call(make):
    theirs, ours = make()
    graph = fx.symbolic_trace(ours)
    assert calls(graph) == ["0", "1", "2"]
    compare_steps(graph, theirs)  # and it trains
    freeze(ours, "1")
    before = ours[1].running_mean.clone()
    graph(make_input())
    assert torch.equal(before, ours[1].running_mean)  # the layer, not what it did when it was traced


def test_fx_records_residual_and_mask():
    model = fx.symbolic_trace(Special(activation="relu"), {"mask": None})
    assert [(node.target, list(node.kwargs)) for node in model.graph.nodes if node.op == "call_module"] == [
        ("bn", ["residual"])
    ]
    assert (model(make_input(), None, ADDED) >= 0).all()


class OwnForward(SyncBatchNorm):
    def forward(self, input):
        return super().forward(input) + 1.0


def test_fx_refuses_what_it_would_apply_twice():
    _, hooked = make_pair()
    hooked[1].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    with pytest.raises(TypeError, match="SyncBatchNorm with forward hooks as one call: trace with a Tracer whose"):
        fx.symbolic_trace(hooked)
    with pytest.raises(TypeError, match="OwnForward with a forward of its own as one call"):
        fx.symbolic_trace(nn.Sequential(OwnForward(3)))


def test_fx_traces_a_fused_network():
    torch.manual_seed(0)
    model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).double()
    plain = copy.deepcopy(model)
    fuse(model)
    compare_steps(fx.symbolic_trace(model), plain)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_jit_trace_is_that_of_batch_norm(training, tmp_path):
    theirs, ours = (model.train(training) for model in make_pair())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # torch ignores these warnings about its own modules; the tests' filters have precedence over that.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="torch.nn.functional")
        traced = torch.jit.trace(ours, make_input(), check_trace=False)
        torch.jit.save(traced, tmp_path / "model.pt")
        traced = torch.jit.load(tmp_path / "model.pt")
    if training:
        theirs(make_input())  # the trace has made one step
    assert "PythonOp" not in str(traced.inlined_graph)
    compare_steps(traced, theirs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("make", [make_pair, make_subclass], ids=["layer", "subclass"])
def test_torchscript_is_refused_with_the_remedy_and_nothing_is_changed(make):
    theirs, ours = make()
    layers = list(ours)
    with pytest.raises(TypeError, match=r"torch.jit.script does not take a Sync\w+: script a model in which"):
        torch.jit.script(ours)
    assert list(ours) == layers
    compare_steps(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_make_fx_records_a_step(training):
    theirs, ours = (model.train(training) for model in make_pair())
    program = make_fx(ours)(make_input())
    if training:
        theirs(make_input())
    for step in range(2):
        assert max_error(program(make_input(step)), theirs(make_input(step))) < 1e-12
    assert max_error(ours[1].running_mean, theirs[1].running_mean) < 1e-12
