"""Every row of the tables of docs/compatibility.md: what it says works does, and what is refused says what it quotes.

A case is a function with the name of its row. It returns the messages of what it has seen refused, in which the row's
quotations have to be found. Cases of packages that are not installed run where they are.
"""

import copy
import importlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, convert_sync_batchnorm, even_steps, freeze, fuse, revert_sync_batchnorm, unfreeze
from syncbn.torch_compat import ddp_without_buffer_sync
from tests.nn.test_empty_batches import Encoding
from tests.nn.test_subclasses import CallsTheFunction
from tests.reference import max_error

PAGE = Path(__file__).parents[1] / "docs/compatibility.md"
CASES: dict[str, Callable[..., list[str] | None]] = {}


def case(name):
    """Registers the case of the row with this first cell."""

    def register(function):
        CASES[name] = function
        return function

    return register


def rows():
    """The cells of every row of a table whose last column says what is refused."""
    found, inside = {}, False
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        is_header = cells[-1:] == ["refused"]
        if inside and cells and set(cells[0]) != {"-"}:
            found[cells[0]] = cells
        inside = is_header or (inside and bool(cells))
    return found


def test_every_row_has_a_case_and_every_case_a_row():
    assert list(rows()) == list(CASES)


def refusal(function, *args, **kwargs):
    """The message of the error that the call raises."""
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def make_pair(layer=nn.BatchNorm2d):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 4, 3), layer(4), nn.ReLU()).double()
    return theirs, convert_sync_batchnorm(copy.deepcopy(theirs))


X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3.0


def compare(theirs, ours, x=X):
    """Steps of training and of evaluation, and the buffers after them."""
    for training in (True, False):
        assert max_error(ours.train(training)(x), theirs.train(training)(x)) < 1e-11
    ours, theirs = ours.state_dict(), theirs.state_dict()
    for key, value in theirs.items():
        if key in ours:
            assert max_error(ours[key], value.double()) < 1e-11, key


def with_two_ranks(monkeypatch):
    """As a layer of a job of two ranks sees it, before it communicates."""
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr("syncbn.nn.batchnorm.collective_group", lambda _: group)


@case("`torch.compile`")
def check_compile():
    theirs, ours = make_pair()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert max_error(compiled(X), theirs(X)) < 1e-11
    assert max_error(ours[1].running_var, theirs[1].running_var) < 1e-11
    leaf = X.clone().requires_grad_()
    return [refusal(lambda: checkpoint(compiled, leaf, use_reentrant=False))]


@case("`torch.export`")
def check_export(monkeypatch):
    theirs, ours = make_pair()
    program = torch.export.export(ours, (X,))
    assert max_error(program.module()(X), theirs(X)) < 1e-11
    assert "syncbn" not in str(program.graph)
    with_two_ranks(monkeypatch)
    messages = [refusal(torch.export.export, ours, (X,))]
    assert "syncbn" not in str(torch.export.export(ours.eval(), (X,)).graph)
    return messages


@case("`torch.onnx.export`")
def check_onnx():
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    _, ours = make_pair()
    ours(X)
    ours.float().eval()
    x = X.float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(ours, (x,), dynamo=True, verbose=False)
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    [output] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert max_error(torch.from_numpy(output), ours(x)) < 1e-4


@case("`make_fx`")
def check_make_fx(monkeypatch):
    theirs, ours = make_pair()
    program = make_fx(ours)(X)
    theirs(X)
    assert max_error(program(X), theirs(X)) < 1e-11
    with_two_ranks(monkeypatch)
    return [refusal(make_fx(ours), X)]


@case("`torch.fx.symbolic_trace`")
def check_fx():
    theirs, ours = make_pair()
    graph = fx.symbolic_trace(ours)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    compare(theirs, graph)
    ours[1].register_forward_hook(lambda *_: None)
    return [refusal(fx.symbolic_trace, ours)]


@case("`torch.func`: `grad`, `vmap`, `jvp`, `jacrev`, `hessian`")
def check_func(monkeypatch):
    theirs, ours = make_pair()
    parameters = dict(ours.named_parameters())
    errors = []
    for model in (theirs, ours):
        errors.append(refusal(grad(lambda p, model=model: functional_call(model, p, (X,)).sum()), parameters))
        model[1] = type(model[1])(4, track_running_stats=False).double()
    assert errors[0] == errors[1]
    found = [
        grad(lambda p, model=model: functional_call(model, p, (X,)).square().sum())(parameters)["0.weight"]
        for model in (theirs, ours)
    ]
    assert max_error(*found) < 1e-9
    assert max_error(vmap(ours)(X[:, None]), vmap(theirs)(X[:, None])) < 1e-11
    assert max_error(jvp(ours, (X,), (X.square(),))[1], jvp(theirs, (X,), (X.square(),))[1]) < 1e-9
    with_two_ranks(monkeypatch)
    return [errors[1], refusal(vmap(ours), X[:, None])]


def check_functional_ranks():
    theirs, ours = make_pair()
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    rank = dist.get_rank()
    assert max_error(functional_call(ours, state, (X.chunk(2)[rank],)), theirs(X).chunk(2)[rank]) < 1e-11
    assert max_error(state["1.running_mean"], theirs[1].running_mean) < 1e-11
    assert ours[1].num_batches_tracked == 0


@case("`torch.func.functional_call`")
def check_functional(ranks):
    ranks(2, check_functional_ranks)


@case("`torch.jit.trace`")
def check_jit_trace(monkeypatch):
    theirs, ours = make_pair()
    traced = torch.jit.trace(ours.eval(), X)
    assert max_error(traced(X), theirs.eval()(X)) < 1e-11
    with_two_ranks(monkeypatch)
    return [refusal(torch.jit.trace, ours.train(), X)]


@case("`torch.jit.script`")
def check_jit_script():
    theirs, ours = make_pair()
    messages = [refusal(torch.jit.script, ours)]
    compare(theirs, torch.jit.script(revert_sync_batchnorm(ours)))
    return messages


@case("`torch.utils.checkpoint`")
def check_checkpoint():
    theirs, ours = make_pair()
    theirs(X)
    for use_reentrant in (True, False):
        one = copy.deepcopy(ours)
        checkpoint(one, X.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
        assert one[1].num_batches_tracked == 1
        assert max_error(one[1].running_var, theirs[1].running_var) < 1e-11


def check_ddp_ranks():
    theirs, ours = make_pair()
    rank = dist.get_rank()
    wrapped = ddp_without_buffer_sync(ours)
    wrapped(X.chunk(2)[rank]).square().mean().backward()
    theirs(X).square().mean().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert max_error(one.grad, other.grad) < 1e-11
    freeze(ours)
    return refusal(wrapped, X)


@case("`DistributedDataParallel`")
def check_ddp(ranks):
    assert issubclass(DistributedDataParallel, nn.Module)
    return ranks(2, check_ddp_ranks)


def check_fsdp_ranks():
    from torch.distributed.fsdp import FSDPModule, fully_shard

    theirs, ours = make_pair()
    fully_shard(ours)
    rank = dist.get_rank()
    assert max_error(ours(X.chunk(2)[rank]), theirs(X).chunk(2)[rank]) < 1e-11
    assert max_error(ours[1].running_var, theirs[1].running_var) < 1e-11
    _, other = make_pair(nn.BatchNorm2d)
    other = revert_sync_batchnorm(other)
    fully_shard(other[1])
    convert_sync_batchnorm(other)
    assert isinstance(other[1], SyncBatchNorm)
    fuse(other)
    revert_sync_batchnorm(other)
    assert isinstance(other[1], FSDPModule)
    assert isinstance(other[1], nn.BatchNorm2d)
    assert max_error(other.eval()(X), make_pair()[0].eval()(X)) < 1e-11


@case("`fully_shard` (FSDP2)")
def check_fsdp(ranks):
    ranks(2, check_fsdp_ranks)


@case("`torch.optim.swa_utils`")
def check_swa():
    averages = []
    for model in make_pair():
        average = AveragedModel(model)
        average.update_parameters(model)
        update_bn([X, X + 1.0], average)
        averages.append(average.module)
    compare(*averages)
    freeze(averages[1])
    before = copy.deepcopy(averages[1].state_dict())
    with pytest.warns(UserWarning, match="frozen"):
        update_bn([X, X + 1.0], averages[1])
    assert all(torch.equal(value, before[name]) for name, value in averages[1].state_dict().items())


@case("`torch.nn.utils.prune`")
def check_prune():
    pair = make_pair()
    for model in pair:
        prune.l1_unstructured(model[1], "weight", 2)
    compare(*pair)
    freeze(pair[1])
    for model in pair:
        prune.remove(model[1], "weight")
    unfreeze(pair[1])
    assert pair[1][1].weight.requires_grad
    compare(*pair)


@case("`torch.nn.utils.parametrizations`")
def check_parametrizations():
    pair = make_pair()
    freeze(pair[1])
    for model in pair:
        torch.manual_seed(0)
        parametrizations.weight_norm(model[1])
        parametrizations.spectral_norm(model[0])
    unfreeze(pair[1])
    assert all(parameter.requires_grad for parameter in pair[1].parameters())
    compare(*pair)
    assert not isinstance(revert_sync_batchnorm(pair[1])[1], SyncBatchNorm)
    compare(*pair)


@case("`torch.nn.utils.fusion`")
def check_folding():
    theirs, ours = (model.eval() for model in make_pair())
    assert max_error(fuse_conv_bn_eval(ours[0], ours[1])(X), fuse_conv_bn_eval(theirs[0], theirs[1])(X)) < 1e-11
    fuse(ours)
    messages = [refusal(fuse_conv_bn_eval, ours[0], ours[1])]
    reverted = revert_sync_batchnorm(ours)
    assert max_error(nn.ReLU()(fuse_conv_bn_eval(reverted[0], reverted[1])(X)), theirs(X)) < 1e-11
    return messages


@case("`torch.ao.quantization`")
def check_quantization():
    from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping, quantize_fx

    theirs, ours = (model.float().eval() for model in make_pair())
    messages = [refusal(fuse_modules, copy.deepcopy(ours), [["0", "1"]])]
    x, outputs = X.float(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (theirs, ours, revert_sync_batchnorm(copy.deepcopy(ours))):
            prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
            prepared(x)
            outputs.append(quantize_fx.convert_fx(prepared)(x))
    assert max_error(outputs[2], outputs[0]) == 0.0
    assert max_error(outputs[1], theirs(x)) < 0.1  # the layer is there, between quantized ones
    return messages


@case("`torch.autocast`")
def check_autocast():
    _, ours = make_pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ours.float()(X.float())
    assert (output.dtype, ours[1].running_mean.dtype) == (torch.bfloat16, torch.float32)


@case("`copy.deepcopy`, `torch.save`")
def check_copies():
    theirs, ours = make_pair()
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    compare(copy.deepcopy(theirs), copy.deepcopy(ours))
    compare(theirs, torch.load(stream, weights_only=False))


@case("`nn.SyncBatchNorm.convert_sync_batchnorm`")
def check_converter():
    return [refusal(nn.SyncBatchNorm.convert_sync_batchnorm, make_pair()[1])]


def installed(name):
    """The package; skips where it is missing, or broken, as torchvision for CUDA beside a torch for CPU is."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


@case("Lightning")
def check_lightning():
    installed("lightning")
    from syncbn.integrations.lightning import SyncBatchNormLayers

    theirs, ours = make_pair()
    revert_sync_batchnorm(ours)
    plugin = SyncBatchNormLayers()
    plugin.apply(ours)
    compare(theirs, ours)
    plugin.revert(ours)
    assert type(ours[1]) is nn.BatchNorm2d
    from lightning.pytorch.plugins import TorchSyncBatchNorm

    return [refusal(TorchSyncBatchNorm().apply, convert_sync_batchnorm(ours))]


@case("Accelerate")
def check_accelerate():
    accelerate = installed("accelerate")
    theirs, ours = make_pair()
    compare(theirs, accelerate.Accelerator(cpu=True).prepare(ours))


def check_encoding_ranks():
    batches = list(even_steps([Encoding({"x": X}, 8)] * (1 + dist.get_rank())))
    assert [len(batch.x) for batch in batches] == ([8, 0], [8, 8])[dist.get_rank()]


@case("Hugging Face `BatchEncoding`")
def check_encoding(ranks):
    ranks(2, check_encoding_ranks)


@case("timm")
def check_timm():
    theirs, ours = make_pair(CallsTheFunction)  # as its BatchNormAct2d
    compare(theirs, ours)
    assert "syncbn" not in str(torch.export.export(ours.train(), (X,)).graph)
    assert type(revert_sync_batchnorm(ours)[1]) is CallsTheFunction
    timm = installed("timm")
    model = timm.create_model("mobilenetv3_small_050", drop_rate=0.0).double()
    compare(model, convert_sync_batchnorm(copy.deepcopy(model)), torch.randn(4, 3, 64, 64).double())


@case("torchvision")
def check_torchvision():
    vision = installed("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = vision.models.resnet18().double()
    ours = convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32).double()
    compare(model, ours, x)
    assert get_graph_node_names(model) == get_graph_node_names(ours)
    features = create_feature_extractor(ours, ["layer1.0.bn1"])
    assert features(x)["layer1.0.bn1"].shape == (4, 64, 8, 8)
    built = vision.models.resnet18(norm_layer=SyncBatchNorm).double()
    built.load_state_dict(model.state_dict())
    compare(model, built, x)


@case("MONAI")
def check_monai():
    nets = installed("monai.networks.nets")
    model = nets.UNet(2, 3, 2, channels=(4, 8), strides=(2,), norm="batch").double()
    compare(model, convert_sync_batchnorm(copy.deepcopy(model)), torch.randn(4, 3, 16, 16).double())


@case("segmentation_models_pytorch")
def check_smp():
    smp = installed("segmentation_models_pytorch")
    model = smp.Unet("resnet18", encoder_weights=None, classes=2).double()
    compare(model, convert_sync_batchnorm(copy.deepcopy(model)), torch.randn(4, 3, 32, 32).double())


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.vision if name in ("timm", "torchvision") else ()) for name in CASES]
)
def test_the_row_is_true(name, ranks, monkeypatch):
    if name not in rows():
        pytest.fail("no such row")
    available = {"ranks": ranks, "monkeypatch": monkeypatch}
    function = CASES[name]
    given = {key: value for key, value in available.items() if key in function.__code__.co_varnames}
    messages = function(**given) or []
    quoted = re.findall(r'"([^"]+)"', rows()[name][2])
    assert bool(quoted) == bool(messages)
    for words in quoted:
        assert any(words in " ".join(message.split()) for message in messages), (words, messages)
