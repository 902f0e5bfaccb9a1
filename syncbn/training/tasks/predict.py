"""`task=predict`: what a trained model says about image files; needs nothing of the training data."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from syncbn.atomic_write import write_text
from syncbn.nn.modes import evaluating
from syncbn.training.config.data import DataConfig, DigitsConfig, FashionMnistConfig, MaskFolderConfig, ShapesConfig
from syncbn.training.config.errors import ConfigError, TrainingError, listed
from syncbn.training.config.schema import Config
from syncbn.training.data import workers as processes
from syncbn.training.data.folders import image_files
from syncbn.training.data.original_size import mask_in_original_size
from syncbn.training.data.trained_input import TrainedInput
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.loaded import open_run
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown
from syncbn.training.trainer.build import context_for

PREDICTIONS, MASKS = "predictions.csv", "masks"
_BEST = 5  # classes that a row names


@dataclass(frozen=True)
class Shape:
    """What the model was built for (see `ModelShape`)."""

    num_channels: int
    num_classes: int | None


@dataclass(frozen=True)
class ImageFile:
    """A file to predict for."""

    name: str
    """In the table: relative to `predict.path` where that is one directory."""
    path: str
    mask: Path
    """Where its mask is written, below the directory of masks."""


@dataclass(frozen=True)
class Reader:
    """Prepares image files for the model; worker processes have copies."""

    input: TrainedInput
    paths: Sequence[str]
    dtype: torch.dtype


@dataclass(frozen=True)
class Read:
    """Some files, read."""

    positions: list[int]
    """Of those that could be read."""
    images: Tensor | None
    """(N, C, H, W), in the order of `positions`; None for none."""
    sizes: list[tuple[int, int]]
    """Heights and widths of the images, upright."""
    errors: dict[int, str]
    """Why the others could not be read, by position."""


Row = tuple[int, list[str]]  # position of the file, and the cells of its row after the name; the last is an error


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Predicts for the files of `predict.path`, dealt to the ranks in batches; every rank calls it.

    Rank 0 writes `predictions.csv`, a row per file in the order of their names; of masks each rank writes those of its
    files below `masks/`. Returns no metrics.

    Raises:
        ConfigError: on every rank: no image is found; the checkpoint does not say how images are prepared, or the model
            has no output for each class; see also `open_run`.
        TrainingError: on every rank: a file cannot be read; all others have been predicted, and its row says why.
    """
    with failing_together():
        opened = open_run(config, run_dir)
        described = TrainedInput.of(opened.checkpoint)
        names = class_names(opened.config.data, described)
        has_masks = isinstance(opened.config.data, MaskFolderConfig | ShapesConfig)
        found = find_images(opened.config.predict.paths, distinct_masks=has_masks)
    context = context_for(opened.config, context)
    model = opened.model(Shape(described.preparation.channels, len(names)), context)
    predictor = Predictor(
        opened.config, model, described, names, found, run_dir / MASKS if has_masks else None, context
    )
    with failing_together():
        mine = list(predictor.rows())
    rows = sorted(row for part in world.on_all_ranks(mine) for row in part)
    errors = [(found[number].name, cells[-1]) for number, cells in rows if cells[-1]]
    if context.is_first:
        table = [predictor.header, *([found[number].name, *cells] for number, cells in rows)]
        write_text(run_dir / PREDICTIONS, _as_csv(table))
        written = [shown(run_dir / name) for name in (PREDICTIONS, *([MASKS] if has_masks else []))]
        console.print_table(f"{opened.path}, step {opened.checkpoint['step']}", [
            ("files", str(len(found))), ("not readable", str(len(errors))), ("written", ", ".join(written)),
            ("run directory", shown(run_dir)),
        ])  # fmt: skip
    if errors:
        name, reason = errors[0]
        raise TrainingError(
            f"predict.path: {len(errors)} of {len(found)} files cannot be read, the first is {name} ({reason}); see"
            f" {shown(run_dir / PREDICTIONS)}"
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


def class_names(config: DataConfig, described: TrainedInput) -> list[str]:
    """The names of the model's classes; numbers where they have none."""
    if described.class_names:
        return list(described.class_names)
    if classes := getattr(config, "classes", None):
        return [str(number) for number in classes]
    ten = 10 if isinstance(config, DigitsConfig | FashionMnistConfig) else 0
    return [str(number) for number in range(getattr(config, "num_classes", ten))]


@dataclass(frozen=True)
class Predictor:
    """Predicts for this rank's files."""

    config: Config
    model: nn.Module
    input: TrainedInput
    names: Sequence[str]
    """Of the classes."""
    files: Sequence[ImageFile]
    masks: Path | None
    """Where masks are written; None: images have classes."""
    context: RankContext

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        if self.masks is not None:
            return ["file", "mask", "error"]
        best = [f"{what}_{number}" for number in range(1, self._num_best + 1) for what in ("class", "probability")]
        return ["file", "class", "probability", *best, "error"]

    def rows(self) -> Iterator[Row]:
        """The rows of this rank's files; writes their masks."""
        size, num = self.config.predict.batch_size, len(self.files)
        batches = [range(first, min(first + size, num)) for first in range(0, num, size)]
        mine, done = batches[self.context.rank :: self.context.world_size], 0
        reader = Reader(self.input, [file.path for file in self.files], self.context.dtype)
        total = sum(map(len, mine))
        with (
            evaluating(self.model),
            torch.no_grad(),
            console.progress(total, 0, self.context.is_first, "file") as show,
        ):
            for found in processes.each(reader, read, mine, self.config.data.workers):
                for position, error in found.errors.items():
                    yield position, [*[""] * (len(self.header) - 2), error]
                if found.images is not None:
                    scores = self._scores(self.context.put(found.images))
                    for position, height_and_width, one in zip(found.positions, found.sizes, scores, strict=True):
                        yield position, [*self._cells(self.files[position], one, height_and_width), ""]
                done += len(found.positions) + len(found.errors)
                if show is not None:
                    show(done)

    @property
    def _num_best(self) -> int:
        return min(_BEST, len(self.names))

    def _scores(self, images: Tensor) -> Tensor:
        """Probabilities (N, K), or (N, K, H, W) for masks, float64 on the CPU."""
        scores = self._probabilities(images)
        if self.config.predict.flip:
            mirrored = self._probabilities(images.flip(-1))
            scores = (scores + (mirrored if self.masks is None else mirrored.flip(-1))) / 2
        return scores.cpu()

    def _probabilities(self, images: Tensor) -> Tensor:
        with self.context.forward_context():
            outputs = self.model(images)
        wanted = f"(N, {len(self.names)}{', H, W' if self.masks is not None else ''})"
        num_dims = 2 if self.masks is None else 4
        if not isinstance(outputs, Tensor) or outputs.dim() != num_dims or outputs.size(1) != len(self.names):
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ConfigError(f"task=predict: expected outputs for classes of shape {wanted}, got {got}; export it"
                              " (task=export) and predict with a loop of your own")  # fmt: skip
        outputs = outputs.to(torch.float64)
        several = getattr(self.config.loss, "name", "") == "bce"  # labels that do not exclude each other
        return outputs.sigmoid() if several else outputs.softmax(1)

    def _cells(self, file: ImageFile, scores: Tensor, size: tuple[int, int]) -> list[str]:
        """The cells between the name and the error; writes the mask."""
        if self.masks is not None:
            mask = mask_in_original_size(scores, self.input.preparation.fit, size)
            (self.masks / file.mask).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.numpy()).save(self.masks / file.mask)
            return [_printable(Path(self.masks.name, file.mask))]
        values, order = scores.sort(descending=True, stable=True)
        best = [(self.names[number], f"{value:.6f}") for value, number in zip(values.tolist(), order.tolist())]  # noqa: B905
        return [cell for pair in (best[0], *best[: self._num_best]) for cell in pair]


def read(reader: Reader, positions: Sequence[int]) -> Read:
    """Reads and prepares some files."""
    readable, images, sizes, errors = list[int](), list[Tensor](), list[tuple[int, int]](), dict[int, str]()
    for position in positions:
        try:
            with Image.open(reader.paths[position]) as image:
                upright = ImageOps.exif_transpose(image)
            images.append(reader.input.prepare(upright, reader.dtype))
        except Exception as error:  # on a damaged file Pillow's readers raise exceptions of many types
            errors[position] = " ".join(str(error).split()) or type(error).__name__
            continue
        readable.append(position)
        sizes.append((upright.height, upright.width))
    return Read(readable, torch.stack(images) if images else None, sizes, errors)


def _as_csv(table: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def _printable(path: Path) -> str:
    """The path with slashes; bytes of its name that are no text are written as escapes."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()
