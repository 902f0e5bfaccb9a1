"""Compilation, memory format, TF32 and deterministic operators, with checks at start that they can work."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.training.config.errors import ConfigError, printable
from syncbn.training.config.schema import Config
from syncbn.training.trainer.lockstep_model import LockstepModel

log = logging.getLogger(__name__)


def check(config: Config, device: torch.device) -> None:
    """Checks that `tf32` and `compile`, if enabled, work on this machine.

    Raises:
        ConfigError: one does not; the message gives the reason and a remedy.
    """
    if config.tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ConfigError(
            f"tf32: expected an NVIDIA GPU of compute capability 8.0 or newer, got {_name(device)}; set tf32=false"
        )
    if config.compile is False:
        return
    backend = _backend(config.compile)
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        named = ", ".join(sorted(torch.compiler.list_backends()))
        raise ConfigError(
            f"compile: expected true, false, or a backend of torch.compile such as {named}, got {backend!r}"
        )
    own, names = ("CXX", ["g++", "clang++"]) if device.type == "cpu" else ("CC", ["gcc", "clang"])
    names = [os.environ[own]] if own in os.environ else names
    if backend == "inductor" and not any(map(shutil.which, names)):
        raise ConfigError(
            f"compile: Inductor needs a compiler at run time, here is no {names[0]}; install it, or set compile=false"
        )
    log.info("compiling an operator with %s, to see whether it works here ...", backend)
    _try(backend, device)


def _try(backend: str, device: torch.device) -> None:
    """Compiles one operator: an installed compiler may still lack headers, OpenMP, or the right to write its cache."""
    try:
        torch.compile(lambda tensor: tensor * 2 + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = [line for line in said if re.search(r"\berror\b", line, re.IGNORECASE)]
        reason = printable((found or said or [type(error).__name__])[0])
        raise ConfigError(f"compile: {backend} does not work here: {reason}; repair it, or set compile=false") from None


@contextmanager
def applied(config: Config) -> Iterator[None]:
    """Context with TF32 and deterministic operators as configured; restores torch's flags for a multirun's next job."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        # Without this variable, cuBLAS calls raise in this mode; it is read at the first of them.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        with _tf32(config.tf32) if torch.cuda.is_available() else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def lay_out(model: nn.Module) -> None:
    """Converts the weights of 2d and 3d convolutions to channels_last, in place."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.dim() in formats:
            # `contiguous` would keep the strides of 1x1 kernels, and DDP would warn that their gradients have others.
            parameter.data = parameter.data.to(memory_format=formats[parameter.dim()])


def executed(model: nn.Module, compile: bool | str, *, by_size: bool = False) -> nn.Module:
    """The module that a training step calls: the model, or a wrapper that is compiled, or takes images `by_size`."""
    if by_size:
        return LockstepModel(model)
    return model if compile is False else Compiled(model, _backend(compile))


class Compiled(nn.Module):
    """A wrapper with a compiled forward pass; parameters and buffers are the model's own.

    A batch of zero rows, which Inductor does not take, goes through the uncompiled model, whose collectives come in the
    same order.
    """

    wrapped_child = "model"  # patterns and names of modules skip this wrapper

    def __init__(self, model: nn.Module, backend: str) -> None:
        super().__init__()
        self.model = model
        # In a tuple, because a submodule would register the model a second time. Without fullgraph=True: a user's model
        # may break the graph, and still has the same collectives in the same order.
        self._compiled = (torch.compile(model, backend=backend),)

    def forward(self, input: Tensor) -> Any:
        """The outputs of the model."""
        return self._compiled[0](input) if len(input) else self.model(input)


def _backend(compile: bool | str) -> str:
    return compile if isinstance(compile, str) else "inductor"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
