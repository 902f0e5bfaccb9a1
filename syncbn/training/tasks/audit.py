"""`task=audit`, and the audit at the start of a training run."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

from torch import Tensor, nn

from syncbn.atomic_write import write_text
from syncbn.auditing.audit import audit
from syncbn.auditing.rules import SEVERITIES, Finding, table
from syncbn.report import file_names
from syncbn.surgery.freeze_plan import FreezePlan
from syncbn.training.config.errors import ConfigError, configured_by
from syncbn.training.config.run import AuditConfig
from syncbn.training.config.schema import Config
from syncbn.training.data.by_size import parts_of
from syncbn.training.data.dataset import Data
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.loaded import load_run
from syncbn.training.tracking import console
from syncbn.training.tracking.console import shown
from syncbn.training.trainer.build import sampler_for
from syncbn.training.trainer.checks import build_freeze_plan


def run(config: Config, run_dir: Path, context: RankContext) -> dict[str, float]:
    """Audits the checkpoint that `load` names, with the configuration of its training and one training batch.

    Every rank calls it. Writes `audit.json`, prints all findings, and returns no metrics.

    Raises:
        ConfigError: `audit.level=error` and there is a finding of severity error; see also `load`.
    """
    loaded = load_run(config, run_dir, context)
    with configured_by(loaded.path):
        sampler = sampler_for(loaded.config, loaded.data, loaded.context)
        plan = build_freeze_plan(loaded.config, loaded.model, sampler.steps_per_epoch)
    findings = audit_trained(loaded.model, plan, sampler, loaded.step, loaded.data, loaded.context)
    record(findings, loaded.step, run_dir, context, SEVERITIES)
    if context.is_first:
        counts = [(severity, str(sum(f.severity == severity for f in findings))) for severity in SEVERITIES]
        console.print_table(loaded.describe(), [*counts, ("run directory", shown(run_dir))])
    stop_at_errors(findings, config.audit, run_dir)
    return {}


def audit_at(model: nn.Module, plan: FreezePlan, sampler: Sampler, step: int) -> list[Finding]:
    """Audits the model as it is about to train in this step, frozen by the plan; the same findings on every rank."""
    return audit(_as_in(model, plan, step), batch_size=_samples_per_forward(sampler))


def audit_trained(
    model: nn.Module, plan: FreezePlan, sampler: Sampler, step: int, data: Data, context: RankContext
) -> list[Finding]:
    """Audits the model as in the last of `step` steps, on the first training batch; the same findings on every rank."""
    shard = sampler.shards(0)[0]
    whole, _ = data.train_batch(shard.index, sampler.seed, 0, context.dtype)
    images = max(parts_of(whole), key=Tensor.numel)  # of different sizes, those that have the most values
    trained = _as_in(model, plan, max(step - 1, 0))
    with context.forward_context():
        return audit(trained, batch=context.put(images), batch_size=_samples_per_forward(sampler), trained=True)


def record(
    findings: list[Finding], step: int, run_dir: Path, context: RankContext, severities: tuple[str, ...]
) -> None:
    """Writes all findings to `audit.json`, and prints those of the given severities, on rank 0."""
    if not context.is_first:
        return
    content = {"step": step, "findings": [finding.as_dict() for finding in findings]}
    write_text(run_dir / file_names.AUDIT, json.dumps(content, indent=2) + "\n")
    to_show = [finding for finding in findings if finding.severity in severities]
    if to_show:
        console.CONSOLE.print(f"audit at step {step} (docs/audit.md)\n{table(to_show)}", markup=False)


def stop_at_errors(findings: list[Finding], config: AuditConfig, run_dir: Path) -> None:
    """Raises a ConfigError for findings of severity error where `audit.level=error` asks for it."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors and config.level == "error":
        first, more = errors[0], f" ({len(errors)} such findings)" if len(errors) > 1 else ""
        raise ConfigError(
            f"audit.level=error: {first.rule} in {first.layer or 'the model'}{more}: {first.why}; {first.remedy}; see"
            f" {os.path.relpath(run_dir / file_names.AUDIT)}, or go on with audit.level=warning"
        )


def _as_in(model: nn.Module, plan: FreezePlan, step: int) -> nn.Module:
    """A copy of the model in training mode, with the switches that the plan freezes at this step."""
    copied = copy.deepcopy(model)
    plan.apply(copied, step)
    return copied.train()


def _samples_per_forward(sampler: Sampler) -> int:
    """Samples of a forward pass over all ranks; of a rank's virtual ranks only one counts."""
    return max(1, min(sampler.batch_size, sampler.num_samples) // sampler.accumulate // sampler.groups_per_rank)
