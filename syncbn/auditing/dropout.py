"""Detection of dropout before batch normalization: by the order of modules, and by tracing the tensors of a forward.

Dropout scales the activations that remain by 1/(1-p), which preserves the mean and multiplies the second moment by that
factor. Batch normalization after it gathers the larger variance in training and uses it in evaluation, where nothing is
dropped (Li et al. 2019, "Understanding the disharmony between dropout and batch normalization by variance shift").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from syncbn.auditing.rules import Finding, new_finding
from syncbn.nn.batchnorm import SyncBatchNorm
from syncbn.torch_compat import pytree

MIN_DROPOUT = 0.1  # lower rates are not reported: the second moment grows by less than 1/9
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # not AlphaDropout: it keeps the variance
_DROPOUT_CALLS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout}
_NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORMALIZATION_CALLS = {F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm}
# Modules of an nn.Sequential that pass the variance shift on; after any other module the search starts anew.
_TRANSPARENT = (nn.Linear, nn.modules.conv._ConvNd, nn.Identity, nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.GELU,
                nn.SiLU, nn.ELU, nn.Hardswish, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
                nn.modules.pooling._AdaptiveAvgPoolNd)  # fmt: skip


def after_dropout(modules: dict[str, nn.Module]) -> Iterator[Finding]:
    """A finding for each layer after dropout in an `nn.Sequential`, if what is between passes the variance shift on."""
    names = {id(module): name for name, module in modules.items()}
    for module in modules.values():
        if _runs_in_order(module):
            is_dropped = False
            for child in _chain(module):
                if isinstance(child, _DROPOUT_MODULES):
                    is_dropped |= child.p >= MIN_DROPOUT
                elif isinstance(child, _BatchNorm) and is_dropped and not _is_at_rest(child, modules):
                    yield new_finding("dropout-before-bn", names[id(child)])
                if not isinstance(child, (*_TRANSPARENT, *_DROPOUT_MODULES)):
                    is_dropped = False


def _runs_in_order(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _chain(sequence: nn.Module) -> Iterator[nn.Module]:
    """The modules of a sequence in the order in which they run, with nested sequences flattened."""
    for child in sequence._modules.values():
        if child is None:
            continue
        if _runs_in_order(child):
            yield from _chain(child)
        else:
            yield child


def _is_at_rest(layer: _BatchNorm, modules: dict[str, nn.Module]) -> bool:
    """Whether the running statistics of a layer do not change while the model trains."""
    frozen = isinstance(layer, SyncBatchNorm) and layer.stats_frozen
    return frozen or (not layer.training and next(iter(modules.values())).training)


class DropoutTrace(TorchFunctionMode):
    """Tracks, while active, which tensors were computed from the output of dropout, by whatever torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self._rates = WeakTensorKeyDictionary()

    def rate(self, tensor: Tensor) -> float:
        """The largest rate of the dropouts that this tensor was computed from; 0 without any."""
        return float(self._rates.get(tensor, 0.0))

    def forget(self, tensor: Tensor) -> None:
        """Stops tracking a tensor, because it has been normalized."""
        self._rates.pop(tensor, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func not in _NORMALIZATION_CALLS:
            inputs = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            rate = max([_rate_of_call(func, args, kwargs), *(self.rate(tensor) for tensor in inputs)])
            for leaf in pytree.tree_leaves(output) if rate > 0 else ():
                if isinstance(leaf, Tensor):
                    self._rates[leaf] = rate
        return output


def _rate_of_call(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> float:
    if func not in _DROPOUT_CALLS:
        return 0.0
    values = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    return float(values.get("p", 0.5)) if values.get("training", values.get("train", True)) else 0.0
