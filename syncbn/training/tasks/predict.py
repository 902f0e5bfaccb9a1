"""`task=predict`: what a trained model says about image files; needs nothing of the training data."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from syncbn.atomic_write import replacing_directory, write_text
from syncbn.nn.modes import evaluating
from syncbn.report import file_names
from syncbn.training.config.errors import ConfigError, TrainingError, listed, one_line
from syncbn.training.config.layout import image_files
from syncbn.training.config.run import PredictConfig
from syncbn.training.config.schema import Config
from syncbn.training.data import workers as processes
from syncbn.training.data.by_size import BySize, Pixels, in_order, mapped
from syncbn.training.data.original_size import mask_in_original_size
from syncbn.training.data.preparation import Preparation, upright_size
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.ensemble import Member, open_members
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown

_BEST = 5  # classes that a row names


@dataclass(frozen=True)
class ImageFile:
    """A file to predict for."""

    name: str
    """Name in the table of predictions: relative to `predict.path` where that is one directory."""
    path: str
    mask: Path
    """Where its mask is written, below the directory of masks."""


@dataclass(frozen=True)
class Reader:
    """Prepares image files for the models; worker processes have copies."""

    preparations: Sequence[Preparation]
    paths: Sequence[str]


@dataclass(frozen=True)
class Read:
    """Some files, read."""

    positions: list[int]
    """Positions of the files that could be read."""
    pixels: list[Pixels]
    """Images, for each preparation (N, C, H, W) uint8, in the order of `positions`; empty if there are none."""
    sizes: list[tuple[int, int]]
    """Heights and widths of the images, upright."""
    errors: dict[int, str]
    """Why the others could not be read, by position."""


Row = tuple[int, list[str]]  # position of the file, and the cells of its row after the name; the last is an error


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Predicts for the files of `predict.path`, dealt to the ranks in batches; every rank calls it.

    Where `load` is a multirun, probabilities (or numbers) are the average of those of the models of all its jobs.

    Rank 0 writes `predictions.csv`, a row per file in the order of their names; of masks each rank writes those of its
    files, and when all are written they take the place of an earlier `masks/`. Returns no metrics.

    Raises:
        ConfigError: on every rank: no image is found; the checkpoint does not say how images are prepared, or the model
            has no output for each class; see also `open_members`.
        TrainingError: on every rank: a file cannot be read; all others have been predicted, and its row says why.
    """
    with failing_together():
        opened = open_members(config, run_dir)
        first, predict = opened[0], opened[0].run.config.predict
        found = find_images(predict.paths, distinct_masks=first.has_masks)
    members = [one.member(context) for one in opened]
    with ExitStack() as stack:
        masks = None
        if first.has_masks:
            here = stack.enter_context(replacing_directory(run_dir / file_names.MASKS)) if context.is_first else None
            masks = world.on_all_ranks(here)[0]
        predictor = Predictor(predict, members, first.names, found, masks, first.run.config.data.workers)
        with failing_together():
            mine = list(predictor.rows())
        rows = sorted(row for part in world.on_all_ranks(mine) for row in part)
    errors = [(found[number].name, cells[-1]) for number, cells in rows if cells[-1]]
    if context.is_first:
        table = [predictor.header, *([found[number].name, *cells] for number, cells in rows)]
        write_text(run_dir / file_names.PREDICTIONS, _as_csv(table))
        written = [shown(run_dir / file_names.PREDICTIONS), *([] if masks is None else [shown(masks)])]
        title = f"{first.run.path}, step {first.run.checkpoint['step']}"
        if len(opened) > 1:
            title = f"the average of {len(opened)} models in {config.load}"
        console.print_table(title, [
            ("files", str(len(found))), ("not readable", str(len(errors))), ("written", ", ".join(written)),
            ("run directory", shown(run_dir)),
        ])  # fmt: skip
    if errors:
        name, reason = errors[0]
        raise TrainingError(
            f"predict.path: {len(errors)} of {len(found)} files cannot be read, the first is {name} ({reason}); see"
            f" {shown(run_dir / file_names.PREDICTIONS)}"
        )
    return {}


def find_images(paths: Sequence[str], *, distinct_masks: bool = False) -> list[ImageFile]:
    """The image files of directories (at any depth) and paths, each once, sorted by name.

    Raises:
        ConfigError: a path that is not there, or no image at all; with `distinct_masks` two whose masks would be one.
    """
    found: dict[str, ImageFile] = {}
    for text in paths:
        path = Path(text).expanduser()
        if not path.exists():
            raise ConfigError(f"predict.path: expected a directory or a file, found none at {text!r}")
        for one in image_files(path, Counter()) if path.is_dir() else [path]:
            below = one.relative_to(path) if path.is_dir() else Path(one.name)
            shortest = below if path.is_dir() and len(paths) == 1 else one
            name = _printable(shortest)
            found[name] = ImageFile(name, str(one), below.with_suffix(".png"))
    if not found:
        raise ConfigError(f"predict.path: no image in {listed(paths)}")
    masks: dict[Path, str] = {}
    for name, file in sorted(found.items()) if distinct_masks else ():
        if file.mask in masks:
            raise ConfigError(f"predict.path: the masks of {masks[file.mask]} and {name} would be one file; rename one")
        masks[file.mask] = name
    return [found[name] for name in sorted(found)]


@dataclass(frozen=True)
class Predictor:
    """Predicts for this rank's files."""

    settings: PredictConfig
    members: Sequence[Member]
    names: Sequence[str]
    """Names of the classes, labels or numbers."""
    files: Sequence[ImageFile]
    masks: Path | None
    """The directory that masks are written to; None: images have classes, labels or numbers."""
    workers: int

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        if self.masks is not None:
            return ["file", "mask", "error"]
        if self.members[0].kind != "classes":
            return ["file", *self.names, "error"]
        best = [f"{what}_{number}" for number in range(1, self._num_best + 1) for what in ("class", "probability")]
        return ["file", "class", "probability", *best, "error"]

    def rows(self) -> Iterator[Row]:
        """The rows of this rank's files; writes their masks."""
        size, num, context = self.settings.batch_size, len(self.files), self.members[0].context
        batches = [range(first, min(first + size, num)) for first in range(0, num, size)]
        mine, done = batches[context.rank :: context.world_size], 0
        reader = Reader(self._preparations, [file.path for file in self.files])
        total = sum(map(len, mine))
        with (
            ExitStack() as stack,
            torch.no_grad(),
            console.progress(total, 0, context.is_first, "file") as show,
        ):
            for member in self.members:
                stack.enter_context(evaluating(member.model))
            for found in processes.each(reader, read, mine, self.workers):
                for position, error in found.errors.items():
                    yield position, [*[""] * (len(self.header) - 2), error]
                if found.pixels:
                    scores = self._scores(found.pixels)
                    for position, height_and_width, one in zip(found.positions, found.sizes, scores, strict=True):
                        yield position, [*self._cells(self.files[position], one, height_and_width), ""]
                done += len(found.positions) + len(found.errors)
                if show is not None:
                    show(done)

    @property
    def _num_best(self) -> int:
        return min(_BEST, len(self.names))

    @property
    def _preparations(self) -> list[Preparation]:
        """Those that differ: members that prepare images alike, as the folds of a data set do, share the pixels."""
        return list(dict.fromkeys(member.input.preparation for member in self.members))

    def _scores(self, pixels: Sequence[Pixels]) -> Iterator[Tensor]:
        """Probabilities or numbers of each file, averaged over the members, (K,) or (K, H, W), float64 on the CPU."""
        of_preparation = dict(zip(self._preparations, pixels, strict=True))
        found = [
            mapped(of_preparation[member.input.preparation], partial(member.scores, flip=self.settings.flip))
            for member in self.members
        ]
        for scores in zip(*(in_order(one) for one in found), strict=True):
            yield torch.stack(scores).mean(0) if len(scores) > 1 else scores[0]

    def _cells(self, file: ImageFile, scores: Tensor, size: tuple[int, int]) -> list[str]:
        """The cells between the name and the error; writes the mask."""
        if self.masks is not None:
            mask = mask_in_original_size(scores, self.members[0].input.preparation.fit, size)
            (self.masks / file.mask).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.numpy()).save(self.masks / file.mask)
            return [_printable(Path(file_names.MASKS, file.mask))]
        if self.members[0].kind != "classes":
            digits = ".6f" if self.members[0].kind == "labels" else ".6g"
            return [f"{value:{digits}}" for value in scores.tolist()]
        values, order = scores.sort(descending=True, stable=True)
        best = [(self.names[number], f"{value:.6f}") for value, number in zip(values.tolist(), order.tolist())]  # noqa: B905
        return [cell for pair in (best[0], *best[: self._num_best]) for cell in pair]


def read(reader: Reader, positions: Sequence[int]) -> Read:
    """Reads and prepares some files."""
    readable, sizes, errors = list[int](), list[tuple[int, int]](), dict[int, str]()
    images = [list[Tensor]() for _ in reader.preparations]
    for position in positions:
        try:
            fitted = list[Tensor]()
            for preparation in reader.preparations:
                with Image.open(reader.paths[position]) as image:
                    size = upright_size(image)
                    fitted.append(preparation.fitted_file(image))
        except Exception as error:  # on a damaged file Pillow's readers raise exceptions of many types
            errors[position] = one_line(error)
            continue
        for prepared, one in zip(images, fitted, strict=True):
            prepared.append(one)
        readable.append(position)
        sizes.append(size)
    pixels: list[Pixels] = [
        BySize.of(prepared, prepared[0]) if preparation.size is None else torch.stack(prepared)
        for preparation, prepared in zip(reader.preparations, images, strict=True)
        if readable
    ]
    return Read(readable, pixels, sizes, errors)


def _as_csv(table: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def _printable(path: Path) -> str:
    """The path with slashes; bytes of its name that are no text are written as escapes."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
