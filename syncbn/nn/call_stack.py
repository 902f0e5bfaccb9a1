"""Inspection of the Python call stack: every place where the package looks at its callers' frames, and why.

Tested with CPython 3.11. Frames are an implementation detail of CPython.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.autograd.function import FunctionCtx

# Functions that replace layers of any class derived from torch's _BatchNorm: those of torch (and with it Lightning's
# sync_batchnorm=True), timm and mmengine, and of apex.
_CONVERTERS = ("convert_sync_batchnorm", "convert_syncbn_model", "revert_sync_batchnorm")


def foreign_converter() -> str | None:
    """The dotted name of another library's converter if it called the caller of this function; None otherwise.

    Such a converter takes any `_BatchNorm` and would replace our layer by one of its own class. It reads the layer's
    width and calls no method of ours, so only the caller's name distinguishes it from other code that reads the width.
    """
    frame = sys._getframe(2)
    module = str(frame.f_globals.get("__name__", ""))
    if frame.f_code.co_name in _CONVERTERS and not module.startswith("syncbn."):
        return f"{module}.{frame.f_code.co_name}"
    return None


# Functions that fold batch normalization into the layer in front of it, by their names: those of torch, torch.ao, mmcv,
# mmengine, timm, ultralytics, detectron2's relatives, and of the many networks that are reparametrized for inference
# (`fuse_conv_bn_eval`, `fuse_conv_and_bn`, `_fuse_bn_tensor`, `fold_bn`, `merge_bn`, `absorb_bn`, `switch_to_deploy`).
_FOLDS = re.compile(r"fus(e|ing|ion)|fold|absorb|merge_?bn|bn_?merge|reparam|to_deploy|conv_?bn", re.IGNORECASE)
# Functions of torch that take the vectors of a layer, which whoever folds has read from it.
_FOLD_VECTORS = {"fuse_conv_bn_weights", "fuse_linear_bn_weights"}


def folding_function() -> str | None:
    """The dotted name of the function that called the caller of this one, if it folds batch normalization; else None.

    Whoever folds a layer reads its eps and its running variance. So a function is one that folds if its name says so
    and its code reads `running_var`, or if it calls torch's functions that fold vectors. All others, a monitor or a
    test, read what they like.
    """
    frame = sys._getframe(2)
    code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
    if module.startswith("syncbn."):
        return None
    is_folder = _FOLDS.search(code.co_name) is not None and "running_var" in code.co_names
    return f"{module}.{code.co_qualname}" if is_folder or not _FOLD_VECTORS.isdisjoint(code.co_names) else None


def function_context(method: str) -> FunctionCtx | None:
    """The context of the outermost autograd function whose `method` is on the call stack; None if there is none.

    Reentrant checkpointing runs its module inside of such a function, and gives nobody access to its context.

    Args:
        method: "forward" or "backward".
    """
    found = None
    for frame in _callers():
        if frame.f_code.co_name == method and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            found = frame.f_locals["ctx"]
    return found


def is_inside(module: str) -> bool:
    """Whether a function of the named module (such as `torch.utils.checkpoint`) is on the call stack."""
    return any(frame.f_globals.get("__name__") == module for frame in _callers())


def _callers() -> Iterator[Any]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
