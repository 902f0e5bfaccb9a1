"""Augmentation of the user's own (`data.augment`): transforms by name, which are called with whole images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.instantiate import build_target
from syncbn.training.data.randomness import Draw, mix_key, seeded

_NUM_TRIES = 4  # draws that `require_repeatable` compares, of one sample

Drawn = tuple[Tensor, Tensor | None]  # an image and its mask, if there are masks


class Augmentation:
    """Transforms, in order. They draw from the global generators of torch, NumPy and Python, which are seeded anew.

    A transform is called with the image, a tensor (C, H, W), and with its mask, (H, W) uint8, where there are masks. It
    returns the same in any height and width. Where torchvision is installed they are `tv_tensors`, so that its
    transforms treat a mask as one.

    Args:
        nodes: `_target_` and its arguments, by name. Transforms are built when they are first needed, on every rank
            with the same random numbers.
    """

    def __init__(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        self._nodes = nodes

    @cached_property
    def transforms(self) -> dict[str, Callable[..., Any]]:
        """The transforms by name.

        Raises:
            ConfigError: a `_target_` that cannot be imported or called, or makes nothing to call.
        """
        built = {}
        for name, node in self._nodes.items():
            key = f"data.augment.{name}"
            if str(node["_target_"]).startswith("torchvision.") and find_spec("torchvision") is None:
                raise ConfigError(f"{key}: needs torchvision, which is not installed; pip install torchvision")
            with seeded(mix_key(Draw.AUGMENT)):
                built[name] = build_target(key, {"_convert_": "all", **node})
            if not callable(built[name]):
                raise ConfigError(f"{key}: expected something to call, got {type(built[name]).__name__}")
        return built

    def __call__(self, image: Tensor, mask: Tensor | None, key: int, sample: str) -> Drawn:
        """One draw: the image and mask that come out, of any height and width.

        Args:
            key: seeds the generators.
            sample: name of the sample, for error messages.

        Raises:
            ConfigError: a transform fails, or returns anything but such an image and mask.
        """
        with seeded(key):
            for name, transform in self.transforms.items():
                image, mask = _apply(name, transform, image, mask, sample)
        return image, mask

    def require_repeatable(self, image: Tensor, mask: Tensor | None, seed: int, sample: str) -> None:
        """Draws a sample several times, each time twice.

        Raises:
            ConfigError: a transform returns another image the second time, or it fails.
        """
        for number in range(_NUM_TRIES):
            now: Drawn = (image, mask)
            for name, transform in self.transforms.items():
                pair = []
                for _ in range(2):
                    with seeded(mix_key(seed, number, Draw.AUGMENT)):
                        pair.append(_apply(name, transform, now[0].clone(), _copied(now[1]), sample))
                if not all(_is_same(*parts) for parts in zip(*pair, strict=True)):
                    raise ConfigError(
                        f"data.augment.{name}: changes {sample} in another way when it is called again, so that no run"
                        " could be repeated or resumed; it must draw from the global generators of torch, NumPy or"
                        " random, which are seeded for each sample, not from a generator of its own"
                    )
                now = pair[0]


def _apply(name: str, transform: Callable[..., Any], image: Tensor, mask: Tensor | None, sample: str) -> Drawn:
    given = _wrapped(image, mask)
    try:
        returned = transform(*given)
    except Exception as error:  # of whatever type the user's code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        called = "image" if mask is None else "image and mask"
        raise ConfigError(f"data.augment.{name}: fails for the {called} of {sample} ({reason}); expected a transform"
                          f" that takes {'a tensor' if mask is None else 'two tensors, as torchvision.transforms.v2'}"
                          ) from None  # fmt: skip
    parts = (returned,) if mask is None else returned
    if not _is_drawn(parts, image, mask):
        shape = f"an image of {_type(image)} ({image.size(0)}, H, W)"
        wanted = shape if mask is None else f"{shape} and a mask of uint8 (H, W) of the same height and width"
        got = parts if isinstance(parts, tuple | list) else (parts,)
        raise ConfigError(f"data.augment.{name}: expected {wanted}, got {', '.join(map(_described, got))}; leave out"
                          " what normalizes or converts pixels, data.mean and data.std do that")  # fmt: skip
    image, *masks = (part.as_subclass(Tensor).contiguous() for part in parts)
    return image, masks[0] if masks else None


def _wrapped(image: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    kinds = _tv_tensors()
    if kinds is None:
        return (image,) if mask is None else (image, mask)
    return (kinds.Image(image),) if mask is None else (kinds.Image(image), kinds.Mask(mask))


@cache
def _tv_tensors() -> Any:
    """torchvision's module of that name; None without it."""
    if find_spec("torchvision") is None:
        return None
    try:
        from torchvision import tv_tensors
    except Exception:  # an old version, or one for another torch, of which torch says so with a RuntimeError
        return None
    return tv_tensors


def _is_drawn(parts: Any, image: Tensor, mask: Tensor | None) -> bool:
    wanted = (image,) if mask is None else (image, mask)
    if not isinstance(parts, tuple | list) or len(parts) != len(wanted):
        return False
    for part, like in zip(parts, wanted, strict=True):
        fits = isinstance(part, Tensor) and part.dtype == like.dtype and part.dim() == like.dim() and part.numel() > 0
        if not fits or part.shape[-2:] != parts[0].shape[-2:]:
            return False
    return bool(parts[0].size(0) == image.size(0))


def _described(value: Any) -> str:
    return f"{_type(value)} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _copied(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.clone()


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
