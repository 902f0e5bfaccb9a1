"""Balanced sampling: equally many draws of every class in an epoch, as a function of (seed, epoch)."""

from __future__ import annotations

import torch
from torch import Tensor

from syncbn.training.data.randomness import Draw, mix, mix_key


class ClassMembers:
    """The samples of each class that occurs, by which draws are balanced; two of them are never equal.

    The draws of a class go through all of its samples in a random order, then through all of them in another one, and
    so on, over the epochs: a sample of a large class comes again only when all others have been there.

    Args:
        labels: (N,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self.num_samples = len(labels)
        sizes = labels.unique(return_counts=True)[1]
        self._members = labels.argsort(stable=True).split(sizes.tolist())

    def order(self, seed: int, epoch: int) -> Tensor:
        """The samples of an epoch in a random order, (N,) int64; the numbers of two classes differ by at most one."""
        num_classes = len(self._members)
        drawn = []
        for number, members in enumerate(self._members):
            # Draw t of all, in turn of the classes, is one of class t % num_classes, over the epochs.
            first, end = (
                (t - number + num_classes - 1) // num_classes
                for t in (epoch * self.num_samples, (epoch + 1) * self.num_samples)
            )
            drawn.append(_draws(members, first, end, mix_key(seed, number, Draw.BALANCE)))
        generator = torch.Generator().manual_seed(mix_key(seed, epoch, Draw.SHUFFLE))
        return torch.cat(drawn)[torch.randperm(self.num_samples, generator=generator)]


def repeats_of(order: Tensor) -> Tensor:
    """How often the sample of each entry of an order stands in front of it, (N,) int64."""
    by_sample = order.argsort(stable=True)
    arranged, position = order[by_sample], torch.arange(len(order))
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = arranged[1:] != arranged[:-1]
    begin = torch.where(is_first, position, 0).cummax(0).values
    repeats = torch.empty_like(order)
    repeats[by_sample] = position - begin
    return repeats


def _draws(members: Tensor, first: int, end: int, key: int) -> Tensor:
    """Draws `first` to `end` of one class: permutations of its members, one behind the other."""
    num = len(members)
    rounds = torch.arange(first // num, -(-end // num))
    # A permutation is the order of hashes of (key, round, member), so that no round depends on those before it.
    hashes = mix(mix(members)[None] ^ mix(rounds ^ key)[:, None])
    return members[hashes.argsort(dim=1, stable=True)].flatten()[first % num :][: end - first]
