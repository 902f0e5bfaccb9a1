"""The audit at the start of a run, and of a run: found where it should be, silent everywhere else."""

import json

import pytest
import torch

from syncbn.__main__ import main
from syncbn.training.config.errors import ConfigError
from tests.training.jobs import EXPERIMENTS, read_metrics, start

QUICK = ("finetune_frozen", "finetune_mistake", "pretrain")
SMALL = ["model.width=4", "tracker=none", "duration=2"]
MISTAKE = ["freeze.a.match=backbone", "freeze.a.stats=false", "freeze.a.weights=true"]


def findings(run_dir):
    content = json.loads((run_dir / "audit.json").read_text())
    assert all(list(one) == ["layer", "rule", "severity", "why", "remedy"] for one in content["findings"])
    return content["step"], {(one["rule"], one["severity"]) for one in content["findings"]}


@pytest.mark.parametrize(
    "experiment",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPERIMENTS],
    indirect=True,
)
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_of_the_experiments_only_the_mistake_has_findings(job, pretrained, experiment, num_ranks):
    name = f"{experiment[0].removeprefix('experiment=')}_{num_ranks}"
    run = job(
        *experiment, "tracker=none", "duration=20", "eval_every=10", f"run={name}", num_ranks=num_ranks, cwd=pretrained
    )
    is_mistake = experiment[0] == "experiment=finetune_mistake"
    expected = {("parameters-frozen-statistics-moving", "error")} if is_mistake else set()
    assert findings(run) == (0, expected)
    trust = "trust=[tests.training.downloaded.*]"  # of experiment=fine_tuning
    audited = job("task=audit", f"load={run}", trust, f"run=audit_{name}", num_ranks=num_ranks, cwd=pretrained)
    step, found = findings(audited)
    assert 0 < step <= 20  # the best
    assert found == expected
    assert main(["audit", str(run)]) == 0  # what is frozen is not in a state dict


def test_an_error_stops_the_job_on_every_rank_with_exit_code_2_one_message_and_a_report(tmp_path):
    reported = [*(option for option in SMALL if option != "tracker=none"), "tracker.mode=disabled"]
    done = start(tmp_path, *reported, *MISTAKE, "audit.level=error", "run=a")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(
        "error: audit.level=error: parameters-frozen-statistics-moving in backbone.stem.bn (9 such findings): "
    )
    assert "syncbn.freeze" in line
    assert "outputs/a/audit.json" in line
    summary = json.loads((tmp_path / "outputs/a/summary.json").read_text())
    assert "parameters-frozen-statistics-moving" in summary["failed"]
    assert "parameters-frozen-statistics-moving" in (tmp_path / "outputs/a/report.html").read_text()
    pair = start(tmp_path, *SMALL, *MISTAKE, "audit.level=error", "run=b", num_ranks=2)
    assert pair.returncode != 0
    assert pair.stderr.count("error: audit.level=error") == 1
    assert "Traceback (most recent call last)" not in pair.stderr.split("error: audit.level=error")[0]
    assert read_metrics(tmp_path / "outputs/b") == []  # no step
    assert findings(tmp_path / "outputs/b") == (0, {("parameters-frozen-statistics-moving", "error")})


def check_stops_here(cwd, overrides):
    from tests.training.jobs import run_rank

    with pytest.raises(ConfigError, match=r"audit\.level=error: parameters-frozen"):
        run_rank(cwd, overrides)


def test_every_rank_stops_at_an_error(ranks, tmp_path):
    ranks(2, check_stops_here, tmp_path, (*SMALL, *MISTAKE, "audit.level=error", "run=a"))


def test_warnings_stop_nothing_and_off_looks_for_nothing(job):
    run = job(*SMALL, "bn.sync=false", "audit.level=error", "run=a", num_ranks=2)
    assert findings(run) == (0, {("plain-bn-in-distributed-job", "warning")})
    off = job(*SMALL, *MISTAKE, "audit.level=off", "run=b")
    assert not (off / "audit.json").exists()


def test_a_level_that_does_not_exist_names_the_key(tmp_path):
    done = start(tmp_path, "audit.level=loud")
    assert done.stderr == "error: audit.level: expected one of warning, error, off, got 'loud'\n"


def test_the_start_of_a_run_sees_the_plan_of_its_first_step_and_changes_nothing(job):
    # Nothing is frozen at step 0; the records of the switch at step 1 are there as ever.
    later = [*MISTAKE, "freeze.a.start=1"]
    runs = [job(*SMALL, *later, f"audit.level={level}", f"run={level}") for level in ("warning", "off")]
    assert findings(runs[0]) == (0, set())
    states = [torch.load(run / "checkpoints/step_00000002.pt", weights_only=True)["model"] for run in runs]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    switches = [[key for record in read_metrics(run) for key in record if key.startswith("freeze/")] for run in runs]
    assert switches[0] == switches[1] != []


def test_a_resumed_run_is_audited_where_it_goes_on(job):
    job(*SMALL, "run=a")
    run = job(*SMALL, "duration=3", "audit.level=error", "run=a")
    assert findings(run) == (2, set())


def test_a_backbone_frozen_before_anything_was_loaded_is_an_error(job):
    run = job(*SMALL, "freeze=backbone", "run=a")
    assert findings(run) == (0, {("frozen-at-initial-values", "error")})


@pytest.mark.slow
def test_few_samples_per_step_are_a_warning_by_the_ranks_that_are_summed_over(job):
    assert findings(job(*SMALL, "batch_size=8", "run=a", num_ranks=2)) == (0, set())
    for name, options in {"b": ["batch_size=4"], "c": ["batch_size=16", "accumulate=4"]}.items():
        assert findings(job(*SMALL, *options, f"run={name}", num_ranks=2)) == (
            0,
            {("few-values-per-channel", "warning")},
        )
    groups = job(*SMALL, "batch_size=8", "bn.group=1", "run=d", num_ranks=2)
    assert findings(groups) == (0, {("few-values-per-channel", "warning")})


def test_task_audit_looks_at_the_data_and_at_damaged_statistics(job, capsys):
    run = job(*SMALL, "duration=40", "audit.level=off", "run=a")
    path = run / "checkpoints/best.pt"
    from syncbn.training.checkpoint.files import read, write_atomically

    content = read(path, "load")
    content["model"]["backbone.stem.bn.running_mean"] += 50
    write_atomically(path, content)
    capsys.readouterr()
    audited = job("task=audit", f"load={run}", "run=b", "audit.level=warning")
    assert "train-eval-gap" in capsys.readouterr().out
    assert ("train-eval-gap", "warning") in findings(audited)[1]
    content["model"]["backbone.stem.bn.running_var"] -= 1e6
    write_atomically(path, content)
    with pytest.raises(ConfigError, match=r"^audit.level=error: invalid-statistics in backbone.stem.bn: "):
        job("task=audit", f"load={run}", "run=c", "audit.level=error")
    assert main(["audit", str(run)]) == 1


def test_task_audit_refuses_what_is_no_run_and_a_directory_that_holds_one(job):
    with pytest.raises(ConfigError, match=r"load: expected a checkpoint or a run directory for task=audit"):
        job("task=audit", "run=x")
    run = job(*SMALL, "run=a")
    with pytest.raises(ConfigError, match="holds a training run; choose another name"):
        job("task=audit", f"load={run}", "run=a")
