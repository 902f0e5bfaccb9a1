"""An optimizer step that is applied or skipped on the device, without synchronizing with the host.

An optimizer that cannot skip a step there is not called; for that the host waits for the device once a step.

A step whose loss or gradient is not finite on any rank is skipped: parameters, optimizer state, buffers (running
statistics and their counters) and the weight average stay bitwise the same. The learning-rate schedule still advances,
because it is a function of the step number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from syncbn.torch_compat import count_as_stepped, scaler_state
from syncbn.training.config.errors import ConfigError
from syncbn.training.optim.averages import WeightAverage
from syncbn.training.optim.ema import ExponentialAverage
from syncbn.training.optim.foreach import all_finite, by_type, multiply
from syncbn.training.optim.step_numbers import StepNumbers
from syncbn.training.optim.swa import EqualAverage
from syncbn.training.optim.trial import zero_momentum


class UpdateOutcome(NamedTuple):
    """Outcome of a step: scalar tensors on the device."""

    left_out: Tensor
    """bool: the step was skipped."""
    at_fault: Tensor
    """bool: the loss was not finite, or a gradient was not and float16 loss scaling does not explain it, or an earlier
    fault has halted the updates.
    """
    gradient_norm: Tensor
    """Euclidean norm over the gradients of all parameters before clipping; 0 without `clip_norm`."""


class Update:
    """Optimizer, schedule, loss scaler and weight average of a model, stepped together.

    Args:
        model: the complete model; lazy layers have their parameters already.
        optimizer: a torch optimizer over all parameters.
        skips_on_device: whether it can skip a step on the device (see `BuiltOptimizer`).
        drawing: makes a context, from the number of a step, in which the optimizer draws the same random numbers on
            every rank; None if it draws none.
        half: scale the loss, so that float16 gradients do not underflow.
        decay: decay of an exponential weight average; None for none.
        average_from: number of steps after which an equal-weight average begins; None for none. At most one of both.
        clip_norm: largest Euclidean norm over the gradients of all parameters; a larger one is scaled down to it.
        capturable: read what changes from step to step from tensors (`numbers`), so that a graph can replay a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        device: torch.device,
        *,
        skips_on_device: bool = True,
        drawing: Callable[[int], AbstractContextManager[None]] | None = None,
        half: bool = False,
        decay: float | None = None,
        average_from: int | None = None,
        clip_norm: float | None = None,
        capturable: bool = False,
    ) -> None:
        self.clip_norm = clip_norm
        self.numbers = StepNumbers(len(optimizer.param_groups), device) if capturable else None
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self._skips_on_device, self._drawing = skips_on_device, drawing
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.average: WeightAverage | None = None if decay is None else ExponentialAverage(model, decay)
        if average_from is not None:
            self.average = EqualAverage(model, average_from)
        self._buffers = BufferSnapshot(model)
        self._trained: list[int] = []  # ids of the parameters that had a gradient in the last step
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._one = torch.ones((), device=device)

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the weight average if there is one, else the model itself."""
        return self.model if self.average is None else self.average.model

    def average_parts(self) -> dict[str, Any]:
        """The parts of the weight average that a checkpoint holds, by name; empty without one."""
        if self.average is None:
            return {}
        counted = {"averaged_steps": self.average.count} if isinstance(self.average, EqualAverage) else {}
        return {"average": self.average, **counted}

    def begin(self) -> None:
        """Clears the gradients and copies the buffers; call before the first forward of a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.remember()

    def write_numbers(self, *, asked_to_stop: bool) -> None:
        """Writes the numbers of the next step to the device; only if capturable."""
        assert self.numbers is not None
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        share = 0.0 if self.average is None else self.average.share_of(self.schedule.last_epoch + 1)
        self.numbers.write(rates, share, asked_to_stop)

    def advance(self) -> None:
        """Advances the learning rate, on the host, after each step."""
        self.schedule.step()

    def apply(self, loss: Tensor, factor: Tensor, *, halt: bool) -> UpdateOutcome:
        """Applies the step, or skips it if the loss or a gradient is not finite; call after the last backward.

        Args:
            loss: the loss of the step, the same on every rank; a scalar tensor.
            factor: factor that the gradients are multiplied by first; a scalar tensor.
            halt: after a step at fault skip all later ones, until `restart`.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        trained = [id(parameter) for parameter in parameters if parameter.grad is not None]
        if trained != self._trained:
            self._begin(parameters)
            self._trained = trained
        # A non-finite loss (or a halt) makes every gradient NaN, so that the scaler's own test agrees with `left_out`.
        loss_counts = loss.isfinite() & ~self._halted
        factor = torch.where(loss_counts, factor, torch.nan)
        multiply(gradients, factor)
        norm = loss.new_zeros(()) if self.clip_norm is None else self._clip(gradients, self.clip_norm)
        left_out = ~(all_finite(gradients, loss.device) & loss_counts)
        # A non-finite gradient is no fault if loss scaling may have caused it: the scaler then reduces its scale. At a
        # scale of 1 or less, scaling cannot have caused it.
        at_fault = ~loss_counts | left_out
        if self.scaler.is_enabled():
            at_fault = ~loss_counts | (left_out & (self.scaler.scale(self._one) <= 1.0))
        if halt and self.numbers is not None:
            self._halted.copy_(at_fault)  # in place: a graph reads it in the next step
        elif halt:
            self._halted = at_fault
        self._step(left_out, at_fault)
        self._buffers.put_back(left_out)
        if self.average is not None:
            share = None if self.numbers is None else self.numbers.share
            self.average.update(self.model, left_out, self.schedule.last_epoch + 1, share)
        return UpdateOutcome(left_out, at_fault, norm)

    def _clip(self, gradients: list[Tensor], clip_norm: float) -> Tensor:
        """Scales the gradients down to `clip_norm`; returns their norm before clipping, without the loss scale."""
        norm = get_total_norm(gradients, 2.0).to(self._one.device)
        if self.scaler.is_enabled():
            norm = norm / self.scaler.scale(self._one)
        multiply(gradients, (clip_norm / norm.clamp(min=1e-30)).clamp(max=1.0))
        return norm

    def restart(self, step: int) -> None:
        """Ends a halt and resets the schedule to `step`, the first step at fault, so that it can be tried again."""
        self._halted.zero_()
        self.schedule.last_epoch = step - 1
        self.schedule.step()

    def _begin(self, parameters: list[nn.Parameter]) -> None:
        """Prepares parameters that gain a gradient; a ConfigError for a sparse one, which is sparse on every rank."""
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                names = [name for name, one in self.model.named_parameters() if one is parameter]
                raise ConfigError(f"model: the gradient of {names[0]} is sparse, which no optimizer takes here; make it"
                                  " dense (sparse=False)")  # fmt: skip
        if self._skips_on_device:
            zero_momentum(self.optimizer)

    def _step(self, left_out: Tensor, at_fault: Tensor) -> None:
        before = [state.clone() for state in scaler_state(self.scaler)] if self.scaler.is_enabled() else []
        drawing = nullcontext() if self._drawing is None else self._drawing(self.schedule.last_epoch)
        with drawing, nullcontext() if self.numbers is None else self._rates_on_device(self.numbers):
            if not self._skips_on_device:
                self._step_by_host(left_out)
            elif self.scaler.is_enabled():
                self.scaler.step(self.optimizer)
            else:
                self.optimizer.found_inf = left_out.to(torch.float32)  # type: ignore[attr-defined]  # as GradScaler does
                self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
            for state, value in zip(scaler_state(self.scaler), before, strict=True):
                state.copy_(torch.where(at_fault, value, state))  # a fault must not change the loss scale

    @contextmanager
    def _rates_on_device(self, numbers: StepNumbers) -> Iterator[None]:
        """Context in which the optimizer has its learning rates as tensors; schedule and checkpoints know numbers."""
        groups = self.optimizer.param_groups
        keys = ("lr", "capturable")
        before: list[dict[str, Any]] = [{key: group[key] for key in keys if key in group} for group in groups]
        is_captured = numbers.share.is_cuda and torch.cuda.is_current_stream_capturing()
        for group, rate in zip(groups, numbers.rates, strict=True):
            group["lr"] = rate
            if is_captured and "capturable" in group:
                group["capturable"] = True  # Adam refuses to be captured without; its fused step is the same with it
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def _step_by_host(self, left_out: Tensor) -> None:
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        if bool(left_out):  # waits for the device, because this optimizer has no other way to skip a step
            count_as_stepped(self.optimizer)
        else:
            self.optimizer.step()


class BufferSnapshot:
    """A copy of a model's buffers, flattened into one tensor per device and dtype, so that few operators are needed."""

    def __init__(self, model: nn.Module) -> None:
        # The modules' buffer dicts: walking the modules at every step would take longer than copying the buffers.
        self._buffer_dicts = [module._buffers for module in model.modules()]
        self._before: list[tuple[list[Tensor], Tensor]] = []

    def remember(self) -> None:
        """Copies the current buffers."""
        buffers = dict.fromkeys(buffer for own in self._buffer_dicts for buffer in own.values() if buffer is not None)
        self._before = [(group, _flat(group)) for group in by_type(buffers).values()]

    def put_back(self, where: Tensor) -> None:
        """Restores the copied buffers if `where`, a bool scalar tensor, is True; decided on the device."""
        for buffers, before in self._before:
            kept = torch.where(where, before, _flat(buffers)).split([buffer.numel() for buffer in buffers])
            parts = [part if b.dim() == 1 else part.view(b.shape) for part, b in zip(kept, buffers, strict=True)]
            torch._foreach_copy_(buffers, parts)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors])
