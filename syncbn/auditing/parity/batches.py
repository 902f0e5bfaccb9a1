"""The batch that is compared: its number of samples, the cut of it over the ranks, and calls of model and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.torch_compat import pytree


def num_samples(inputs: Any) -> int:
    """The size of dimension 0 of the input tensors.

    Raises:
        ValueError: there is no tensor, or they have different numbers of samples.
    """
    sizes = {len(leaf) if leaf.dim() else 0 for leaf in tensors(inputs)}
    if len(sizes) != 1 or 0 in sizes:
        got = f"tensors of {', '.join(map(str, sorted(sizes)))} samples" if sizes else "no tensor"
        raise ValueError(f"batch: expected inputs whose first dimension is the samples, got {got}")
    return sizes.pop()


def uneven(num: int, world_size: int) -> list[int]:
    """Numbers of samples of the ranks, as equal as they can be without being equal: [7, 5] for 12 over 2.

    An even cut would hide a loss that is averaged per rank.

    Raises:
        ValueError: too few samples for that.
    """
    sizes = [num // world_size + (rank < num % world_size) for rank in range(world_size)]
    if world_size > 1 and sizes[-1] >= 2:
        sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] - 1
    if world_size > 1 and (sizes[-1] == 0 or len(set(sizes)) == 1):
        raise ValueError(
            f"batch: {num} samples cannot be cut unevenly over {world_size} ranks; give at least {world_size + 1}, and"
            f" better {6 * world_size}"
        )
    return sizes


def other_cuts(sizes: list[int]) -> list[tuple[int, ...]]:
    """The cut, and those in which ever more samples go from the last rank to the first."""
    return [(sizes[0] + more, *sizes[1:-1], sizes[-1] - more) for more in range(min(sizes[-1], 4))]


def rows(tree: Any, num: int, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a tree of `num` samples; what is no tensor of so many rows is left as it is."""

    def cut(leaf: Tensor) -> Tensor:
        return leaf[start:stop] if leaf.dim() and len(leaf) == num else leaf

    return pytree.tree_map_only(Tensor, cut, tree)


def in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Casts the floating-point tensors of a tree; new tensors without a graph, on the CPU."""

    def cast(leaf: Tensor) -> Tensor:
        return leaf.detach().to("cpu", dtype if leaf.is_floating_point() else leaf.dtype, copy=True)

    return pytree.tree_map_only(Tensor, cast, tree)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(x)`, `model(*x)` for a tuple or list, `model(**x)` for a dictionary."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


@dataclass(frozen=True)
class LossValue:
    """What a loss returned on one rank."""

    total: Tensor
    """A scalar: the sum, or whatever a loss without a count returns."""
    count: Tensor | None
    """float64; None for a loss that returns a scalar alone."""


def loss_of(loss: Callable[..., Any], outputs: Any, targets: Any) -> LossValue:
    """Calls the loss.

    Raises:
        ValueError: it returns neither a scalar nor a sum and a count.
    """
    returned = loss(outputs, targets)
    parts = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    total, count = parts[0] if parts else None, parts[1] if len(parts) == 2 else None
    is_scalar = isinstance(total, Tensor) and total.numel() == 1
    is_count = count is None or isinstance(count, int | float) or (isinstance(count, Tensor) and count.numel() == 1)
    if len(parts) not in (1, 2) or not is_scalar or not is_count:
        got = [f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__ for one in parts]
        raise ValueError(f"loss: expected a scalar tensor, or a sum and a count, got {', '.join(got) or 'nothing'}")
    assert isinstance(total, Tensor)
    counted = None if count is None else torch.as_tensor(count).detach().to(torch.float64).reshape(())
    return LossValue(total.reshape(()), counted)
