"""Images and masks in the size of their files (`data.size=native`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from syncbn.training.data.augment import augment
from syncbn.training.data.by_size import BySize
from syncbn.training.data.dataset import IGNORE, Split
from syncbn.training.data.decoding import Decoded, First, opened
from syncbn.training.data.images import ImageData, chosen_for_stats, stats_of_sums
from syncbn.training.data.preparation import normalized, upright_size
from syncbn.training.data.randomness import Draw, mix_key, occurrences

_TRIED = 200  # images of a split whose sizes are looked at before a run


@dataclass(frozen=True)
class NativeData(ImageData):
    """Images with masks, each in its own size; batches are `BySize`, and nothing in them is padded."""

    def train_batch(  # type: ignore[override]
        self, index: Tensor, seed: int, epoch: int, dtype: torch.dtype, repeats: Tensor | None = None
    ) -> tuple[BySize, BySize]:
        """Augmented, normalized images and their masks; see `ImageData`."""
        pairs = [
            self._drawn(sample, name, seed, epoch)
            for sample, name in zip(index.tolist(), occurrences(index, repeats), strict=True)
        ]
        return self._batch([image for image, _ in pairs], [mask for _, mask in pairs], dtype)

    def eval_batch(  # type: ignore[override]
        self, split: Split, index: Tensor, dtype: torch.dtype
    ) -> tuple[BySize, BySize]:
        """Normalized images and their masks."""
        images, masks = (list(_decoded(rows).each(index)) for rows in (split.images, split.labels))
        return self._batch(images, masks, dtype)

    def first(self, num_samples: int) -> NativeData:
        """See `Data`."""
        images, masks = _decoded(self.train.images), _decoded(self.train.labels)
        few = First(images.source, num_samples)
        masks = replace(masks, source=First(masks.source, num_samples), of=few)
        split = Split(replace(images, source=few), masks)
        return replace(self, train=split, val=split, test=split, shift=0, flip=False, augmentation=None)

    def smallest(self) -> Tensor:
        """The image that is tried first, (1, C, H, W) float32."""
        return self.eval_batch(self.train, self.samples_to_try()[:1], torch.float32)[0].parts[0]

    def samples_to_try(self) -> Tensor:
        """Two training samples, or one, that a network is least likely to take: the smallest, and the oddest in size.

        They are chosen among at most 200 evenly spaced ones; an odd height and width cannot be halved.

        Returns:
            Their positions, int64.
        """
        num = min(_TRIED, len(self.train))
        sizes = {one * len(self.train) // num: self._size(one * len(self.train) // num) for one in range(num)}
        smallest = min(sizes, key=lambda sample: min(sizes[sample]))
        oddest = min(sizes, key=lambda sample: sum(side & -side for side in sizes[sample]))
        return torch.tensor(list(dict.fromkeys([smallest, oddest])))

    def _drawn(self, sample: int, name: Tensor, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """A training image, augmented, and its mask."""
        if self.augmentation is not None:
            image, mask = self.augmentation(
                *self._whole(sample), mix_key(seed, epoch, int(name), Draw.AUGMENT), self._name(sample)
            )
            assert mask is not None
            return image, mask
        image, mask = (
            next(_decoded(rows).each(torch.tensor([sample]))) for rows in (self.train.images, self.train.labels)
        )
        image = augment(image[None], name[None], self.shift, self.flip, seed, epoch)[0]
        return image, augment(mask[None, None], name[None], self.shift, self.flip, seed, epoch, fill=IGNORE)[0, 0]

    def _batch(self, images: list[Tensor], masks: list[Tensor], dtype: torch.dtype) -> tuple[BySize, BySize]:
        height, width = self._first_size
        no_image = torch.zeros(0, self.num_channels, height, width, dtype=torch.uint8)
        by_size = BySize.of(images, no_image).map(lambda part: normalized(part, *self.pixel_stats, dtype))
        return by_size, BySize.of(masks, no_image[:, 0]).map(lambda part: part.to(torch.int64))

    @cached_property
    def _first_size(self) -> tuple[int, int]:
        return self._size(0)

    def _size(self, sample: int) -> tuple[int, int]:
        """Height and width of a training image; only the head of its file is read."""
        with opened(_decoded(self.train.images).source, sample) as image:
            return upright_size(image)

    def _stats_of_images(self) -> tuple[Tensor, Tensor]:
        images, count = _decoded(self.train.images), 0
        sums = torch.zeros(2, self.num_channels, dtype=torch.int64)
        for image in images.each(chosen_for_stats(images)):
            values = image.to(torch.int64)
            sums += torch.stack([values.sum((1, 2)), (values * values).sum((1, 2))])
            count += values[0].numel()
        mean, std = stats_of_sums(sums, count)
        return mean, std.clamp(min=1e-6)


def _decoded(rows: object) -> Decoded:
    assert isinstance(rows, Decoded)
    return rows
