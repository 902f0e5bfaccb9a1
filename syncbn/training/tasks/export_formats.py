"""The file formats of `task=export`: each is written, reloaded, and given back as a function that runs the file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.training.tasks.loaded import LoadedRun
from syncbn.training.trainer.build import build_model

# Names in the programs, and in export.json.
INPUT = "images"
OUTPUT = "logits"

_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Reloaded = Callable[[Tensor], Tensor]
"""A file that was written and reloaded: from images to outputs."""


def why_no_onnx(dtype: torch.dtype) -> str | None:
    """Why ONNX cannot be written; None if it can."""
    missing = [package for package in _ONNX_PACKAGES if find_spec(package) is None]
    if missing:
        return f"it needs {', '.join(missing)}; pip install 'syncbn[export]'"
    if dtype == torch.float64:
        return "onnxruntime has no float64 convolution to check it with; add precision=fp32"
    return None


def _write_safetensors(model: nn.Module, images: Tensor, path: Path, loaded: LoadedRun) -> Reloaded:
    from safetensors.torch import load_file, save

    # Cloned: the format does not store one tensor under two keys, as tied weights have them.
    path.write_bytes(save({key: value.contiguous().clone() for key, value in model.state_dict().items()}))
    # Evaluation alone, which what needs synchronized layers does not change.
    bn = replace(loaded.config.bn, sync=False, group="world", fuse=False, skip_nonfinite=False)
    plain = replace(loaded.config, bn=bn)
    fresh = build_model(plain, loaded.data, loaded.context)
    fresh.load_state_dict(load_file(path))
    return fresh.eval()


def _write_pt2(model: nn.Module, images: Tensor, path: Path, loaded: LoadedRun) -> Reloaded:
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=_any_batch_size()), path)
    return torch.export.load(path).module()


def _write_onnx(model: nn.Module, images: Tensor, path: Path, loaded: LoadedRun) -> Reloaded:
    import onnxruntime

    with _quietly():
        torch.onnx.export(
            model,
            (images,),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=_any_batch_size(),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda some: torch.from_numpy(session.run([OUTPUT], {INPUT: some.numpy()})[0])


def _any_batch_size() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences torch's ONNX exporter, which logs each pass, missing packages, and its own deprecated calls."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, LoadedRun], Reloaded]] = {
    "safetensors": _write_safetensors,
    "pt2": _write_pt2,
    "onnx": _write_onnx,
}
"""By the name of the format: writes a plain model to a path, traced with some images, and reloads it."""
