"""What the package uses of torch's private API, and what differs between its versions: all of it stands here.

Tried on torch 2.13. Each function says what public way is missing; tests/test_torch_compat.py shows that what is behind
it does what is said. (Not counted as private: `_BatchNorm`, the base class that torch's own documentation names, and
base classes of other layers beside it; the operators `torch._foreach_*`, which torch documents.)
"""

from __future__ import annotations

import inspect
import weakref
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes


def hidden_from_modes() -> AbstractContextManager[object]:
    """Operators inside are seen by no dispatch mode (selective checkpointing, profilers built on modes).

    torch has no public way to leave the modes that others have entered.
    """
    return _disable_current_modes()


def backward_pass() -> int:
    """The number of the backward pass that this runs in, by autograd's own count; -1 outside of one.

    There is no public way to tell whether code runs inside of a backward pass.
    """
    return torch._C._current_graph_task_id()


def saved_tensor_hooks() -> tuple[Any, Any] | None:
    """The innermost pair (pack, unpack) that intercepts saved tensors; None where nothing does.

    `torch.autograd.graph.saved_tensors_hooks` sets them; nothing public reads them.
    """
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def checkpoint_frame(pack: Any) -> Any:
    """torch's object for one call of `checkpoint(use_reentrant=False)`, from the hook that packs tensors in it.

    The same object in the first run and in the second. None for hooks of anybody else.
    """
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        content = cell.cell_contents
        if isinstance(content, weakref.ref):  # in the second run
            content = content()
        if type(content).__name__ == "_CheckpointFrame":
            return content
    return None


def assert_on_device(condition: Tensor, message: str) -> None:
    """Raises, or stops the device's program, if a bool without dimensions is False; never waits for the device."""
    torch._assert_async(condition, message)


def ddp_around() -> DistributedDataParallel | None:
    """The DDP wrapper in whose forward this runs."""
    return DistributedDataParallel._active_ddp_module


def num_parameters_reduced_by(wrapper: DistributedDataParallel) -> int | None:
    """How many parameters a wrapper reduces, a list that it fixed when it was made; None where it does not say."""
    number: int | None = wrapper._get_ddp_logging_data().get("num_parameter_tensors")
    return number


def timeout_of(group: dist.ProcessGroup, device: torch.device | str | None = None) -> timedelta | None:
    """How long collectives of a group wait for other ranks; None where it does not say.

    `new_group` takes a timeout, but the one of an existing group cannot be asked for.

    Args:
        device: of the tensors; None for the first kind of device that says.
    """
    for kind in group._device_types if device is None else [device]:
        options = getattr(group._get_backend(torch.device(kind)), "options", None)
        if options is not None:
            timeout: timedelta = options._timeout
            return timeout
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` makes of a module. By name: importing the class would import the compiler."""
    return type(module).__name__ == "OptimizedModule"


def has_non_finite(tensors: list[Tensor]) -> Tensor:
    """1.0 where any element of float32 or float64 tensors on one device is not finite, else 0.0; stays on the device.

    One operator for all of them, which `torch.amp.GradScaler` uses; publicly it takes several for each tensor.
    """
    found = torch.zeros((), device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(found))
    return found


def scaler_state(scaler: torch.amp.GradScaler) -> list[Tensor]:
    """Scale and growth counter of a loss scaler on its device; the public `state_dict` would wait for them."""
    return [scaler._scale, scaler._growth_tracker]  # type: ignore[list-item]
