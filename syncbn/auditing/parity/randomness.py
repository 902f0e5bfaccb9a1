"""Silences torch's random operators: every draw is the mean of its distribution, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from syncbn.torch_compat import TorchDispatchMode, argument_names


class Silenced(TorchDispatchMode):
    """Context in which torch draws no random numbers.

    Args:
        where: the module that runs.
        spared: the module that may go on drawing.
    """

    def __init__(self, where: Callable[[], str], spared: str | None = None) -> None:
        super().__init__()
        self.where, self.spared = where, spared

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and (self.spared is None or self.where() != self.spared):
            return _silent(func, args, keywords)
        return func(*args, **keywords)


def _silent(func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The result of a random operator with the mean in the place of each draw."""
    given = dict(zip(argument_names(func), args, strict=False)) | keywords
    name = func.overloadpacket.__name__
    if "dropout_p" in given:  # attention
        return func(**{**given, "dropout_p": 0.0})
    if name == "native_dropout":
        return given["input"].clone(), torch.ones_like(given["input"], dtype=torch.bool)
    if name == "multinomial":
        weights, num = given["self"], given["num_samples"]
        best = weights.argsort(-1, descending=True)
        return best[..., torch.arange(num, device=weights.device) % weights.shape[-1]]
    with torch.random.fork_rng([]):  # an operator that is not in the list draws the same numbers wherever it is called
        torch.manual_seed(0)
        drawn = func(*args, **keywords)
    mean = _mean(name, given)
    if mean is None or not isinstance(drawn, Tensor):
        return drawn
    if name == "randperm":
        return drawn.copy_(torch.arange(drawn.numel(), device=drawn.device))
    return drawn.copy_(mean) if isinstance(mean, Tensor) else drawn.fill_(mean)


def _mean(name: str, given: dict[str, Any]) -> Tensor | float | None:
    """What a random operator gives in the mean; None if that is not known."""
    match name:
        case "bernoulli" | "bernoulli_":
            chance: Tensor | float = given.get("p", given["self"] if name == "bernoulli" else 0.5)
            return chance.clone() if isinstance(chance, Tensor) else chance
        case "rand" | "rand_like":
            return 0.5
        case "uniform_":
            return (given.get("from", 0.0) + given.get("to", 1.0)) / 2
        case "randn" | "randn_like" | "randperm":
            return 0.0
        case "normal" | "normal_":
            mean: Tensor | float = given.get("mean", 0.0)
            return mean
        case "exponential_":
            return 1 / given.get("lambd", 1.0)
        case "randint" | "randint_like":
            return given.get("low", 0)
        case _:
            return None
