"""One update of the weights, taken or left on the device: whether a step counts is decided without waiting for it.

A step whose loss or gradient is not finite on any rank leaves parameters, optimizer state, buffers (running statistics
and their counters) and the average of the weights as they were, bit for bit. The learning rate goes on: it is a
function of the step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from syncbn.torch_compat import scaler_state
from syncbn.training.optim.ema import WeightAverage
from syncbn.training.optim.foreach import all_finite, by_type, multiply


class UpdateOutcome(NamedTuple):
    """What became of a step; bools without dimensions, on the device."""

    left_out: Tensor
    """It changed nothing."""
    at_fault: Tensor
    """Its loss was not finite, or its gradient, where no scaled float16 explains that."""
    gradient_norm: Tensor
    """Of all parameters together (the Euclidean one), before it was clipped; 0 where nothing is clipped."""


class Update:
    """Optimizer, schedule, loss scaler and averaged weights of a model, moved together.

    Args:
        model: whole, lazy layers included.
        optimizer: of torch, over all parameters, built with `fused=True`: those can leave a step out on the device.
        half: scale the loss, as float16 gradients need it to stay above zero.
        decay: of the averaged weights; None for no average.
        clip_norm: a gradient whose Euclidean norm over all parameters is larger is scaled down to it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LambdaLR,
        device: torch.device,
        *,
        half: bool = False,
        decay: float | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.clip_norm = clip_norm
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.average = None if decay is None else WeightAverage(model, decay)
        self._buffers = BufferSnapshot(model)
        self._trained: list[int] = []  # the parameters that had a gradient in the last step
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._one = torch.ones((), device=device)

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the averaged weights, if there are."""
        return self.model if self.average is None else self.average.model

    def begin(self) -> None:
        """Before the first forward of a step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._buffers.remember()

    def finish(self, loss: Tensor, factor: Tensor, *, halt: bool) -> UpdateOutcome:
        """After the last backward of a step: moves everything, unless the loss or a gradient is not finite.

        Args:
            loss: the loss of the step, the same on every rank; no dimensions.
            factor: what the gradients are multiplied with first; no dimensions.
            halt: a step at fault stops all later ones as well, until `restart`.
        """
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        trained = [id(parameter) for parameter in parameters if parameter.grad is not None]
        if trained != self._trained:
            self._begin_momentum()
            self._trained = trained
        # A loss that is not finite makes every gradient so: one test, with which the scaler's own then agrees.
        loss_counts = loss.isfinite() & ~self._halted
        factor = torch.where(loss_counts, factor, torch.nan)
        multiply(gradients, factor)
        norm = loss.new_zeros(()) if self.clip_norm is None else self._clip(gradients, self.clip_norm)
        left_out = ~(all_finite(gradients, loss.device) & loss_counts)
        # A scaled gradient that overflows is no fault, the scaler tries again with a smaller scale; with a scale of 1
        # it is not the scale's either.
        at_fault = ~loss_counts | left_out
        if self.scaler.is_enabled():
            at_fault = ~loss_counts | (left_out & (self.scaler.scale(self._one) <= 1.0))
        if halt:
            self._halted = at_fault
        self._step(left_out, at_fault)
        self.schedule.step()
        self._buffers.put_back(left_out)
        if self.average is not None:
            self.average.update(self.model, left_out, self.schedule.last_epoch)
        return UpdateOutcome(left_out, at_fault, norm)

    def _clip(self, gradients: list[Tensor], clip_norm: float) -> Tensor:
        """Scales the gradients down where they are longer; returns their norm, without the scaler's factor."""
        norm = get_total_norm(gradients, 2.0).to(self._one.device)
        if self.scaler.is_enabled():
            norm = norm / self.scaler.scale(self._one)
        multiply(gradients, (clip_norm / norm.clamp(min=1e-30)).clamp(max=1.0))
        return norm

    def restart(self, step: int) -> None:
        """Goes back to before `step`, the first one that was left out, as if it had not been tried."""
        self._halted.zero_()
        self.schedule.last_epoch = step - 1
        self.schedule.step()

    def _begin_momentum(self) -> None:
        """Of parameters that have a gradient for the first time, or again.

        torch's fused SGD would leave the momentum of its first step uninitialized where that step is left out, and
        takes no parameter that joins later. From zero it does the same sums.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                if parameter.grad is not None and "momentum_buffer" not in self.optimizer.state[parameter]:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _step(self, left_out: Tensor, at_fault: Tensor) -> None:
        if self.scaler.is_enabled():
            before = [state.clone() for state in scaler_state(self.scaler)]
            self.scaler.step(self.optimizer)
            self.scaler.update()
            for state, value in zip(scaler_state(self.scaler), before, strict=True):
                state.copy_(torch.where(at_fault, value, state))  # a fault says nothing about the scale
        else:
            self.optimizer.found_inf = left_out.to(torch.float32)  # type: ignore[attr-defined]  # as the scaler does
            self.optimizer.step()


class BufferSnapshot:
    """A model's buffers as they were, kept in one flat tensor per type: few operators, however many layers."""

    def __init__(self, model: nn.Module) -> None:
        # Asking the modules for them again each time takes longer than copying them.
        self._places = [module._buffers for module in model.modules()]
        self._before: list[tuple[list[Tensor], Tensor]] = []

    def remember(self) -> None:
        """Copies them."""
        buffers = dict.fromkeys(buffer for context in self._places for buffer in context.values() if buffer is not None)
        self._before = [(group, _flat(group)) for group in by_type(buffers).values()]

    def put_back(self, where: Tensor) -> None:
        """Restores them if `where`, a bool without dimensions, decided on the device."""
        for buffers, before in self._before:
            kept = torch.where(where, before, _flat(buffers)).split([buffer.numel() for buffer in buffers])
            parts = [part if b.dim() == 1 else part.view(b.shape) for part, b in zip(kept, buffers, strict=True)]
            torch._foreach_copy_(buffers, parts)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors])
