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

from syncbn.kernels.triton.launch_plan import LaunchOptions
from syncbn.torch_compat import current_cuda_device, current_cuda_stream

_TRIED = ("3.6.",)
_ALIGNMENT = 16  # bytes; Triton compiles wide loads for pointers that are multiples of it


class _Kernel(NamedTuple):
    """A compiled kernel, and what its C launcher takes before and after the arguments."""

    start: Callable[..., None]
    options: tuple[Any, ...]
    constants: tuple[Any, ...]


_knobs: Any = triton.knobs.runtime if hasattr(triton, "knobs") else None
_is_direct = triton.__version__.startswith(_TRIED) and torch.version.hip is None


def launch(
    program: Any,
    grid: Sequence[int],
    tensors: Sequence[Tensor | None],
    scalars: Sequence[float],
    options: LaunchOptions,
) -> None:
    """Starts a kernel on the current stream of the tensors' device.

    Args:
        program: the Triton function. Its parameters are the tensors, the scalars, and the constexprs, in this order.
        grid: three sizes.
        tensors: the first one is not None.
        scalars: integers that the program does not specialize on, and floats of annotated types.
        options: its constexprs and compile options.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != current_cuda_device():
        with torch.cuda.device(device):
            launch(program, grid, tensors, scalars, options)
        return
    if not _is_direct:
        program[grid](*tensors, *scalars, **options)
        return
    # What Triton compiles for, besides `options` and the width of its sizes: device, types, which arguments are None,
    # and which pointers are aligned.
    kind: list[Any] = [device]
    pointers: list[int | None] = []
    bits, is_elsewhere = 0, False
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
            pointers.append(None)
        else:
            kind.append(tensor.dtype)
            pointer = tensor.data_ptr()
            pointers.append(pointer)
            bits |= pointer
            is_elsewhere |= tensor.get_device() != device
    if bits % _ALIGNMENT:
        for address in pointers:
            kind.append(address is None or address % _ALIGNMENT == 0)
    key = tuple(kind)
    kernel = options.kernels.get(key)
    if (
        kernel is None
        or is_elsewhere  # Triton then says what is wrong; a wrong pointer would crash the process
        or program.pre_run_hooks
        or getattr(_knobs.launch_enter_hook, "calls", True)
        or getattr(_knobs.launch_exit_hook, "calls", True)
    ):
        compiled = program[grid](*tensors, *scalars, **options)
        constants = [options[name] for name in program.arg_names[len(tensors) + len(scalars) :]]
        _keep(options.kernels, key, compiled, constants)
    else:
        kernel.start(*grid, current_cuda_stream(device), *kernel.options, *pointers, *scalars, *kernel.constants)


def _keep(kernels: dict[tuple[Any, ...], _Kernel], key: tuple[Any, ...], compiled: Any, constants: list[Any]) -> None:
    """Keeps a kernel that `program[grid](...)` has compiled and started."""
    launcher = compiled.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return  # Triton allocates memory for each launch
    no_scratch, no_hooks = (None, None), (None, None, None)
    options = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, *no_scratch,
               compiled.packed_metadata, *no_hooks)  # fmt: skip
    kernels[key] = _Kernel(launcher.launch, options, tuple(constants))
