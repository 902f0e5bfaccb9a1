"""The custom operators `torch.ops.syncbn.*`: one set, with an implementation per device.

Signature, documentation and shapes of an operator are defined once, at its function in `reference`: the schema is
inferred from the annotations there, and the fake implementation for tracing follows the function. Operators are defined
with `torch.library.Library` rather than `custom_op`, because a call costs less than half as much. A faster kernel for a
device is registered under that device's dispatch key. A step that nothing observes (see `are_observed`) calls the same
implementation directly, which costs the host less.
"""

from operator import call
from types import ModuleType

import torch
from torch import Tensor

from syncbn.kernels import cpu, cuda, reference
from syncbn.kernels.step import PLAIN
from syncbn.torch_compat import INTERCEPTORS

# Arguments that an operator mutates, by operator; operators not listed return new tensors only.
_MUTATED = {
    "finish": ("running_mean", "running_var", "num_batches_tracked"),
    "backward_elementwise_": ("grad",),
}

_library = torch.library.Library("syncbn", "DEF")
for _name, _fake in reference.FAKES.items():
    _function = getattr(reference, _name)
    _library.define(_name + torch.library.infer_schema(_function, mutates_args=_MUTATED.get(_name, ())))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    _library.impl(_name, getattr(cpu, _name), "CPU")
    _library.impl(_name, getattr(cuda, _name), "CUDA")
    torch.library.register_fake(f"syncbn::{_name}", _fake, lib=_library)

moments = torch.ops.syncbn.moments.default
finish = torch.ops.syncbn.finish.default
normalize = torch.ops.syncbn.normalize.default
backward_reduce = torch.ops.syncbn.backward_reduce.default
backward_elementwise = torch.ops.syncbn.backward_elementwise.default
backward_elementwise_ = torch.ops.syncbn.backward_elementwise_.default
backward_local = torch.ops.syncbn.backward_local.default
activated_reduce = torch.ops.syncbn.activated_reduce.default

# The modules of implementations by device type.
IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda}


def are_observed(*tensors: Tensor | None) -> bool:
    """Whether anything that is active, or the type of a tensor, can come between an operator and its implementation.

    Otherwise a step calls the implementation itself, which saves the way into the dispatcher and back into Python.
    """
    return any(map(call, INTERCEPTORS)) or not PLAIN.issuperset(map(type, tensors))
