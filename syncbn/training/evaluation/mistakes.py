"""What a model gets wrong on a split, for the report: the confusion matrix, and the samples that are most wrong."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.atomic_write import write_text
from syncbn.report import file_names
from syncbn.training.config.output import unwritable
from syncbn.training.data.dataset import Data
from syncbn.training.data.decoding import Decoded
from syncbn.training.distributed import world
from syncbn.training.evaluation.thumbnails import colors_of, draw_image, draw_mask
from syncbn.training.losses.losses import Loss, are_classes, ignored_label, metric_targets

log = logging.getLogger(__name__)

MOST_CLASSES = 2000  # of a confusion matrix, which may have as many numbers as their square
_DIGITS = 4  # of a score: what ranks add up in another order differs beyond, and must not change the order of samples


class Scored(NamedTuple):
    """A sample that is wrong; those that are most wrong sort first."""

    order: float
    """Minus the score."""
    sample: int
    """Its position in the split."""
    facts: dict[str, Any]
    """What the file says about it, images included."""


@dataclass(frozen=True)
class EvaluatedBatch:
    """A batch as it was evaluated."""

    index: Tensor
    images: Tensor
    outputs: Any
    targets: Tensor


class Mistakes:
    """Collects, over the batches of an evaluation, what a model of classes gets wrong; see `evaluate`.

    A sample's score is the cross entropy of its label if it is taken for another class, and for a mask 1 - Dice, the
    mean over the foreground classes that target or prediction have. Outputs that are no score for each class, (N,
    num_classes, ...), and targets that are no classes are passed over: there is nothing to write then.

    Args:
        data: its pixel statistics turn a batch back into images.
        num_examples: samples to keep; 0 for no images.
    """

    def __init__(self, data: Data, loss: Loss, num_examples: int) -> None:
        self._data, self._loss, self._num_examples = data, loss, num_examples
        self._ignored = ignored_label(loss)
        self._applies = data.num_classes is not None and are_classes(loss)
        self._worst: list[Scored] = []
        self._num_samples = self._num_wrong = 0
        self._num_classes = int(data.num_classes or 0)
        self._confusion = Counter[tuple[int, int]]()  # how often, by class and predicted class

    @property
    def applies(self) -> bool:
        """Whether the data has classes and the loss takes its targets for them, so that there is something to see."""
        return self._applies

    def see(self, batch: EvaluatedBatch) -> None:
        """Takes in a batch of this rank."""
        outputs, targets = batch.outputs, metric_targets(self._loss, batch.targets)
        self._applies &= (
            isinstance(outputs, Tensor)
            and outputs.dim() >= 2
            and outputs.shape[1] == self._num_classes
            and targets.shape == (len(outputs), *outputs.shape[2:])
            and not targets.is_floating_point()
        )
        if not self._applies:
            return
        predicted = outputs.argmax(1)
        self._count(predicted, targets)
        scores = self._scores(outputs, predicted, targets).cpu()
        self._num_samples += len(scores)
        self._num_wrong += int((scores > 0).sum())
        found = [float(f"{score:.{_DIGITS}g}") for score in scores.tolist()]
        numbers = batch.index.tolist()
        wrong = [
            (-score, number, row) for row, (score, number) in enumerate(zip(found, numbers, strict=True)) if score > 0
        ]
        for order, number, row in sorted(wrong)[: self._num_examples]:
            last = self._worst[-1][:2] if len(self._worst) == self._num_examples else None
            if last is None or (order, number) < last:
                facts = self._facts(batch, row, predicted[row], targets[row])
                self._worst = sorted([*self._worst, Scored(order, number, facts)])[: self._num_examples]

    def content(self) -> dict[str, Any] | None:
        """What the file holds, the same on every rank: a collective. None if there are no classes to confuse."""
        applies = world.on_all_ranks(self._applies)
        if not all(applies):
            return None
        # Images travel once it is known which of them are wanted.
        best = sorted(pair for part in world.on_all_ranks([one[:2] for one in self._worst]) for pair in part)
        wanted = best[: self._num_examples]
        mine = [one for one in self._worst if one[:2] in wanted]
        chosen = sorted(one for part in world.on_all_ranks(mine) for one in part)
        counts = world.on_all_ranks((self._num_samples, self._num_wrong))
        names = list(self._data.class_names)
        return {
            "num_samples": sum(samples for samples, _ in counts),
            "num_wrong": sum(wrong for _, wrong in counts),
            "num_classes": self._num_classes,
            "classes": names,
            "colors": colors_of(self._num_classes) if any("dice" in one.facts for one in chosen) else [],
            "confusion": self._counts(),
            "examples": [{"index": one.sample, "name": self._name(one.sample), **one.facts} for one in chosen],
        }

    def _scores(self, outputs: Tensor, predicted: Tensor, targets: Tensor) -> Tensor:
        """The score of each sample, (N,) float64; 0 if it is right, or has no label that counts."""
        valid = self._valid(targets)
        if targets.dim() > 1:
            return 1 - _dice(predicted, targets, valid, outputs.shape[1])
        labels = torch.where(valid, targets, 0)
        losses = torch.nn.functional.cross_entropy(outputs.double(), labels, reduction="none")
        return torch.where(valid & (predicted != targets), losses, 0.0)

    def _facts(self, batch: EvaluatedBatch, row: int, predicted: Tensor, target: Tensor) -> dict[str, Any]:
        image = draw_image(batch.images[row], *self._data.pixel_stats)
        if target.dim() > 0:
            dice = 1 - float(self._scores(batch.outputs[row : row + 1], predicted[None], target[None]))
            pictures = {"image": image, "truth": draw_mask(target), "prediction": draw_mask(predicted)}
            return {"dice": round(dice, _DIGITS), **pictures}
        probabilities = batch.outputs[row].double().softmax(0)
        truth, prediction = int(target), int(predicted)
        return {
            "truth": truth,
            "prediction": prediction,
            "probability_of_truth": round(float(probabilities[truth]), _DIGITS),
            "probability": round(float(probabilities[prediction]), _DIGITS),
            "image": image,
        }

    def _valid(self, targets: Tensor) -> Tensor:
        return torch.ones_like(targets, dtype=torch.bool) if self._ignored is None else targets != self._ignored

    def _count(self, predicted: Tensor, targets: Tensor) -> None:
        """Adds a batch to the confusion matrix, of which the pairs that occur are kept."""
        if self._num_classes > MOST_CLASSES:
            return
        counts = torch.bincount((targets * self._num_classes + predicted)[self._valid(targets)])
        numbers = counts.nonzero()[:, 0]
        for number, count in zip(numbers.tolist(), counts[numbers].tolist(), strict=True):
            self._confusion[divmod(number, self._num_classes)] += count

    def _counts(self) -> list[list[int]] | None:
        """Class, predicted class and how often, for all pairs that occur; None for too many classes."""
        total = Counter[tuple[int, int]]()
        for part in world.on_all_ranks(self._confusion):
            total.update(part)
        return [[*pair, count] for pair, count in sorted(total.items())] if self._num_classes <= MOST_CLASSES else None

    def _name(self, index: int) -> str:
        images = getattr(self._data.val, "images", None)
        return images.source.name(index) if isinstance(images, Decoded) else ""


def write_mistakes(run_dir: Path, step: int, mistakes: Mistakes, *, writes: bool) -> None:
    """Writes `mistakes.json` on the rank that `writes`; a collective. A disk that refuses is a warning.

    Args:
        step: that the weights are of.
    """
    content = mistakes.content()
    if content is None or not writes:
        return
    try:
        write_text(run_dir / file_names.MISTAKES, json.dumps({"step": step, **content}) + "\n")
    except OSError as error:  # a view of the results, and not the results
        log.warning("%s; the report lacks it", unwritable(error))


def _dice(predicted: Tensor, targets: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Mean Dice of each mask over the foreground classes that it or the prediction has, (N,) float64; 1 for none."""
    first = torch.arange(len(targets), device=targets.device)[:, None] * num_classes

    def count(classes: Tensor, where: Tensor) -> Tensor:
        cells = (first + classes.flatten(1))[where.flatten(1)]
        return torch.bincount(cells, minlength=len(targets) * num_classes).view(-1, num_classes)[:, 1:].double()

    overlap = count(predicted, valid & (predicted == targets))
    size = count(predicted, valid) + count(targets, valid)
    present = size > 0
    dice = torch.where(present, 2 * overlap / size.clamp(min=1), 0.0).sum(1) / present.sum(1).clamp(min=1)
    return torch.where(present.any(1), dice, 1.0)
