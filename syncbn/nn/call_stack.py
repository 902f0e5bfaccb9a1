"""Inspection of the Python call stack: every place where the package looks at its callers' frames, and why.

Tested with CPython 3.11. Frames are an implementation detail of CPython.
"""

from __future__ import annotations

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
