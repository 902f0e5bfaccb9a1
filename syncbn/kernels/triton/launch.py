"""The one place where Triton kernels are started; compiled kernels are kept and called directly.

`program[grid](...)` binds, specializes and hashes its arguments at every call. On an H100's host that takes 28 us, and
the kernel that it returns can be called again in 10. Triton documents no such call, so it is made with the versions in
`_TRIED` only. All other versions, Triton's interpreter, and launches that a hook observes take the public way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from syncbn.torch_compat import current_cuda_device, current_cuda_stream

_TRIED = ("3.6.",)
_ALIGNMENT = 16  # bytes; Triton compiles wide loads for pointers that are multiples of it
_WIDE = 2**31  # integers from here on are passed in 64 bits


class _Kernel(NamedTuple):
    """A compiled kernel, and what its C launcher takes before and after the arguments."""

    start: Callable[..., None]
    options: tuple[Any, ...]
    constants: tuple[Any, ...]
    blocks: dict[str, Any]  # its identity is part of the key, so it must not be freed


_kernels: dict[tuple[Any, ...], _Kernel] = {}
_hooks = triton.knobs.runtime if hasattr(triton, "knobs") else None
_is_direct = triton.__version__.startswith(_TRIED) and torch.version.hip is None


def launch(
    program: Any, grid: Sequence[int], tensors: Sequence[Tensor | None], scalars: Sequence[float], blocks: dict[str, Any]
) -> None:
    """Starts a kernel on the current stream of the tensors' device.

    Args:
        program: the Triton function. Its parameters are the tensors, the scalars, and the constexprs, in this order.
        grid: three sizes.
        tensors: the first one is not None.
        scalars: integers that the program does not specialize on, and floats of annotated types.
        blocks: constexprs and compile options by name; must not be changed afterwards.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != current_cuda_device():
        with torch.cuda.device(device):
            launch(program, grid, tensors, scalars, blocks)
        return
    if not _is_direct:
        program[grid](*tensors, *scalars, **blocks)
        return
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    key = (
        program, id(blocks), device, max(scalars) < _WIDE or tuple(scalar < _WIDE for scalar in scalars),
        *[None if tensor is None else tensor.dtype for tensor in tensors],
        *[pointer is None or pointer % _ALIGNMENT == 0 for pointer in pointers],
    )  # fmt: skip
    kernel = _kernels.get(key)
    if kernel is None or _is_observed(program):
        compiled = program[grid](*tensors, *scalars, **blocks)
        _keep(key, compiled, [blocks[name] for name in program.arg_names[len(tensors) + len(scalars) :]], blocks)
    else:
        kernel.start(*grid, current_cuda_stream(device), *kernel.options, *pointers, *scalars, *kernel.constants)


def _is_observed(program: Any) -> bool:
    """Whether somebody's hook has to see the launch, which then takes the public way."""
    launches = (_hooks.launch_enter_hook, _hooks.launch_exit_hook)
    return bool(program.pre_run_hooks) or any(getattr(hook, "calls", True) for hook in launches)


def _keep(key: tuple[Any, ...], compiled: Any, constants: list[Any], blocks: dict[str, Any]) -> None:
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return  # memory that Triton allocates for each launch
    no_scratch, no_hooks = (None, None), (None, None, None)
    options = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, *no_scratch,
               compiled.packed_metadata, *no_hooks)  # fmt: skip
    _kernels[key] = _Kernel(launcher.launch, options, tuple(constants), blocks)
