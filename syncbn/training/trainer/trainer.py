"""The training loop.

for step in range(start, num_steps):
    freeze and unfreeze what the plan says            (a change wraps the model in DDP anew)
    for micro_batch in the step's share of this rank: (may be shorter than other ranks', or empty)
        loss_sum, count = loss(model(images), labels)
        backward(loss_sum * world_size / nominal)     (DDP averages over ranks; only the last micro-batch
        communicates, and carries the totals of the step: loss, counts, who was asked to stop, whose loss is NaN)
    gradient *= nominal / (count over all ranks)      (so the loss is the mean over the global batch, exactly)
    optimizer.step(); schedule.step()                 (left out on the device where loss or gradient is not finite)
    every log_every:  metrics and BN statistics to the tracker
    every eval_every: validation and a table of BN statistics; the best model so far is kept
        none was the best for early_stop: a checkpoint, and the end
    every save.every: a checkpoint
        asked to stop:    a checkpoint, and leave
test the best model, once

(Longer than other files: the order of events in a step is what it is about, so it stands in one class. What has a life
of its own, such as freezing, validation and faults, has a file beside it.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from syncbn.nn.accumulate import accumulate_stats
from syncbn.report import file_names
from syncbn.report.metric_names import ACCURACY, EPOCH, TEST, THROUGHPUT, VAL, VAL_LOSS, WAITED, below
from syncbn.stats.monitor import Monitor
from syncbn.training.checkpoint.files import StoredCheckpoint
from syncbn.training.checkpoint.frozen import FrozenSwitches
from syncbn.training.checkpoint.state import Checkpoints
from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.dataset import describe_data
from syncbn.training.data.loader import Batch, Loader
from syncbn.training.data.native import NativeData
from syncbn.training.data.randomness import Draw, mix_key, seed_generators
from syncbn.training.distributed import world
from syncbn.training.distributed.ddp import WrappedModel
from syncbn.training.distributed.failures import explain_one_value, explain_timeout, failing_together
from syncbn.training.distributed.rank_context import in_dtype
from syncbn.training.distributed.stopping import StopAgreed, Stopped, StopRequest
from syncbn.training.evaluation.mistakes import write_mistakes
from syncbn.training.losses import class_weights
from syncbn.training.losses.losses import summed
from syncbn.training.optim.groups import names_of, require_same_groups
from syncbn.training.optim.update import Update
from syncbn.training.tracking import console
from syncbn.training.tracking.progress import Progress
from syncbn.training.tracking.tracker import Tracker
from syncbn.training.trainer import execution, profiler
from syncbn.training.trainer.build import RunComponents
from syncbn.training.trainer.capture import Capture
from syncbn.training.trainer.checks import check_run_directory
from syncbn.training.trainer.counters import Counters, SaveClock, Throughput, Totals
from syncbn.training.trainer.deferred import DeferredResults
from syncbn.training.trainer.drawing import drawing_alike
from syncbn.training.trainer.faults import find_fault, with_remedy
from syncbn.training.trainer.freezing import Freezing
from syncbn.training.trainer.graph import GraphedSteps
from syncbn.training.trainer.local_stats import LocalStatistics
from syncbn.training.trainer.overfit import FITTED
from syncbn.training.trainer.validation import Validation

log = logging.getLogger(__name__)


class Trainer:
    """Trains one model from the built components of a run."""

    def __init__(
        self,
        components: RunComponents,
        run_dir: Path,
        tracker: Tracker,
        stop: StopRequest,
        capture: Capture | None = None,
    ) -> None:
        # Long, because it is the list of the parts, of which each needs some before it.
        config, model, sampler, context = components.config, components.model, components.sampler, components.context
        # what is trained, and where
        self.config, self.context, self.data, self.sampler = config, context, components.data, sampler
        self.run_dir = run_dir
        self.model, self.loss, self.plan, self.best = model, components.loss, components.plan, components.best
        self.loader = Loader(self.data, context, workers=config.data.workers, prefetch=config.data.prefetch)
        self.wrapped: WrappedModel | None = None  # the model, in DDP where there are several ranks; see _apply_plan
        # when
        self.stop = stop
        self.stop_agreed = False  # some rank had been asked to stop before a step that is over
        self.steps_per_epoch = sampler.steps_per_epoch
        self.num_steps, self.eval_every, self.log_every = (
            max(1, Duration.parse(text).in_steps(self.steps_per_epoch))
            for text in (config.duration, config.eval_every, config.log_every)
        )
        # how
        self.built, self.early_stop = components.built, components.early_stop
        self.optimizer = self.built.optimizer
        self.schedule = LambdaLR(self.optimizer, components.schedule)
        is_half = context.autocast == torch.float16
        self.update = Update(
            model, self.optimizer, self.schedule, context.device,
            skips_on_device=self.built.skips_on_device,
            drawing=drawing_alike(config.seed, context.device) if self.built.may_draw else None,
            half=is_half, decay=config.ema, average_from=components.average_from,
            clip_norm=config.clip_norm, capturable=capture is not None,
        )  # fmt: skip
        self.local_statistics = LocalStatistics(
            [model, self.update.evaluated], sampler, keep_apart=config.bn.buffers == "per_group"
        )
        self.freezing = Freezing(
            self.plan, model, self.optimizer, tracker, forgets_momentum=config.optimizer.on_unfreeze == "reset"
        )
        # the same model, by another way through it
        self.executed = execution.executed(model, config.compile, by_size=isinstance(self.data, NativeData))
        self.graphed = None if capture is None else GraphedSteps(capture, self._sizes(0), context.device)
        # of what happened in a step: loss, asked to stop, not finite
        self.results = DeferredResults(context.device, timeout=None if capture is None else config.collective_timeout)
        self.last_loss: float | None = None  # of the last step whose results have been read
        # what survives
        self.counters, self.totals, self.drift = Counters(), Totals(context.device), components.drift
        self.checkpoints = Checkpoints(
            run_dir / file_names.CHECKPOINTS,
            config.save.keep,
            facts={
                "config": components.config_dict,
                "parameter_groups": names_of(self.built.groups),
                **describe_data(self.data),
                **class_weights.describe(self.loss),
            },
            model=model,
            optimizer=self.optimizer,
            schedule=self.schedule,
            scaler=self.update.scaler,
            **self.update.average_parts(),
            counters=self.counters,
            totals=self.totals,
            drift=self.drift,
            tracker=tracker,
            frozen=FrozenSwitches(model),
        )
        self.validation = Validation(
            components, self.update.evaluated, self.loader, self.counters, self.checkpoints, stop
        )
        self.save_clock = SaveClock(Duration.parse(config.save.every, allow_minutes=True), self.steps_per_epoch)
        # what is seen
        self.tracker, self.monitor, self.clock = tracker, Monitor(model), Throughput()
        self.profiler = profiler.build_profiler(config.profile, run_dir, context)

    def run(self) -> dict[str, float]:
        """Trains to the end; returns the final metrics.

        Raises:
            Stopped: after a signal; the state is saved, and a run that resumes it goes on as if nothing had happened.
        """
        with ExitStack() as stack:
            if self.graphed is not None:
                stack.enter_context(self.graphed)
            stack.callback(self.checkpoints.close)
            stack.callback(self.loader.close)
            show = stack.enter_context(self._progress_bar())
            if self.profiler is not None:
                stack.enter_context(self.profiler)
            try:
                self._run_steps(show)
                return self._finish()
            except StopAgreed:
                self._save()
                log.info("stopped after step %d; the same command with this run's name goes on", self.counters.step)
                raise Stopped(self.counters.step, self.stop.exit_code) from None
            except ValueError as error:
                one_value = explain_one_value(error, self.counters.step)
                if one_value is None:
                    raise
                raise one_value from None
            except RuntimeError as error:
                timeout = explain_timeout(error, f"step {self.counters.step}")
                if timeout is None:
                    raise
                raise timeout from error

    def _progress_bar(self) -> AbstractContextManager[console.ShowStep | None]:
        samples = min(self.config.batch_size, self.sampler.num_samples)
        return console.progress(self.num_steps, self.counters.step, self.context.is_first, samples=samples)

    def _run_steps(self, show: console.ShowStep | None) -> None:
        self.clock.start()
        if self._is_due(self.eval_every) and self.counters.evaluated_step != self.counters.step:
            self._validate()  # a signal came before or while it was evaluated
        while self.counters.step < self.num_steps and not self._is_fitted() and not self.ends_early():
            if self.stop_agreed or (self.context.world_size == 1 and self.stop.requested):
                raise StopAgreed
            self._apply_plan(self.counters.step)
            with self.monitor.watch(self._is_watched(self.counters.step)):
                self._train_step(self.counters.step)
            if self.profiler is not None:
                self.profiler.step()
            self.counters.step += 1
            save_is_due = self._on_rank_0(self.save_clock.is_due(self.counters.step))
            # What waits for the device anyway waits for the results of past steps too: nothing is recorded of a step
            # at fault.
            waits = save_is_due or any(self._is_due(every) for every in (self.log_every, self.eval_every))
            if not self._read_results(everything=waits):
                return
            if self._is_due(self.log_every):
                self._log(show)
            elif show is not None:
                show(self.counters.step, self.last_loss)
            if self._is_due(self.eval_every):
                self._validate()
            if save_is_due or self.counters.step == self.num_steps or self.ends_early():
                self._save()

    def ends_early(self) -> bool:
        """Whether training ends after the present step because validation has not improved for `early_stop`."""
        return self.early_stop.is_due(self.counters)

    def _is_fitted(self) -> bool:
        return self.config.overfit is not None and self.counters.best.get(ACCURACY, 0.0) >= FITTED

    def _is_due(self, every: int, step: int | None = None) -> bool:
        step = self.counters.step if step is None else step
        return step > 0 and (step % every == 0 or step == self.num_steps)

    def _read_results(self, *, everything: bool) -> bool:
        """Reads the results of past steps, the same on every rank; returns False if training ends here."""
        for step, (loss, count, asked_to_stop, left_out, at_fault, *is_bad) in self.results.take(everything=everything):
            self.last_loss = loss / count if count else None
            self.stop_agreed |= asked_to_stop > 0
            self.counters.steps_left_out += left_out > 0
            if not at_fault:
                continue
            ranks = [rank for rank, bad in enumerate(is_bad) if bad]
            fault = find_fault(step, ranks, self.sampler, self.data, self.context, self.run_dir)
            if self.config.on_nonfinite == "skip":
                log.warning("%s; the step is left out", fault)
                continue
            self.results.clear()
            self.update.restart(step)
            self.counters.step, self.counters.steps_left_out = step, self.counters.steps_left_out - 1
            self._save()  # the state before the step, from which on_nonfinite=skip can go on
            if self.config.on_nonfinite == "raise":
                raise with_remedy(fault, self.config, self._lr(), self.checkpoints.path_of(step), self.run_dir)
            log.warning("%s; training stops before it", fault)
            return False
        return True

    def _save(self) -> None:
        check_run_directory(self.run_dir, self.counters.step)
        if self.graphed is not None:
            self.results.wait()  # with a timeout; to copy the state is to wait without
        with self.local_statistics.pooled(self.counters.step):
            if self.context.is_first:
                self.checkpoints.save(self.counters.step)

    def resume(self, stored: StoredCheckpoint) -> None:
        """Restores the state of a checkpoint, which may be of another run or an earlier one of this run.

        Raises:
            ConfigError: on every rank, its state does not fit this run.
        """
        with failing_together():
            self._load(stored)
        best = self.checkpoints.find_best(stored.path, self.counters.best_step)
        if best is None:
            if self.counters.best_step:
                log.warning("the best model so far, of step %d, is not there any more", self.counters.best_step)
            self.counters.forget_best()
        if self.context.world_size > 1:
            dist.barrier()  # all ranks have looked
        if self.context.is_first:
            self.checkpoints.begin(self.counters.step, best)

    def _load(self, stored: StoredCheckpoint) -> None:
        try:
            if "parameter_groups" in stored.content:  # version 0.1.0 had one group, and did not name it
                require_same_groups(self.built.groups, stored.content["parameter_groups"])
            self.checkpoints.load(stored, "resume")
            self.drift.require_layers(self.model)
        except ConfigError:  # which names the file itself
            raise
        except ValueError as error:
            raise ConfigError(f"resume: {stored.path} does not fit this configuration: {error}") from None
        if self.counters.step != stored.step:
            raise ConfigError(
                f"resume: {stored.path} contradicts itself, it is of step {stored.step} and counts {self.counters.step}"
            )

    def _is_watched(self, step: int) -> bool:
        """Whether the layers record statistics in a step: it is shown after it."""
        return any(self._is_due(every, step + 1) for every in (self.log_every, self.eval_every))

    def _train_step(self, step: int) -> None:
        if not self.model.training:
            self.model.train()
        # Whatever a model draws is a function of (seed, step, rank): a resumed run draws the same.
        seed_generators(mix_key(self.config.seed, step, self.context.rank, Draw.MODEL), self.context.device)
        sizes = self._sizes(step)
        batches = self.clock.waiting(self.loader.micro_batches(self.sampler, self.config.seed, step))
        if self.graphed is None:
            results = self._compute(batches, sizes)
        else:
            self.update.write_numbers(asked_to_stop=self.stop.requested)
            results = self.graphed.run(step, batches, sizes, self._compute, is_watched=self._is_watched(step))
        self.update.advance()
        self.results.post(step, results)
        self.clock.add(sum(sizes))

    def _sizes(self, step: int) -> list[int]:
        """Numbers of samples of the micro-batches of a step, over all ranks."""
        return [shard.num_global for shard in self.sampler.shards(step)]

    def _compute(self, batches: Iterable[Batch], sizes: Sequence[int]) -> Tensor:
        """The part of a step that a graph can replay; returns the step's results, for `_read_results`.

        What changes from step to step comes in tensors. Numbers are the same in all steps with the same `sizes`.
        """
        self.update.begin()
        nominal = sum(sizes)
        # Loss sum, count, asked to stop, and for each rank whether its loss is not finite.
        totals = torch.zeros(3 + self.context.world_size, dtype=torch.float64, device=self.context.device)
        numbers = self.update.numbers
        totals[2] = float(self.stop.requested) if numbers is None else numbers.asked_to_stop
        # Running statistics move once per step, however many micro-batches it has.
        with accumulate_stats(self.model) if len(sizes) > 1 else nullcontext():
            for number, batch in enumerate(batches):
                is_last = number == len(sizes) - 1
                assert self.wrapped is not None
                with nullcontext() if is_last else self.wrapped.without_communication():
                    loss_sum, count = self._losses(self.wrapped, batch)
                    totals[0] += loss_sum.detach()
                    totals[1] += count
                    scaled = self.update.scaler.scale(loss_sum * (self.context.world_size / nominal))
                    if not is_last:
                        scaled.backward()
                        continue
                    totals[3 + self.context.rank] = ~totals[0].isfinite()
                    totals = self.wrapped.backward(scaled, totals)
        # From a mean over samples to a mean over what the loss counts; 1, to rounding, where it counts samples. Counts
        # may be weights, and less than 1; where nothing counts the gradient is 0 as it is.
        correction = torch.where(totals[1] > 0, nominal / totals[1], 1.0)
        outcome = self.update.apply(totals[0], correction, halt=self.config.on_nonfinite != "skip")
        kept = torch.cat([totals[:2], torch.stack([outcome.gradient_norm, torch.ones_like(outcome.gradient_norm)])])
        self.totals.values += torch.where(outcome.left_out, 0.0, kept)
        return torch.cat([totals[:3], torch.stack(outcome[:2]), totals[3:]])

    def _losses(self, wrapped: WrappedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss sum and count of this rank's part of a micro-batch."""
        images, labels = batch
        with self.context.forward_context():
            outputs = wrapped(images)
        return summed(self.loss, in_dtype(outputs, self.context.dtype), labels)

    def _apply_plan(self, step: int) -> None:
        """Sets the frozen switches for this step on every rank, and wraps the model in DDP anew if they changed.

        DDP fixes the list of parameters it reduces when it wraps: parameters unfrozen later would silently train on
        each rank's own gradients.
        """
        if self.wrapped is not None and step not in self.plan.boundaries:
            return
        if step > 0:
            self.local_statistics.pool(step)  # what is frozen from here on has to be the same on all ranks
        changed = self.freezing.apply(step)
        if changed or self.wrapped is None:
            if self.graphed is not None:
                self.results.wait()  # with a timeout; to forget is to wait without
                self.graphed.forget()
            batch = self.loader.one_batch(self.sampler, self.config.seed, step)
            self.model.train()
            if self.config.compile is not False:
                again = "" if self.wrapped is None else " again, because what is frozen has changed"
                log.info("compiling the model%s; the next step waits for it ...", again)
            self.wrapped = WrappedModel(
                self.executed, self.context, is_first=self.wrapped is None, num_totals=3 + self.context.world_size,
                loss_of=lambda wrapped: self._losses(wrapped, batch)[0],
                **({} if self.graphed is None else {"num_warm_up_passes": self.graphed.num_warm_up_passes}),
            )  # fmt: skip

    def _lr(self) -> float:
        """The learning rate of the schedule, without the factors of parameter groups."""
        return float(self.optimizer.param_groups[0]["lr"]) / self.built.groups[0].lr_scale

    def _log(self, show: console.ShowStep | None) -> None:
        loss, gradient_norm = self.totals.take()
        progress = Progress(
            self.counters.step,
            self.num_steps,
            epoch=self.counters.step / self.steps_per_epoch,
            loss=loss,
            lr=self._lr(),
            samples_per_second=self.clock.samples_per_second(),
            gradient_norm=None if self.config.clip_norm is None else gradient_norm,
            steps_left_out=self.counters.steps_left_out,
        )
        if self.context.is_first:
            self.tracker.log(self.counters.step, progress.metrics(), self.monitor.snapshot())
        if show is not None:
            show(self.counters.step, math.nan if loss is None else loss)
        else:
            log.info("%s", progress.line())

    def _validate(self) -> None:
        step = self.counters.step
        check_run_directory(self.run_dir, step)
        with self.clock.paused():
            with self.local_statistics.pooled(self.counters.step):
                metrics = self.validation.validate()
            names = dict.fromkeys([f"{VAL}/{self.best.by}", VAL_LOSS])
            log.info("step %d  %s", step, "  ".join(f"{name} {metrics.get(name, math.nan):.4f}" for name in names))
            self.tracker.log(step, {EPOCH: step / self.steps_per_epoch, **metrics})
            if self.context.is_first:
                self.tracker.show_layers(step, self.monitor.snapshot())

    def _on_rank_0(self, here: bool) -> bool:
        """Returns rank 0's answer on every rank, because clocks differ; what depends on the step alone is not asked."""
        if self.context.world_size == 1 or not self.save_clock.goes_by_time:
            return here
        answer = torch.tensor(here, device=self.context.device, dtype=torch.int32)
        dist.broadcast(answer, src=0)
        return bool(answer.item())  # waits for the device; only with save.every in minutes

    def _finish(self) -> dict[str, float]:
        """Evaluates the test set, if any, once, with the weights that validated best; returns the final metrics."""
        if self.ends_early() and self.counters.step < self.num_steps:
            log.info("no validation was better than that of step %d for early_stop=%s: training ends at step %d",
                     self.counters.best_step, self.config.early_stop, self.counters.step)  # fmt: skip
        if self.counters.evaluated_step == 0:
            self._validate()  # training has ended before it was due
        self.checkpoints.wait()
        if self.context.world_size > 1:
            dist.barrier()  # rank 0 has written the best checkpoint
        waited = max(world.on_all_ranks(self.clock.waited()))  # all ranks wait for the one that waits longest
        self.validation.renew_statistics()
        if self.config.tracker.report:  # before the test, which is used once, in case a signal comes now
            mistakes = self.validation.mistakes(self.config.tracker.examples)
            write_mistakes(self.run_dir, self.counters.best_step, mistakes, writes=self.context.is_first)
        final = {**self.validation.test(), THROUGHPUT: self.clock.overall(), WAITED: waited}
        check_run_directory(self.run_dir, self.counters.step)
        if tested := {name: final[name] for name in below(TEST, final)}:
            self.tracker.log(self.counters.step, tested)
        else:
            log.info("the data has no test split: val/* is all that is measured, and has chosen the weights")
        self.tracker.summarize(final)
        return final
