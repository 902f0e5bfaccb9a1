"""Every use of torch's private API, and of API that differs between torch versions, is in this module.

Tested with the versions in docs/compatibility.md. Each docstring says which public API is missing, or in which version;
tests/test_torch_compat.py checks that the private one behaves as described. (Not counted as private: `_BatchNorm`, the
base class that torch's own documentation names, and base classes of other layers beside it; the operators
`torch._foreach_*`, which torch documents.)
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes

_HAS_BIAS_ARGUMENT = "bias" in inspect.signature(_BatchNorm.__init__).parameters
_HAS_FORWARD_SYNC_BUFFERS = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters

# Trees of tuples, lists, dictionaries and registered nodes, and base class of dispatch modes (imported above): both are
# what torch's documentation names, without a public module.
pytree = _pytree

_Function = TypeVar("_Function", bound=Callable[..., Any])


def assume_constant_result(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which imports the compiler: 80 modules of torch and sympy.

    They are half of what `import syncbn` would take. The attribute is all that the decorator sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`, which Dynamo of torch 2.9 and 2.11 takes for True in every compilation."""
    return torch.compiler._is_exporting_flag


def init_batch_norm(layer: _BatchNorm, *args: Any, bias: bool, **options: Any) -> None:
    """`_BatchNorm.__init__`, whose argument `bias` is missing before torch 2.13."""
    if _HAS_BIAS_ARGUMENT:
        _BatchNorm.__init__(layer, *args, bias=bias, **options)
        return
    _BatchNorm.__init__(layer, *args, **options)
    if not bias:
        layer.register_parameter("bias", None)


# Dynamo before torch 2.13 takes `module.__dict__["x"]` for `module.x`: a property x that reads its own value from there
# never ends. So a second copy of it is kept there, which is no property.
_DYNAMO_READS_DICT = torch.__version__ >= "2.13"


def set_eps(layer: nn.Module, value: float) -> None:
    """Stores what the property `eps` of a layer returns."""
    layer.__dict__["eps"] = value
    if not _DYNAMO_READS_DICT:
        layer.__dict__["_eps"] = value


def eps_in_dynamo(layer: nn.Module) -> Any:
    """What `set_eps` has stored, where Dynamo traces."""
    return layer.__dict__["eps"] if _DYNAMO_READS_DICT else layer._eps


def reset_batch_norm(layer: _BatchNorm) -> None:
    """`_BatchNorm.reset_parameters`, which fails on a weight without a bias before torch 2.13."""
    layer.reset_running_stats()
    for parameter, value in ((layer.weight, 1.0), (layer.bias, 0.0)):
        if layer.affine and parameter is not None:
            nn.init.constant_(parameter, value)


def power_iterations(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The vectors that `spectral_norm`, the function or the parametrization, moves in a module's training forward.

    Yields the names of a pair of buffers, and the call that removes it. torch has no public way to tell that a module
    has either.
    """
    for hook in module._forward_pre_hooks.values():
        if type(hook).__qualname__ == "SpectralNorm" and type(hook).__module__ == "torch.nn.utils.spectral_norm":
            removal = f"torch.nn.utils.remove_spectral_norm(module, {hook.name!r})"  # type: ignore[attr-defined]
            yield f"{hook.name}_u and {hook.name}_v", removal  # type: ignore[attr-defined]
    for name, chain in getattr(module._modules.get("parametrizations"), "_modules", {}).items():
        for number, one in chain._modules.items():
            if isinstance(one, _SpectralNorm) and hasattr(one, "_u"):
                path = f"parametrizations.{name}.{number}"
                removal = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
                yield f"{path}._u and {path}._v", removal


def is_replica(module: nn.Module) -> bool:
    """Whether a module is one of the copies that `DataParallel` makes for one forward; no public API tells."""
    return getattr(module, "_is_replica", False)


def ddp_without_buffer_sync(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """DDP that broadcasts buffers when it wraps a module (with `init_sync`), and never again.

    Before torch 2.13 its argument `forward_sync_buffers` is missing, and `broadcast_buffers=False` leaves out both.
    """
    if _HAS_FORWARD_SYNC_BUFFERS:
        return DistributedDataParallel(module, forward_sync_buffers=False, **options)
    wrapped = DistributedDataParallel(module, **options)
    wrapped.broadcast_buffers = False
    return wrapped


def argument_names(operator: Any) -> list[str]:
    """Names of the arguments of an operator, as a dispatch mode gets it; its schema has no public form."""
    return [argument.name for argument in operator._schema.arguments]


def is_written(tensor: Tensor) -> bool:
    """Whether an operator has written to a tensor since it was made; torch counts that without telling in public."""
    return tensor._version > 0


def hidden_from_modes() -> AbstractContextManager[object]:
    """Context in which no active dispatch mode (selective checkpointing, mode-based profilers) sees the operators.

    torch has no public way to leave dispatch modes that other code has entered.
    """
    return _disable_current_modes()


# Whether a transform of `torch.func` is active; the trace that `torch.jit.trace` is recording, and the mode in which
# `make_fx` records (None for none). No public API tells of them.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
jit_trace: Callable[[], object] = torch._C._get_tracing_state
proxy_mode: Callable[[], object] = partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY)

# The innermost level of `torch.autograd.forward_ad.dual_level`; -1 outside of one. No public API tells of it.
forward_ad_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level")


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether forward-mode differentiation follows a tensor. (`unpack_dual` may be called inside of a level only.)"""
    return forward_ad_level() != -1 and tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None


# What can come between a call of an operator and its implementation: dispatch modes, function modes, transforms of
# `torch.func`, the profiler, and tracing by `torch.jit.trace`. Each returns something true while it is active. No
# public API tells of them. (Built-in functions, because a layer calls them in every pass.)
INTERCEPTORS: tuple[Callable[[], object], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    transforms_active,
    torch.autograd._profiler_enabled,
    jit_trace,
)

# Autograd's id of the backward pass that is running (graph task id); -1 outside of a backward pass. torch has no public
# way to tell whether code runs inside of a backward pass.
backward_pass: Callable[[], int] = torch._C._current_graph_task_id

# The innermost active pair (pack, unpack) of saved-tensor hooks; None if there is none.
# `torch.autograd.graph.saved_tensors_hooks` sets them; no public API reads them.
saved_tensor_hooks: Callable[[], tuple[Any, Any] | None] = partial(
    torch._C._autograd._top_saved_tensors_default_hooks, True
)


def checkpoint_frame(pack: Any) -> Any:
    """torch's `_CheckpointFrame` of one call of `checkpoint(use_reentrant=False)`, from its saved-tensor pack hook.

    It is the same object in the first forward pass and in the recomputation. None for hooks of any other code. No
    public API gives access to it.
    """
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        content = cell.cell_contents
        if isinstance(content, weakref.ref):  # in the second run
            content = content()
        if type(content).__name__ == "_CheckpointFrame":
            return content
    return None


# Index of the current device, and handle of a device's current stream, as in `torch.cuda.current_device()` and
# `torch.cuda.current_stream(index).cuda_stream`, which take ten times as long. Missing in builds without CUDA.
current_cuda_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_cuda_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Asserts that `condition`, a bool tensor without dimensions, is True, without waiting for the device.

    A failure raises on CPU and triggers a device-side assertion on other devices.
    """
    torch._assert_async(condition, message)


# The DDP wrapper whose forward pass is running; None outside of one.
ddp_around: Callable[[], DistributedDataParallel | None] = partial(
    getattr, DistributedDataParallel, "_active_ddp_module"
)


def num_parameters_reduced_by(wrapper: DistributedDataParallel) -> int | None:
    """Number of parameters whose gradients a DDP wrapper reduces, fixed at its construction; None if not reported."""
    number: int | None = wrapper._get_ddp_logging_data().get("num_parameter_tensors")
    return number


# The groups for which a context is open that collects collectives to send them at its end. Only the functions of
# `torch.distributed` look at them.
coalescing_groups: Callable[[], dict[Any, Any]] = dict
if dist.is_available():
    coalescing_groups = partial(attrgetter("_world.pg_coalesce_state"), dist.distributed_c10d)


def all_reduce_options() -> Any:
    """Options of `ProcessGroup.allreduce` for a sum that is complete, for the current stream, after `wait`.

    `dist.all_reduce` makes them anew at every call, between checks and wrappers that take longer than the call itself.
    """
    options = dist.AllreduceOptions()
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


def timeout_of(group: dist.ProcessGroup, device: torch.device | str | None = None) -> timedelta | None:
    """Timeout of a group's collectives; None if its backend does not report one.

    `new_group` takes a timeout, but no public API returns that of an existing group.

    Args:
        device: device of the tensors to be communicated; None for the first device type whose backend reports one.
    """
    for kind in group._device_types if device is None else [device]:
        options = getattr(group._get_backend(torch.device(kind)), "options", None)
        if options is not None:
            timeout: timedelta = options._timeout
            return timeout
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is the wrapper that `torch.compile` returns.

    Compared by class name, because importing the class would import the compiler.
    """
    return type(module).__name__ == "OptimizedModule"


def parametrized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A new class that `register_parametrization` would give to a module of class `cls`, without its properties.

    It refuses pickling and allows deepcopy. `register_parametrization` makes one only for a module that holds the
    tensor, and no public API exchanges the class below it.
    """
    module = object.__new__(cls)
    parametrize._inject_new_class(module)
    return type(module)


def has_non_finite(tensors: list[Tensor]) -> Tensor:
    """1.0 if any element of the tensors is not finite, else 0.0; float32 without dimensions, on their device.

    One operator checks all tensors, as in `torch.amp.GradScaler`; with the public API it takes several per tensor.

    Args:
        tensors: float32 or float64, all on one device; at least one.
    """
    found = torch.zeros((), device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    return found


def scaler_state(scaler: torch.amp.GradScaler) -> list[Tensor]:
    """Scale and growth tracker of a loss scaler, on its device; the public `state_dict` would wait for the device."""
    return [scaler._scale, scaler._growth_tracker]  # type: ignore[list-item]


def takes_grad_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a loss scaler leaves scale and skipping to an optimizer: the flag that it asks, which is private."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def count_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Keeps a learning rate schedule from warning that it steps before its optimizer, whose first step is left out."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
