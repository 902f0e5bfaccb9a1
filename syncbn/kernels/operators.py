"""The operators `torch.ops.syncbn.*`: their signatures, their shapes, and the reference as the default implementation.

`torch.library.Library` rather than `custom_op`, because a call costs less than half as much. A faster kernel for a
device registers itself for that device's dispatch key and nothing else changes: the dispatcher is the only switch.
"""

import torch
from torch import Tensor

from syncbn.kernels import cpu, cuda, reference

_library = torch.library.Library("syncbn", "DEF")
_library.define("moments(Tensor input, Tensor? mask=None) -> Tensor")
_library.define(
    "finish(Tensor packed, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    " float? momentum, float eps, ScalarType dtype) -> (Tensor mean, Tensor invstd, Tensor count)"
)
_library.define(
    "normalize(Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias, Tensor? residual=None,"
    " str? activation=None) -> Tensor"
)
_library.define(
    "backward_reduce(Tensor grad, Tensor input, Tensor mean, Tensor invstd, ScalarType dtype)"
    " -> (Tensor sums, Tensor affine)"
)
_library.define(
    "backward_elementwise(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor sums,"
    " Tensor count) -> Tensor"
)

_library.define(
    "backward_elementwise_(Tensor(a!) grad, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor sums,"
    " Tensor count) -> ()"
)
_library.define(
    "backward_local(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor count,"
    " ScalarType dtype) -> (Tensor grad_input, Tensor affine)"
)

_library.define(
    "activated_reduce(Tensor grad, Tensor input, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor? kept, str activation, ScalarType dtype) -> (Tensor sums, Tensor affine, Tensor through)"
)

_FAST = ("moments", "finish", "normalize", "backward_reduce", "backward_elementwise", "backward_local",
         "activated_reduce", "backward_elementwise_")  # fmt: skip
for _name in _FAST:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    _library.impl(_name, getattr(cpu, _name), "CPU")
    _library.impl(_name, getattr(cuda, _name), "CUDA")


@torch.library.register_fake("syncbn::moments", lib=_library)
def _(input: Tensor, mask: Tensor | None = None) -> Tensor:
    return input.new_empty(4 * input.size(1) + 1, dtype=torch.float64)


@torch.library.register_fake("syncbn::finish", lib=_library)
def _(
    packed: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    num_channels = (packed.size(0) - 1) // 4
    mean = packed.new_empty((2, num_channels), dtype=dtype)
    return mean, packed.new_empty(num_channels, dtype=dtype), packed.new_empty(())


@torch.library.register_fake("syncbn::normalize", lib=_library)
def _(
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("syncbn::backward_reduce", lib=_library)
def _(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_channels = input.size(1)
    return input.new_empty(2 * num_channels, dtype=torch.float64), input.new_empty((2, num_channels), dtype=dtype)


@torch.library.register_fake("syncbn::backward_elementwise", lib=_library)
def _(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("syncbn::backward_elementwise_", lib=_library)
def _(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, sums: Tensor, count: Tensor
) -> None:
    pass


@torch.library.register_fake("syncbn::backward_local", lib=_library)
def _(
    grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, count: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), input.new_empty((2, input.size(1)), dtype=dtype)


@torch.library.register_fake("syncbn::activated_reduce", lib=_library)
def _(
    grad: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    num_channels = input.size(1)
    sums, affine = (
        input.new_empty(2 * num_channels, dtype=torch.float64),
        input.new_empty((2, num_channels), dtype=dtype),
    )
    return sums, affine, torch.empty_like(input)


moments = torch.ops.syncbn.moments.default
finish = torch.ops.syncbn.finish.default
normalize = torch.ops.syncbn.normalize.default
backward_reduce = torch.ops.syncbn.backward_reduce.default
backward_elementwise = torch.ops.syncbn.backward_elementwise.default
backward_elementwise_ = torch.ops.syncbn.backward_elementwise_.default
backward_local = torch.ops.syncbn.backward_local.default
activated_reduce = torch.ops.syncbn.activated_reduce.default
