"""`task=export`: the evaluated model as files that do not need this package, each checked on real samples.

Every `SyncBatchNorm` becomes a plain batch normalization. The directory `export/` of the run directory gets:

    model.safetensors   the state dict, with the keys of the plain model
    model.pt2           a program of torch.export, for any batch size
    model.onnx          the same for other runtimes (needs the extra `export`)
    export.json         input and output, pixel normalization, labels, and the largest difference of each file

All or nothing: files are written to a temporary directory, reloaded, and compared with the evaluated model; only then
the directory is renamed to `export/`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.atomic_write import replacing_directory
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.report import file_names
from syncbn.report.metric_names import EXPORT, prefixed
from syncbn.surgery.revert import revert_sync_batchnorm
from syncbn.training.config.errors import ConfigError, one_line
from syncbn.training.config.run import EXPORT_FORMATS
from syncbn.training.config.schema import Config
from syncbn.training.data.by_size import of_one_size
from syncbn.training.data.native import NativeData
from syncbn.training.distributed import world
from syncbn.training.distributed.failures import failing_together
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.export_formats import INPUT, OUTPUT, WRITERS, Reloaded, why_no_onnx
from syncbn.training.tasks.loaded import LoadedRun, load_run
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown

log = logging.getLogger(__name__)

_NUM_SAMPLES = 64  # validation samples on which a file is compared with the model
# The largest allowed difference, in units of rounding (the dtype's eps) of the largest output. Other runtimes fold
# batch normalization into convolutions and sum in another order, which costs a few units per layer; a wrong constant
# (another eps, say) costs far more.
_TOLERANCE = 1000
_PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}  # by dimensions of the input


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Exports the model that `load` names, on rank 0; every rank calls it.

    Returns:
        `export/<format>`: the largest absolute difference between the outputs of the file and of the model, the same on
        every rank.

    Raises:
        ConfigError: on every rank: a format that cannot be written here, a model that cannot be exported, or a file
            whose outputs differ from the model's. No file of this export is left behind then.
    """
    loaded = load_run(config, run_dir, replace(context, device=torch.device("cpu")))
    differences: dict[str, float] = {}
    with failing_together(), torch.no_grad():
        if context.is_first:
            differences = _export(loaded, _formats(config, loaded.context.dtype), run_dir / file_names.EXPORT)
    return prefixed(EXPORT, world.on_all_ranks(differences)[0])


def _formats(config: Config, dtype: torch.dtype) -> list[str]:
    """The formats to write, in the order of EXPORT_FORMATS; by default without ONNX where it cannot be written.

    Raises:
        ConfigError: the configuration asks for ONNX, which cannot be written.
    """
    wanted = config.export.formats if config.export.formats is not None else EXPORT_FORMATS
    reason = why_no_onnx(dtype) if "onnx" in wanted else None
    if reason is not None and config.export.formats is not None:
        raise ConfigError(f"export.formats: onnx cannot be written: {reason}")
    if reason is not None:
        log.info("no model.onnx: %s", reason)
    return [name for name in EXPORT_FORMATS if name in wanted and (name != "onnx" or reason is None)]


def _export(loaded: LoadedRun, formats: list[str], directory: Path) -> dict[str, float]:
    """Writes and checks the files; returns the largest absolute difference of each from the evaluated model."""
    images, model = _samples(loaded), loaded.model.eval().requires_grad_(False)
    expected = model(images)
    if not isinstance(expected, Tensor):
        raise ConfigError(f"model: expected one tensor as its output to export, got {type(expected).__name__}")
    if not expected.isfinite().all():
        raise ConfigError(f"load: the outputs of {loaded.path} on validation samples are not finite")
    _revert(model, images)
    largest = float(expected.abs().max())
    tolerance = _TOLERANCE * torch.finfo(images.dtype).eps * max(1.0, largest)
    differences: dict[str, float] = {}
    with replacing_directory(directory) as temporary:
        for name in formats:
            path = temporary / f"model.{name}"
            with _as_config_error(name):
                differences[name] = _difference(WRITERS[name](model, images, path, loaded), images, expected)
            if not differences[name] <= tolerance:  # also if it is NaN
                raise ConfigError(
                    f"export.formats: {path.name} differs from the evaluated model by {differences[name]:.3g} on real"
                    f" samples, more than rounding explains ({tolerance:.3g}); leave {name} out, or use precision=fp64"
                )
        description = _describe(loaded, images, expected) | {
            "largest_difference": {f"model.{name}": value for name, value in differences.items()},
            "tolerance": tolerance,
        }
        (temporary / "export.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    rows = [
        (f"model.{name}", f"{(directory / f'model.{name}').stat().st_size} bytes", f"{difference:.2g}")
        for name, difference in differences.items()
    ]
    console.print_rows(loaded.describe(), ("file", "size", f"largest difference, {len(images)} samples"), rows)
    limit = f"a difference of {tolerance:.2g}, where outputs go up to {largest:.3g}"
    console.print_table("export", [("allowed", limit), ("written", shown(directory)),
                                   ("run directory", shown(directory.parent))])  # fmt: skip
    return differences


def _samples(loaded: LoadedRun) -> Tensor:
    """Validation images as in evaluation, at least two: a program traced with a batch of one takes no other size."""
    if isinstance(loaded.data, NativeData):
        raise ConfigError("data.size: an exported program has one size, and this run has native ones; give"
                          " data.size=[HEIGHT,WIDTH]")  # fmt: skip
    index = torch.arange(min(_NUM_SAMPLES, len(loaded.data.val)))
    if len(index) == 0:
        raise ConfigError("data: expected validation samples to check an export with, got none")
    index = index.repeat(2) if len(index) == 1 else index
    return of_one_size(loaded.data.eval_batch(loaded.data.val, index, loaded.context.dtype)[0])


def _revert(model: nn.Module, images: Tensor) -> None:
    """Replaces every `SyncBatchNorm` by a plain layer, in place.

    Converted layers become what they were before; those built as `SyncBatchNorm` become the class that fits the number
    of dimensions of their input.
    """
    try:
        revert_sync_batchnorm(model)
        built: dict[nn.Module, str] = {
            layer: name for name, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)
        }
        for layer, num_dims in _input_dims(model, built, images).items():
            if num_dims not in _PLAIN:
                raise ValueError(f"{built[layer]}: no plain batch normalization takes {num_dims} dimensions")
            revert_sync_batchnorm(layer, default=_PLAIN[num_dims])
    except ValueError as error:
        raise ConfigError(f"model: cannot be exported: {error}") from None


def _input_dims(model: nn.Module, layers: Iterable[nn.Module], images: Tensor) -> dict[nn.Module, int]:
    """The number of dimensions of each layer's input in a forward pass; 2 for a layer that is not called."""
    dims: dict[nn.Module, int] = dict.fromkeys(layers, 2)

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dims[layer] = inputs[0].dim()

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    model(images[:1])
    for handle in handles:
        handle.remove()
    return dims


def _difference(reloaded: Reloaded, images: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, infinite for NaN, in a batch of all samples and in a batch of one."""
    pairs = [(reloaded(images[:number]), expected[:number]) for number in (len(images), 1)]
    return max((actual - right).abs().max().nan_to_num(torch.inf).item() for actual, right in pairs)


@contextmanager
def _as_config_error(name: str) -> Iterator[None]:
    """Turns an exporter's exception into a ConfigError with one message; an OSError (a full disk) propagates."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = one_line(error)[:300]
        raise ConfigError(
            f"export.formats: {name} fails for this model ({type(error).__name__}: {reason}); leave it out"
        ) from error


def _describe(loaded: LoadedRun, images: Tensor, expected: Tensor) -> dict[str, Any]:
    """The part of export.json that describes input, output and source of the model for its consumers."""
    mean, std = loaded.data.pixel_stats
    numbers = getattr(loaded.config.data, "classes", None) or range(loaded.data.num_classes or 0)
    labels = loaded.data.class_names or numbers
    init = {name: init.path for name, init in loaded.config.init.items()}
    return {
        "input": {
            "name": INPUT,
            "shape": ["batch", *images.shape[1:]],
            "dtype": str(images.dtype).removeprefix("torch."),
            "pixels": "numbers from 0 to 1, whatever the files hold (synthetic data: as drawn)",
            "normalization": "(pixels - mean) / std, by channel",
            "mean": mean.flatten().tolist(),
            "std": std.flatten().tolist(),
            "image": loaded.data.image_settings,
        },
        "output": {"name": OUTPUT, "shape": ["batch", *expected.shape[1:]], "labels": [str(name) for name in labels]},
        "source": {"checkpoint": str(loaded.path), "step": loaded.step, "weights": loaded.weights, "init": init},
    }
