"""train.py end to end, as a user starts it."""

import json
import signal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from syncbn import SyncBatchNorm
from syncbn.nn import rank_checks
from syncbn.training.config.errors import ConfigError, RankError
from syncbn.training.distributed.ddp import WrappedModel
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.distributed.stopping import deferred
from syncbn.training.trainer.trainer import Trainer
from tests.once import made_once
from tests.training.jobs import OPTIMIZERS, compose_config, read_metrics, run_job, run_rank, start
from tests.training.wandb_file import read_history, read_records


@pytest.fixture(scope="module")
def default_job(tmp_path_factory):
    """The default job on two ranks, 5 epochs instead of 20: its working directory, and what it printed."""

    def make(cwd):
        done = start(cwd, "duration=5ep", "log_every=10", num_ranks=2, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return cwd, done.stdout

    return made_once(tmp_path_factory, "default", make)


@pytest.fixture(scope="module")
def default_run(default_job):
    return next((default_job[0] / "outputs").iterdir())


def test_the_default_job_learns_the_digits(default_run):
    final = read_metrics(default_run)[-1]
    assert max(r["val/accuracy"] for r in read_metrics(default_run) if "val/accuracy" in r) >= 0.975
    assert final["test/accuracy"] >= 0.95


@pytest.mark.slow
def test_in_all_of_its_epochs_it_learns_no_less(tmp_path):
    run = run_job(tmp_path, num_ranks=2, timeout=240)
    assert max(r["val/accuracy"] for r in read_metrics(run) if "val/accuracy" in r) >= 0.975
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.pt",
        "step_00000345.pt",
        "step_00000460.pt",
    ]


def test_two_ranks_make_exactly_one_run_directory(default_job):
    assert len(list((default_job[0] / "outputs").iterdir())) == 1


def test_nobody_else_can_read_what_a_run_has_written(default_run):
    written = [default_run, *default_run.rglob("*")]
    assert len(written) > 20  # wandb's files too
    assert [path for path in written if not path.is_symlink() and path.stat().st_mode & 0o077] == []


def test_the_run_directory_holds_config_metrics_checkpoints_and_one_wandb_run(default_run):
    config = yaml.safe_load((default_run / ".hydra/config.yaml").read_text())
    assert config["batch_size"] == 64
    assert sorted(path.name for path in (default_run / "checkpoints").iterdir()) == [
        "best.pt",
        "step_00000115.pt",
    ]
    assert len(list(default_run.glob("wandb/offline-run-*"))) == 1


def test_each_message_is_printed_once(default_job):
    lines = [line for line in default_job[1].splitlines() if line.strip()]
    assert len(lines) == len(set(lines))
    assert sum("2 rank(s) on cpu" in line for line in lines) == 1
    assert sum("test/accuracy" in line for line in lines) == 1


def test_metrics_are_one_flat_record_per_line_with_steps_that_never_go_back(default_run):
    records = read_metrics(default_run)
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)
    assert not any(isinstance(value, dict) for record in records for value in record.values())
    training = [record for record in records if "train/loss" in record]
    assert {"train/lr", "train/samples_per_second", "epoch"} <= training[0].keys()
    assert "bn/backbone.stem.bn/running_var" in training[0]
    assert sum("test/accuracy" in record for record in records) == 1  # the test set is used once


def test_wandb_has_the_same_numbers_once_at_the_same_steps(default_run):
    logged = [{key: value for key, value in row.items() if "/hist/" not in key} for row in read_history(default_run)]
    expected = read_metrics(default_run)
    assert len(expected) > 15
    internal = {"_step", "_runtime", "_timestamp"}
    scalars = [{key: row[key] for key in row.keys() - internal} for row in logged if "bn/layers/_type" not in row]
    assert scalars == expected


def test_everything_the_monitor_shows_is_recorded_at_each_logging_step(default_run):
    training = [record for record in read_metrics(default_run) if "train/loss" in record]
    layers = {key.split("/")[1] for key in training[0] if key.startswith("bn/") and key.count("/") == 2}
    assert len(layers) == 9
    shown = {"running_mean_abs", "running_var", "batch_mean_abs", "batch_var", "drift", "between_rank_share",
             "values_per_channel", "weight_abs", "bias", "dead_channels", "stats_frozen", "affine_frozen"}  # fmt: skip
    for record in training:
        for layer in layers:
            assert {key.split("/")[2] for key in record if key.startswith(f"bn/{layer}/")} == shown
        assert record["bn/max_drift"] == max(record[f"bn/{layer}/drift"] for layer in layers)
    # 64 samples of 8 x 8 over both ranks; 29 in the last step of an epoch
    assert {record["bn/backbone.stem.bn/values_per_channel"] for record in training} <= {64.0 * 64, 29.0 * 64}
    histograms = [row for row in read_history(default_run) if "bn/backbone.stem.bn/hist/drift/_type" in row]
    assert [row["step"] for row in histograms] == [record["step"] for record in training]


def test_each_evaluation_has_a_table_of_all_layers_and_the_vectors_of_the_latest(default_run):
    evaluated = [record["step"] for record in read_metrics(default_run) if "val/loss" in record]
    tables = [row for row in read_history(default_run) if "bn/layers/_type" in row]
    assert [row["step"] for row in tables] == evaluated
    assert tables[-1]["bn/layers/nrows"] == 9
    shown = [
        json.loads(path.read_text())
        for row in tables
        for path in default_run.glob(f"wandb/offline-run-*/files/{row['bn/layers/path']}")
    ]
    # What the layers saw in this very step, whether or not it is a logging step.
    drifts = [one["data"][0][one["columns"].index("drift")] for one in shown]
    assert len(set(drifts)) == len(evaluated)
    shown = shown[-1]
    latest = json.loads((default_run / "layers.json").read_text())
    assert latest["step"] == evaluated[-1]
    assert [row[:2] for row in shown["data"]] == [[number, name] for number, name in enumerate(latest["layers"])]
    stem = latest["layers"]["backbone.stem.bn"]
    column = shown["columns"].index("running_var")
    assert shown["data"][0][column] == pytest.approx(sum(stem["running_var"]) / len(stem["running_var"]))
    state = load_last(default_run)["model"]
    assert stem["running_mean"] == state["backbone.stem.bn.running_mean"].double().tolist()


def test_the_environment_is_recorded(default_run):
    environment = json.loads((default_run / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert list(environment["hosts"].values()) == [2]
    assert environment["torch"] == torch.__version__
    assert environment["command"].startswith("train.py")


def test_a_single_process_evaluates_the_checkpoint_to_the_same_numbers(default_run, tmp_path):
    evaluated = run_job(tmp_path, "task=eval", f"load={default_run}")
    numbers, final = read_metrics(evaluated)[-1], read_metrics(default_run)[-1]
    assert numbers["test/accuracy"] == final["test/accuracy"]
    assert numbers["test/loss"] == pytest.approx(final["test/loss"], abs=1e-6)


# A global batch of 287 leaves 2 of the 1,437 digits for the last batch of an epoch: at 4 ranks two of them get none.
INVARIANCE = ["batch_size=287", "model.width=4", "log_every=1", "eval_every=100", "tracker=none"]
WORLDS = (1, 2, 4)


def load_last(run_dir, nth=-1):
    return torch.load(sorted((run_dir / "checkpoints").glob("step_*.pt"))[nth], weights_only=True)


@pytest.mark.parametrize(("num_steps", "worlds"), [(6, (1, 3)), pytest.param(20, (1, 4), marks=pytest.mark.slow)])
def test_every_step_of_the_trajectory_is_the_same_at_any_world_size(job, tmp_path, num_steps, worlds):
    overrides = [*INVARIANCE, "precision=fp64", f"duration={num_steps}", "loss.class_weights=balanced",
                 "data.sampler=balanced", "data.mean=0.3",
                 "data.augment.jiggle._target_=tests.training.transforms.Jiggle"]  # fmt: skip
    runs = [job(*overrides, f"run=w{world}", num_ranks=world) for world in worlds]
    if num_steps > 6:
        runs.append(run_job(tmp_path, *overrides, "run=command", num_ranks=2))  # as a user starts it
    models = [load_last(run)["model"] for run in runs]
    losses = [[r["train/loss"] for r in read_metrics(run) if "train/loss" in r] for run in runs]
    assert len(losses[0]) == num_steps
    moved = [
        key
        for key, value in models[0].items()
        if "running_var" in key and not torch.allclose(value, torch.ones(()).double())
    ]
    assert len(moved) == 9
    for model, loss in zip(models[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], abs=1e-9)
        for key, value in model.items():
            assert (value - models[0][key]).abs().max() < 1e-9, key


@pytest.mark.slow  # the trajectory is the same in float64, step by step
def test_a_float32_step_has_the_same_gradients_and_statistics_at_any_world_size(job, tmp_path):
    # After one step the momentum buffer of SGD is the gradient plus weight_decay times the (equal) initial weights.
    overrides = [*INVARIANCE, "duration=1"]
    states = [load_last(job(*overrides, f"run=w{world}", num_ranks=world)) for world in WORLDS]
    for state in states[1:]:
        pairs = zip(states[0]["optimizer"]["state"].values(), state["optimizer"]["state"].values(), strict=True)
        for first, other in pairs:
            assert (first["momentum_buffer"] - other["momentum_buffer"]).abs().max() < 1e-5
        for key, value in state["model"].items():
            assert (value - states[0]["model"][key]).abs().max() < 1e-5, key


@pytest.mark.parametrize(
    "optimizer", ["custom", *(pytest.param(one, marks=pytest.mark.slow) for one in ("sgd", "adamw"))]
)
def test_freezing_and_unfreezing_in_the_middle_is_the_same_at_any_world_size(job, tmp_path, optimizer):
    plan = ["freeze.stem.match=backbone.stem", "freeze.stem.weights=true", "freeze.stem.start=3", "freeze.stem.until=8",
            "freeze.top.match=backbone.stage3", "freeze.top.stats=false", "freeze.top.until=6"]  # fmt: skip
    groups = ["optimizer.groups.stem.match=backbone.stem", "optimizer.groups.stem.lr_scale=0.1",
              "optimizer.groups.top.match=backbone.stage3", "optimizer.groups.top.weight_decay=0",
              "optimizer.decay_norm_and_bias=false"]  # fmt: skip
    overrides = [*INVARIANCE, "precision=fp64", "duration=12", "accumulate=2", "batch_size=60", *plan,
                 *OPTIMIZERS[optimizer], *groups]  # fmt: skip
    runs = [job(*overrides, f"run=w{world}", num_ranks=world) for world in (1, 3)]
    models = [load_last(run)["model"] for run in runs]
    for key, value in models[0].items():
        assert (models[1][key] - value).abs().max() < 1e-9, key
    switches = [record for record in read_metrics(runs[1]) if "freeze/backbone.stem.bn/stats" in record]
    assert [(record["step"], record["freeze/backbone.stem.bn/stats"]) for record in switches] == [(3, 1.0), (8, 0.0)]


@pytest.mark.slow
def test_the_finetune_experiments_end_in_a_table_with_a_drift_of_zero_where_it_must_be(pretrained):
    names = ["finetune_frozen", "finetune_bn_unfrozen", "finetune_gradual", "finetune_mistake"]
    sweep = [f"experiment={','.join(names)}", "duration=20", "tracker=none", "run=sweep"]
    done = start(pretrained, "-m", *sweep, num_ranks=2, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters-frozen-statistics-moving") == 1  # of the mistake, which goes on all the same
    table = done.stdout[done.stdout.index("sweep outputs/sweep") :]
    assert all(name in table for name in names)
    summaries = [json.loads((pretrained / f"outputs/sweep/{job}/summary.json").read_text()) for job in range(4)]
    drifts = {name: summary["metrics"]["drift/backbone"] for name, summary in zip(names, summaries, strict=True)}
    assert drifts["finetune_frozen"] == 0.0
    assert all(drifts[name] > 0.05 for name in names[1:])  # the mistake: parameters frozen, statistics moving


def test_a_frozen_pretrained_backbone_does_not_move_by_a_bit_while_the_head_trains(job, pretrained):
    before = torch.load(pretrained / "outputs/pretrain/checkpoints/best.pt", weights_only=True)["model"]
    tuned = job("experiment=finetune_frozen", "duration=1ep", "tracker=none", "run=tuned", num_ranks=2, cwd=pretrained)
    after = load_last(tuned)["model"]
    backbone = [key for key in after if key.startswith("backbone.")]
    assert len(backbone) == 54
    assert all(torch.equal(after[key], before[key]) for key in backbone)
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_every_experiment_runs_in_fast_mode(job, pretrained, experiment):
    name = experiment[0].replace("experiment=", "fast_")
    run = job(*experiment, "duration=1", "tracker=none", f"run={name}", cwd=pretrained)
    assert "test/accuracy" in read_metrics(run)[-1]


def test_the_momentum_of_an_unfrozen_parameter_is_kept_or_reset(job, tmp_path):
    rule = ["freeze.a.match=backbone.stem.bn", "freeze.a.stats=false", "freeze.a.start=2", "freeze.a.until=3"]
    same = [
        *rule,
        "duration=4",
        "schedule=constant",
        "tracker=none",
        "optimizer.momentum=0.5",
        "save.every=1",
        "save.keep=9",
    ]
    kept, reset = (job(*same, f"optimizer.on_unfreeze={c}", f"run={c}") for c in ("keep", "reset"))

    def momentum(run, step):  # of the stem's gamma, the second parameter
        state = torch.load(run / f"checkpoints/step_{step:08d}.pt", weights_only=True)["optimizer"]["state"]
        return state[1]["momentum_buffer"]

    assert torch.equal(momentum(kept, 3), momentum(kept, 2))  # frozen in step 2: it waits
    # The last step adds the same gradient to half of what was kept, or to nothing.
    assert torch.allclose(momentum(kept, 4), 0.5 * momentum(kept, 2) + momentum(reset, 4), atol=1e-7)
    assert momentum(kept, 2).abs().max() > 1e-4


def test_the_same_run_name_goes_on_where_it_stopped(job, tmp_path):
    whole = job("duration=30", "schedule=constant", "tracker=none", "run=whole")
    job("duration=12", "schedule=constant", "tracker=none", "run=parts")
    parts = job("duration=30", "schedule=constant", "tracker=none", "run=parts")
    expected, actual = load_last(whole)["model"], load_last(parts)["model"]
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A multirun of four jobs on two ranks, two of them a mistake: its directory, and how it ended."""

    def make(cwd):
        choices = ["optimizer.lr=0.1,0.05", "freeze.a.match=nope,backbone"]
        return cwd / "outputs/sweep", start(cwd, "-m", *choices, "duration=2", "run=sweep", num_ranks=2)

    return made_once(tmp_path_factory, "sweep", make)


@pytest.mark.slow
def test_multirun_gives_each_job_its_own_directory_wandb_run_and_line_in_the_table(sweep):
    directory, done = sweep
    jobs = [directory / "1", directory / "3"]
    rates = [next(r["train/lr"] for r in read_metrics(job) if "train/lr" in r) for job in jobs]
    assert rates[0] == pytest.approx(2 * rates[1])
    files = [list(job.glob("wandb/offline-run-*/*.wandb")) for job in jobs]
    assert [len(found) for found in files] == [1, 1]
    assert files[0][0].name != files[1][0].name
    table = done.stdout.split("sweep outputs/sweep")[1]
    choices = ("optimizer.lr=0.1", "optimizer.lr=0.05", "freeze.a.match=nope", "freeze.a.match=backbone")
    assert [table.count(choice) for choice in choices] == [2, 2, 2, 2]
    assert "duration=2" not in table  # which is the same in all of them


@pytest.mark.slow
def test_a_job_of_a_multirun_that_fails_has_its_line_and_the_others_go_on(sweep):
    directory, done = sweep
    assert done.returncode != 0
    for number in (0, 2):
        assert done.stderr.count(f"error in job {number}: freeze.a: match='nope' selects no module") == 1
    assert [(directory / f"{number}/checkpoints").exists() for number in range(4)] == [False, True, False, True]
    rows = [line for line in done.stdout.split("sweep outputs/sweep")[1].splitlines() if "optimizer.lr" in line]
    assert ["selects no" in row for row in rows] == [True, False, True, False]


@pytest.mark.slow
def test_a_multirun_ends_with_a_report_of_its_jobs_side_by_side(sweep):
    directory, _ = sweep
    report = (directory / "report.html").read_text()
    assert all(f"sweep/{number} " in report for number in range(4))


@pytest.mark.parametrize("tracker", ["none", "wandb"])
def test_there_is_a_report_whatever_the_tracker(tracker):
    assert compose_config(f"tracker={tracker}").tracker.report


def check_zero_rows_are_refused(cwd):
    with pytest.raises(ConfigError, match=r"model: cannot take zero rows.* use flatten\(1\)"):
        run_rank(cwd, ("model=custom", "model._target_=views.Net", "batch_size=359", "duration=1", "tracker=none"))


def test_a_model_that_cannot_take_zero_rows_is_named_at_start(ranks, tmp_path):
    (tmp_path / "views.py").write_text(VIEWS)
    ranks(2, check_zero_rows_are_refused, tmp_path)


VIEWS = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.view(x.size(0), -1))
"""


MINE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain
        self.head = torch.nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1)) * self.gain
"""


def test_a_model_from_a_users_own_package(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    run = run_job(tmp_path, "model=custom", "model._target_=mine.Net", "+model.gain=2", "duration=3", "tracker=none")
    assert load_last(run)["step"] == 3


def drawn_after_each_step(cwd, overrides):
    """The number that a model would draw next, on this rank; of what a step draws, only the seed decides it here."""
    drawn, train_step = [], Trainer._train_step

    def drawing(trainer, step):
        train_step(trainer, step)
        drawn.append(torch.rand(()).item())

    with mock.patch.object(Trainer, "_train_step", drawing):
        run_rank(cwd, overrides)
    return drawn


def test_a_model_draws_other_numbers_in_every_step_and_on_every_rank(ranks, tmp_path):
    overrides = ("data=synthetic", "data.num_samples=40", "data.size=8", "model.width=4", "batch_size=8",
                 "tracker=none", "duration=3")  # fmt: skip
    drawn = ranks(2, drawn_after_each_step, tmp_path, overrides)
    assert len({number for of_rank in drawn for number in of_rank}) == 2 * 3


@pytest.mark.slow
def test_a_ragged_last_window_follows_the_same_trajectory_at_any_world_size(job, tmp_path):
    # 104 samples in steps of 24: the last one has 8 for 3 micro-batches, of which 4 ranks get 1 each or none.
    overrides = ["data=synthetic", "data.num_samples=130", "data.size=8", "model.width=4", "tracker=none",
                 "batch_size=24", "accumulate=3", "precision=fp64", "duration=11", "data.shift=1"]  # fmt: skip
    models = [load_last(job(*overrides, f"run=w{world}", num_ranks=world))["model"] for world in (1, 2, 4)]
    for model in models[1:]:
        for key, value in model.items():
            assert (value - models[0][key]).abs().max() < 1e-9, key


def test_uneven_micro_batches_are_exact(job, tmp_path):
    states = {}
    for accumulate in (1, 3):
        overrides = [*INVARIANCE, "precision=fp64", "duration=5", f"accumulate={accumulate}"]
        # Frozen statistics take the batch out of the normalization: then accumulation must change nothing at all.
        frozen = ["freeze.bn.match=backbone", "freeze.bn.affine=false"]
        states[accumulate] = load_last(job(*overrides, *frozen, f"run=a{accumulate}", num_ranks=2))["model"]
    for key, value in states[1].items():
        assert (states[3][key] - value).abs().max() < 1e-12, key


GROUPS = [["bn.group=1"], pytest.param(["bn.sync=false"], marks=pytest.mark.slow)]
# Batches of 3: two samples on rank 0, one on rank 1. With momentum 1 the running statistics are those of the last
# batch.
THREES = ["data=synthetic", "data.num_samples=40", "data.size=8", "model.width=4", "batch_size=3", "bn.momentum=1.0",
          "precision=fp64", "tracker=none", "optimizer.lr=1e-9", "save.every=1", "save.keep=9"]  # fmt: skip
FIRST = "backbone.stem.bn.running_mean"  # of the first layer: its input is the same whoever normalizes


@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_statistics_of_groups_are_pooled_by_samples_before_they_are_saved(job, options):
    runs = [job(*THREES, *extra, f"run=r{n}", "duration=3", num_ranks=2) for n, extra in enumerate((options, []))]
    pooled, synced = (torch.load(r / "checkpoints/step_00000001.pt", weights_only=True)["model"] for r in runs)
    assert (pooled[FIRST] - synced[FIRST]).abs().max() < 1e-12


def test_a_process_group_of_its_own_changes_no_bit(job):
    runs = [job(*THREES, f"bn.own_group={own}", f"run={own}", "duration=3", num_ranks=2) for own in ("true", "false")]
    own, shared = (load_last(run)["model"] for run in runs)
    assert own.keys() == shared.keys()
    assert all(torch.equal(value, shared[key]) for key, value in own.items())


@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_evaluation_uses_the_pooled_statistics_that_the_checkpoint_has(job, options):
    run = job(*THREES, *options, "duration=4", "run=a", num_ranks=2)
    best = torch.load(run / "checkpoints/best.pt", weights_only=True)["step"]
    [recorded] = [r["val/loss"] for r in read_metrics(run) if "val/loss" in r and r["step"] == best]
    evaluated = job("task=eval", f"load={run}", "run=b")
    assert read_metrics(evaluated)[-1]["val/loss"] == pytest.approx(recorded, abs=1e-12)


@pytest.mark.slow
def test_per_group_statistics_are_left_as_they_are(job):
    pooled, own = (
        load_last(job(*THREES, "bn.sync=false", f"bn.buffers={choice}", f"run={choice}", "duration=1", num_ranks=2))[
            "model"
        ]
        for choice in ("pool", "per_group")
    )
    assert (pooled[FIRST] - own[FIRST]).abs().max() > 1e-3  # rank 0's two samples are not the three


def check_wrapping():
    rank = dist.get_rank()
    context = RankContext(rank, dist.get_world_size(), torch.device("cpu"), torch.float32)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1].running_mean.fill_(float(rank))
    WrappedModel(model, context, is_first=False, num_totals=1, loss_of=lambda net: net(torch.randn(4, 2)).sum())
    assert torch.equal(model[1].running_mean, torch.full((3,), float(rank)))  # each its own
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0  # the warm-up has left no trace


def test_wrapping_anew_leaves_what_groups_of_ranks_have_gathered(ranks):
    ranks(2, check_wrapping)


def check_totals(dtype):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    context = RankContext(rank, world_size, torch.device("cpu"), dtype)
    torch.manual_seed(0)
    model = nn.Linear(2, 3).to(dtype)
    images = torch.randn(7, 2, dtype=dtype)

    def loss_of(net):
        return net(images.tensor_split(world_size)[rank]).square().sum()

    wrapped = WrappedModel(model, context, is_first=True, num_totals=3, loss_of=loss_of)
    for step in range(2):  # a step leaves nothing to the next
        model.zero_grad()
        mine = torch.tensor([rank + 0.5, torch.nan if rank == 0 else 1.0, step], dtype=torch.float64)
        sums = wrapped.backward(loss_of(wrapped) * world_size, mine)
        expected = torch.tensor([sum(range(world_size)) + 0.5 * world_size, torch.nan, step * world_size])
        torch.testing.assert_close(sums, expected.double(), equal_nan=True, rtol=0, atol=0)
        average = model.weight.grad.clone()
        model.zero_grad()
        model(images).square().sum().backward()
        torch.testing.assert_close(average, model.weight.grad)  # no NaN in it
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):  # not a run that learns nothing
        wrapped.backward(loss_of(wrapped), mine)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_totals_of_a_step_travel_with_the_gradients_and_do_not_touch_them(ranks, num_ranks, dtype):
    ranks(num_ranks, check_totals, dtype)


def count_all_reduces(model, carries):
    """What DDP sends in a backward pass."""
    images = torch.randn(4, 2)
    if carries:
        context = RankContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), torch.float32)
        wrapped = WrappedModel(model, context, is_first=True, num_totals=5, loss_of=lambda net: net(images).sum())
    else:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):
            wrapped(images).sum().backward()
    loss = wrapped(images).sum()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        _ = wrapped.backward(loss, torch.zeros(5)) if carries else loss.backward()
    return sum(event.name == "gloo:all_reduce" for event in recorded.events())


def build_large():
    return nn.Sequential(nn.Linear(2, 5000), nn.Linear(5000, 300), nn.Linear(300, 5000), nn.Linear(5000, 2))


def check_all_reduces():
    small = [count_all_reduces(nn.Linear(2, 3), carries) for carries in (True, False)]
    large = [count_all_reduces(build_large(), carries) for carries in (True, False)]
    assert small == [1, 1]
    assert large[0] == large[1] > 1


def test_totals_cost_no_collective(ranks):
    ranks(2, check_all_reduces)


def check_names():
    context = RankContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), torch.float32)
    model = nn.Sequential(nn.Linear(2, 3), SyncBatchNorm(3))
    wrapped = WrappedModel(
        model, context, is_first=True, num_totals=1, loss_of=lambda net: net(torch.randn(4, 2)).sum()
    )
    assert rank_checks.name_of(wrapped.model[1]) == "1"


def test_a_layer_keeps_its_name_in_the_wrapper(ranks):
    ranks(2, check_names)


def test_a_last_batch_of_one_sample_is_no_accident_in_one_process_either(ranks, tmp_path):
    # Four stages pool 8x8 images to 1x1: the last batch (20 = 19 + 1) has a single value per channel at the top.
    same = ["data=synthetic", "data.num_samples=26", "data.size=8", "batch_size=19", "model.stages=4", "model.width=4",
            "duration=3ep", "tracker=none", "precision=fp64"]  # fmt: skip
    alone, pair = (load_last(ranks(n, run_rank, tmp_path, (*same, f"run=w{n}"))[0])["model"] for n in (1, 2))
    assert all((pair[key] - value).abs().max() < 1e-9 for key, value in alone.items())


def test_one_value_per_channel_without_synchronization_is_an_error_with_the_step_and_the_remedy(job):
    same = ["data=synthetic", "data.num_samples=26", "data.size=8", "batch_size=19", "model.stages=4", "model.width=4",
            "duration=3ep", "tracker=none"]  # fmt: skip
    with pytest.raises(RankError, match=r"step 1: one value per channel .* set bn.sync=true, or a batch_size"):
        job(*same, "bn.sync=false")


def test_the_stored_configuration_is_resolved_and_complete(default_run):
    stored = yaml.safe_load((default_run / "config.yaml").read_text())
    assert stored["optimizer"] == {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True,
                                   "on_unfreeze": "reset", "decay_norm_and_bias": True, "groups": {}}  # fmt: skip
    assert "${" not in (default_run / "config.yaml").read_text()


def test_a_model_with_another_number_of_classes_is_named_at_start(job, tmp_path):
    (tmp_path / "seven_classes.py").write_text(MINE.replace("64, 10", "64, 7"))
    with pytest.raises(
        ConfigError, match=r"^model: expected logits of shape \(2, 10\), got \(2, 7\); the data has 10 classes$"
    ):
        job("model=custom", "model._target_=seven_classes.Net", "+model.gain=1")


def test_bn_groups_that_do_not_divide_the_world_are_one_message_and_leave_no_directory_behind(tmp_path):
    done = start(tmp_path, "bn.group=3", "tracker=none", num_ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: bn.group: size: expected a divisor of the world size 2, got 3") == 1
    assert list((tmp_path / "outputs").iterdir()) == []


def test_running_statistics_move_once_per_step_however_many_micro_batches_it_has(job, tmp_path):
    runs = [job(*INVARIANCE, "precision=fp64", "duration=1", f"accumulate={n}", f"run=a{n}") for n in (1, 4)]
    one, four = (load_last(run)["model"] for run in runs)
    assert int(four["backbone.stem.bn.num_batches_tracked"]) == 1
    # The first layer's are those of the whole batch.
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(four[f"backbone.stem.bn.{name}"], one[f"backbone.stem.bn.{name}"])


def test_a_run_ends_with_a_report_of_its_layers(default_run):
    report = (default_run / "report.html").read_text()
    assert len(report) < 3_000_000
    assert "backbone.stage3.0.bn2" in report
    assert "no between-rank share" not in report
    assert "validation samples (taken for another class)" in report  # what it gets wrong


@pytest.mark.slow
def test_a_run_whose_ranks_all_fail_has_a_report_though_torchrun_ends_the_first_when_another_is_gone(tmp_path):
    done = start(tmp_path, "optimizer.lr=1e12", "duration=5", "log_every=1", "run=far", num_ranks=2)
    assert done.returncode == 1
    run = tmp_path / "outputs/far"
    assert "the loss is not finite" in json.loads((run / "summary.json").read_text())["failed"]
    assert "the loss is not finite" in (run / "report.html").read_text()
    assert any(record.WhichOneof("record_type") == "exit" for record in read_records(next(run.rglob("*.wandb"))))


def test_a_signal_waits_until_what_must_not_be_cut_off_is_over():
    ended = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        with deferred():
            signal.raise_signal(signal.SIGTERM)
            assert ended == []
        assert ended == [signal.SIGTERM]
        with deferred():
            pass
        assert len(ended) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
