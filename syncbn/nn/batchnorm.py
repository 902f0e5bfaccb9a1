"""The `SyncBatchNorm` layer: its state, its modes, and freezing of its statistics and affine parameters.

(Longer than other files: it is one class, and a third of it is the class's documentation.)
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.kernels.activations import ACTIVATIONS
from syncbn.kernels.step import Statistics
from syncbn.nn.call_stack import folding_function, foreign_converter
from syncbn.nn.conversion import convert
from syncbn.nn.frozen import freeze_parameters, has_frozen_parameters, own_parameters, unfreeze_parameters
from syncbn.nn.frozen_stats import forget_counter, is_reset, remember_counter, warn_not_reset
from syncbn.nn.functional import (
    Call,
    NormalizeByBatch,
    as_mask,
    check_arguments,
    normalize_by_batch,
    normalize_by_running,
)
from syncbn.nn.groups import LostGroup, as_group, collective_group
from syncbn.nn.lean import check_lean
from syncbn.nn.recorder import record_local
from syncbn.nn.stale_ddp import check_wrapper
from syncbn.nn.tracing import PROXIES, is_traced, record_call, refuse_context
from syncbn.torch_compat import (
    backward_pass,
    ddp_around,
    eps_in_dynamo,
    forward_ad_level,
    init_batch_norm,
    jit_trace,
    proxy_mode,
    reset_batch_norm,
    saved_tensor_hooks,
    set_eps,
    transforms_active,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from syncbn.nn.pool import Pool

# Attributes set by context managers; copies and pickles leave them out.
_OF_A_CONTEXT = ("_pool", "_record", "_stats_disabled")
# Names of the vectors that may be looked up in the dictionaries of a module.
_PARAMETERS, _BUFFERS = {"weight", "bias"}, {"running_mean", "running_var", "num_batches_tracked"}


def width_of(layer: nn.Module) -> int:
    """C of a batch normalization of any class; 0 for a lazy one before its first input. (`num_features` may raise.)"""
    width: int = layer.__dict__.get("num_features", 0)
    return width


def _width_of_vectors(layer: _BatchNorm) -> int | None:
    """C by the length of a layer's vectors; None if it has none."""
    for vector in (layer.running_mean, layer.weight):
        if vector is not None:
            return vector.numel()
    return None


class SyncBatchNorm(_BatchNorm):
    r"""Batch normalization with the statistics of the global batch: all samples of all ranks.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    per channel, where mean and (biased) variance are those of the concatenation of every rank's input. In training
    `forward` updates the running statistics: new = (1 - momentum) * old + momentum * batch, with the variance unbiased
    by the global count. W ranks with b samples each compute what one process with `nn.BatchNorm` computes on W * b
    samples.

    | training | track_running_stats | stats frozen | normalizes with    | running statistics | collectives fwd / bwd |
    |----------|---------------------|--------------|--------------------|--------------------|-----------------------|
    | yes      | yes                 | no           | global batch       | updated            | 1 / 1                 |
    | yes      | no                  | no           | global batch       | none kept          | 1 / 1                 |
    | no       | yes                 | any          | running statistics | untouched          | 0 / 0                 |
    | no       | no                  | no           | local batch        | none kept          | 0 / 0                 |
    | yes      | yes                 | yes          | running statistics | untouched          | 0 / 0                 |

    Inside of `syncbn.disable_running_stats` the first row leaves running statistics untouched, too.

    Communication is one all-reduce of 4C+1 float64 numbers forward and one of 2C backward (the latter only if the input
    needs a gradient), and none without a process group or in a group of one. All ranks of the group have to call a
    training layer equally often and in the same mode; the number of samples may differ between ranks, and may be 0. If
    no rank has a sample, nothing is updated. If the global batch has a single value per channel, the output is the bias
    and the running variance is not updated.

    The class derives from `_BatchNorm` but not from `nn.SyncBatchNorm`, so DDP accepts it on CPU. Its state dict has
    the keys of `nn.BatchNorm1d/2d/3d` and can be loaded from and into those.

    Args:
        num_features: C, the size of dimension 1 of the input (N, C, ...); any number of further dimensions.
        eps: added to the variance.
        momentum: the weight of the new batch in the running statistics; None for the cumulative average.
        affine: learnable weight (gamma) and bias (beta).
        track_running_stats: keep running statistics; without them evaluation normalizes with the local batch, as torch
            does.
        process_group: the ranks to sum over, a group or a one-dimensional `DeviceMesh`; None for all ranks of the job.
        bias: False for a learnable weight without a bias.
        activation: None, "relu", "leaky_relu" (slope 0.01) or "silu": fused into the pass that writes the output, as is
            the addition of a residual. Without a residual, no further activation is saved for backward: the
            activation's input is recomputed. With one, the output is saved too, or for "silu" the residual.
        memory: "lean" saves the output for backward instead of the input, and recovers the normalized input from it.
            Where the next layer saves its input (a convolution does), this is one activation less. Only for
            `activation` None and "leaky_relu"; takes effect in training, and changes nothing else. The gradients are
            those of "default" up to the rounding error of the output, amplified by |bias / weight|; for channels where
            this ratio is above 4 the input is saved as well (on CUDA: for the eighth of the channels with the largest
            ratio; see `nn.lean`). The output must not be changed in place afterwards (autograd raises).
        skip_nonfinite: a batch whose global count, mean or variance is not finite in some channel, in the type of the
            running statistics, moves no running statistic of the layer and not its counter. Decided on the device,
            without waiting for it, and by the sums over all ranks, so it is the same on each. Output and gradients do
            not change. It can be set on an existing layer.

    `copy.deepcopy` shares the process group. Pickle (and `torch.save` of a whole module) drops it: an unpickled layer
    that had a sub-group raises in its first training forward unless `process_group` has been set.

    Raises:
        ValueError: input of fewer than two dimensions; a single value per channel in a training step of a single
            process; eps not above 0 in training; memory="lean" with another activation, a mask or a residual.
        RuntimeError: an input that does not have C channels; a rank outside the process group; a sub-group that was
            lost in pickling; `create_graph=True` through memory="lean".

    Example:
        >>> layer = SyncBatchNorm(3)
        >>> y = layer(torch.randn(4, 3, 8, 8))
        >>> layer.num_batches_tracked.item()
        1
    """

    # Defaults for converted layers and for pickles that lack these attributes.
    process_group: dist.ProcessGroup | DeviceMesh | LostGroup | None = None
    _stats_frozen: bool = False
    skip_nonfinite: bool = False
    _stats_disabled: int = 0  # number of open contexts of `disable_running_stats`
    _pool: Pool | None = None  # set inside of `accumulate_stats`
    _record: Tensor | None = None  # set inside of `Monitor.watch`

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        memory: str = "default",
        skip_nonfinite: bool = False,
    ) -> None:
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if memory not in ("default", "lean"):
            raise ValueError(f"memory: expected default or lean, got {memory!r}")
        if memory == "lean":
            check_lean(activation)
        init_batch_norm(
            self, num_features, eps, momentum, affine, track_running_stats, bias=bias, device=device, dtype=dtype
        )
        self.process_group = process_group
        self.activation = activation
        self.memory = memory
        self.skip_nonfinite = skip_nonfinite

    def reset_parameters(self) -> None:
        """Sets weight and bias to 1 and 0, and calls `reset_running_stats`."""
        reset_batch_norm(self)

    def reset_running_stats(self) -> None:
        """Sets running statistics and counter to those of a new layer; frozen ones stay, with a warning."""
        if self._stats_frozen:
            warn_not_reset(self)
        else:
            super().reset_running_stats()

    def __setattr__(self, name: str, value: Any) -> None:
        state = self.__dict__
        # The original forward of a subclass may assign to its scratch counter.
        if name in _BUFFERS and state.get("_stats_frozen", False) and "_true_counter" not in state:  # noqa: SIM102
            if is_reset(self, name, value):
                return
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        is_frozen = self.__dict__.pop("_stats_frozen", False)  # loading writes frozen statistics, too
        try:
            super()._load_from_state_dict(*args, **keywords)
        finally:
            if is_frozen:
                self._freeze_stats()

    def forward(self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Normalizes (N, C, ...), adds `residual` (same shape) if given, applies the activation if there is one.

        Args:
            mask: broadcasts to the input, with size 1 in the channels' dimension: (N, 1, ...). Positions where it is 0
                (or False) are treated as absent on every rank: they enter neither the statistics, nor the count, nor
                any gradient, even if they hold NaN. The output there is 0, in evaluation too (before the residual is
                added).

        Raises:
            ValueError: a mask that does not broadcast to the input or has channels; a residual of another shape.
        """
        if not torch.compiler.is_compiling():
            if isinstance(input, PROXIES):
                return record_call(self, SyncBatchNorm.forward, input, mask=mask, residual=residual)
            if mask is None and type(self) is SyncBatchNorm:
                output = self._plain_step(input, residual)
                if output is not None:
                    return output
        activation = self._activation_name()
        if self._is_lean():
            check_lean(activation, mask, residual)
        if residual is not None and residual.shape != input.shape:
            raise ValueError(
                f"residual: expected the shape of the input {tuple(input.shape)}, got {tuple(residual.shape)}"
            )
        # The residual is not fused if its type differs (the sum then has the wider type), or with a mask (masked
        # positions are set to 0 before it is added).
        if mask is None and (residual is None or (residual.dtype, residual.device) == (input.dtype, input.device)):
            return self._normalize(input, None, residual, activation)
        if mask is None:
            output = self._normalize(input)
        else:
            mask = as_mask(mask, input)
            # Masked positions are replaced by 0 rather than multiplied by 0, which would leave NaN.
            output = torch.where(mask, self._normalize(torch.where(mask, input, 0.0), mask), 0.0)
        if residual is not None:
            output = output + residual
        return output if activation is None else ACTIVATIONS[activation](output)

    def _plain_step(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        """A training forward where nothing is special about the layer, its arguments, or what surrounds the call.

        It does what `_normalize` does, in fewer steps. None in all other cases, those with errors included, which are
        left to `_normalize`.
        """
        state = self.__dict__
        if (
            not (state["training"] and torch.is_grad_enabled())
            or state.get("_stats_frozen", False)
            or "_stats_disabled" in state
            or state.get("skip_nonfinite", False)
            or "_pool" in state
            or "_record" in state
            or state.get("memory") == "lean"
            or backward_pass() != -1
            or saved_tensor_hooks() is not None
            or transforms_active()
            or proxy_mode() is not None
            or jit_trace() is not None
            or forward_ad_level() != -1
        ):
            return None
        parameters, buffers = state["_parameters"], state["_buffers"]
        if not (parameters.keys() >= _PARAMETERS and buffers.keys() >= _BUFFERS):
            return None  # parametrized, or sharded by replacing attributes
        weight, bias = parameters["weight"], parameters["bias"]
        running_mean = running_var = counter = None
        if state["track_running_stats"] and buffers["running_mean"] is not None:
            running_mean, running_var = buffers["running_mean"], buffers["running_var"]
            counter = buffers["num_batches_tracked"]
        num_features, eps = state["num_features"], state["eps"]
        size = (num_features,)
        if (
            input.dim() < 2
            or input.size(1) != num_features
            or not input.is_floating_point()
            or input.numel() == num_features
            or not eps > 0
            or (weight is not None and weight.shape != size)
            or (bias is not None and bias.shape != size)
            or (running_mean is not None and (running_mean.shape != size or running_var is None))
            or (running_var is not None and running_var.shape != size)
            or (
                residual is not None
                and (residual.shape, residual.dtype, residual.device) != (input.shape, input.dtype, input.device)
            )
        ):
            return None
        if ddp_around() is not None:
            check_wrapper()
        statistics = Statistics(running_mean, running_var, counter, state["momentum"], eps)
        group = collective_group(state.get("process_group"))
        call = Call(statistics, group, None, None, self, None, None, state.get("activation"), False, None, True)
        return NormalizeByBatch.apply(input, weight, bias, residual, call)

    def _counter(self) -> Tensor | None:
        return self.num_batches_tracked

    def _activation_name(self) -> str | None:
        return self.__dict__.get("activation")  # layers converted by version 0.1.0 lack the attribute

    def _is_lean(self) -> bool:
        return self.__dict__.get("memory") == "lean"

    def _normalize(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        self._check_input_dim(input)
        # Evaluation uses running statistics, if there are any, even where training ignores them
        # (track_running_stats=False).
        tracked = self.track_running_stats or not self.training
        statistics = Statistics(
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self._counter(),
            self.momentum,
            self.__dict__["eps"],
        )
        return self._normalize_with(
            input, statistics, self.weight, self.bias, self.training, mask, residual, activation
        )

    def _normalize_with(
        self,
        input: Tensor,
        statistics: Statistics,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """Normalizes according to the mode: a row of the table in the class docstring."""
        running_mean, running_var, counter, momentum, eps = statistics
        if torch.compiler.is_compiling() or jit_trace() is None:  # which would warn of every size that is compared
            if input.dim() >= 2 and input.size(1) != width_of(self):
                raise RuntimeError(
                    f"expected {width_of(self)} channels in dimension 1 of the input, got {input.size(1)}"
                    f" (input shape {tuple(input.shape)})"
                )
            check_arguments(input, statistics, weight, bias, training)
        check_wrapper()
        if self._stats_frozen:
            if running_mean is None or running_var is None:
                running_mean, running_var = self.running_mean, self.running_var
            training = False
        if not training:
            if running_mean is not None and running_var is not None:
                if self._record is not None:
                    if is_traced(input):
                        refuse_context()
                    record_local(input, mask, self._record)
                return normalize_by_running(input, running_mean, running_var, weight, bias, eps, residual, activation)
            return normalize_by_batch(
                input, weight, bias, Statistics(None, None, None, 0.0, eps), None,
                mask=mask, residual=residual, activation=activation, record=self._record, is_lean=self._is_lean(),
            )  # fmt: skip
        group = collective_group(self.process_group)
        if self._stats_disabled:
            running_mean = running_var = None
        counter = counter if running_mean is not None else None
        pool = self._pool.packed if self._pool is not None and running_mean is self._pool.running_mean else None
        return normalize_by_batch(
            input, weight, bias, Statistics(running_mean, running_var, counter, momentum, eps), group,
            mask=mask, residual=residual, activation=activation, owner=self, pool=pool, record=self._record,
            is_lean=self._is_lean(), skip_nonfinite=self.skip_nonfinite,
        )  # fmt: skip

    @property
    def num_features(self) -> int:
        """C, the number of channels.

        Raises:
            TypeError: read by another library's converter, which would replace this layer by a layer of its own class.
        """
        if torch.compiler.is_dynamo_compiling():
            # Dynamo before torch 2.13 takes `self.__dict__["num_features"]` for this property, which must not read it.
            return _width_of_vectors(self)  # type: ignore[return-value]
        converter = None if torch.compiler.is_compiling() else foreign_converter()
        if converter is not None:
            raise TypeError(
                f"{converter} would replace a {type(self).__name__} of syncbn, which is synchronized already, by"
                " another class, and lose its frozen switches and process group; leave the conversion out (in"
                " Lightning: sync_batchnorm=False), or call syncbn.revert_sync_batchnorm(model, default=...) before"
                " it. Layers of other classes in front of this one may have been replaced already"
            )
        return width_of(self)

    @num_features.setter
    def num_features(self, value: int) -> None:
        self.__dict__["num_features"] = value

    @property
    def eps(self) -> float:
        """The number that is added to the variance.

        Raises:
            TypeError: read by a function that folds batch normalization into the layer in front of it, from a layer
                with an activation, which the folded layer would not have.
        """
        if torch.compiler.is_compiling():
            return eps_in_dynamo(self)
        if self._activation_name() is not None:
            folder = folding_function()
            if folder is not None:
                raise TypeError(
                    f"{folder} would fold a {type(self).__name__} with activation={self._activation_name()!r} into the"
                    " layer in front of it, and lose the activation; call syncbn.revert_sync_batchnorm(model) before"
                    " it, which gives the model its activation back. Layers in front of this one may have been folded"
                    " already"
                )
        eps: float = self.__dict__["eps"]
        return eps

    @eps.setter
    def eps(self, value: float) -> None:
        set_eps(self, value)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any number of dimensions; `check_arguments` validates the input, on every path."""

    @property
    def stats_frozen(self) -> bool:
        """Whether training, too, normalizes with the running statistics, without updating them."""
        return self._stats_frozen

    @property
    def affine_frozen(self) -> bool:
        """Whether weight and bias are frozen by `freeze`; False if `requires_grad` of one was then set by hand."""
        return has_frozen_parameters(self) and not any(
            parameter.requires_grad for parameter in own_parameters(self).values()
        )

    def freeze(self, stats: bool = True, affine: bool = True) -> SyncBatchNorm:
        """Freezes the running statistics, the affine parameters, or both, until `unfreeze`.

        With frozen statistics, training normalizes as evaluation does: the running statistics stay bitwise unchanged
        and the layer communicates nothing. `reset_running_stats`, and an assignment that would reset a buffer, then
        leave them alone with a warning; `load_state_dict` writes them. Frozen affine parameters get
        `requires_grad=False` and `grad=None` at once, so that optimizers skip them, weight decay and momentum included.
        `train()` and `deepcopy` preserve both. Under `DistributedDataParallel`, wrap the model again afterwards.

        Raises:
            ValueError: `stats=True` on a layer without running statistics.
        """
        if stats:
            if self.running_mean is None or self.running_var is None:
                raise ValueError(
                    "cannot freeze the statistics of a layer without running statistics (track_running_stats=False)"
                )
            self._freeze_stats()
        if affine:
            freeze_parameters([self])
        return self

    def unfreeze(self, stats: bool = True, affine: bool = True) -> SyncBatchNorm:
        """Undoes `freeze` and restores `requires_grad`; parameters, momentum and counter are the same as before."""
        if stats:
            self._stats_frozen = False
            forget_counter(self)
        if affine:
            unfreeze_parameters([self])
        return self

    def _freeze_stats(self) -> None:
        remember_counter(self)
        self._stats_frozen = True

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """Converts every batch normalization of `module` in place; see `syncbn.convert_sync_batchnorm`."""
        return convert(module, SyncBatchNorm, process_group)

    def __copy__(self) -> SyncBatchNorm:
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        for name in _OF_A_CONTEXT:
            copied.__dict__.pop(name, None)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # a group is a handle: copies of the layer share it
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_A_CONTEXT}
        copied.__setstate__({name: copy.deepcopy(value, memo) for name, value in state.items()})
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        set_eps(self, state["eps"])
        if type(self).forward is SyncBatchNorm.forward:  # a subclass may have attributes of these names, of its own
            self.__dict__.setdefault("activation", None)  # version 0.1.0 did not set them in conversion
            self.__dict__.setdefault("memory", "default")

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in _OF_A_CONTEXT}
        if self.process_group is not None and not isinstance(self.process_group, LostGroup):
            group = as_group(self.process_group)
            is_world = dist.is_initialized() and group is dist.group.WORLD
            state["process_group"] = None if is_world else LostGroup(dist.get_world_size(group))
        return state

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses `torch.jit.script`, which calls this method before it compiles anything."""
        raise TypeError(
            f"torch.jit.script does not take a {type(self).__name__}: script a model in which"
            " syncbn.revert_sync_batchnorm has given every layer its original class again, or use torch.export"
        )

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self._activation_name() is not None:
            parts.append(f"activation={self._activation_name()}")
        if self._is_lean():
            parts.append("memory=lean")
        if self.skip_nonfinite:
            parts.append("skip_nonfinite=True")
        if self._frozen_text():
            parts.append(self._frozen_text())
        return ", ".join(parts)

    def _frozen_text(self) -> str:
        frozen = [name for name, is_on in (("stats", self.stats_frozen), ("affine", self.affine_frozen)) if is_on]
        return f"frozen={'+'.join(frozen)}" if frozen else ""
