"""Models, data, losses and metrics of somebody's own package, from another directory, without touching this one."""

import pytest
import torch

from syncbn.training.config.data import OpenData
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.custom import load_custom
from tests.training.jobs import read_metrics, run_job, run_rank, start

PACKAGE = '''
import torch
from torch import nn


class Waves(torch.utils.data.Dataset):
    """Signals (2, 12) that are noise around a line, and its slope; a part of each is not measured."""

    def __init__(self, num, first, noise):
        self.num, self.first, self.noise = num, first, noise

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        slope = ((self.first + index) * 0.618) % 1.0
        line = torch.linspace(0, 1, 12) * slope
        signal = torch.stack([line, line.flip(0)]) + self.noise * torch.randn(2, 12)  # as augmentation
        return signal, torch.tensor([slope] * (1 + index % 3) + [float("nan")] * (2 - index % 3))


class Study:
    def __init__(self, noise=0.1):
        self.train, self.val, self.test = Waves(43, 0, noise), Waves(9, 100, 0.0), Waves(8, 200, 0.0)


class Regressor(nn.Module):
    def __init__(self, width, in_channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(in_channels, width, 3), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, signals):
        return self.head(self.body(signals).mean(2))


class Measured:
    """Squared error where there is a measurement: each sample counts one to three."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, outputs, targets):
        there = ~targets.isnan()
        error = (outputs - targets.nan_to_num()).square() * self.scale
        return error[there].sum(), there.sum()


def absolute(outputs, targets):
    there = ~targets.isnan()
    return (outputs - targets.nan_to_num())[there].abs().sum(), there.sum()


def weighted(outputs, targets):
    total, count = absolute(outputs, targets)
    return 1e-3 * total, 1e-3 * count
'''

EXPERIMENT = """# @package _global_
defaults:
  - override /data: custom
  - override /model: custom
  - override /loss: custom
  - override /tracker: none
data: {_target_: mine.Study, noise: 0.2}
model: {_target_: mine.Regressor, width: 5}
loss: {_target_: mine.Measured, scale: 2.0}
batch_size: 7
duration: 3ep
log_every: 1
precision: fp64
optimizer: {lr: 0.01}
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory with the package and its configuration."""
    (tmp_path / "mine.py").write_text(PACKAGE)
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(EXPERIMENT)
    return tmp_path


def last_model(run):
    return torch.load(sorted(run.glob("checkpoints/step_*.pt"))[-1], weights_only=True)["model"]


@pytest.mark.slow
def test_a_package_of_ones_own_trains_the_same_on_one_rank_and_two(elsewhere):
    common = ["--config-dir", "conf", "experiment=mine"]
    # 43 signals in batches of 7: one is left for the last batch, and the second rank has none of it.
    runs = [
        run_job(elsewhere, *common, f"run=w{ranks}", f"data.workers={workers}", num_ranks=ranks)
        for ranks, workers in ((0, 0), (2, 1))
    ]
    models = [last_model(run) for run in runs]
    assert models[0]["body.1.num_batches_tracked"] == 3 * 7
    losses = [[record["train/loss"] for record in read_metrics(run) if "train/loss" in record] for run in runs]
    for model, loss in zip(models[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], abs=1e-12)
        for key, value in model.items():
            assert (value - models[0][key]).abs().max() < 1e-9, key
    final = read_metrics(runs[0])[-1]
    assert "test/loss" in final
    assert "test/accuracy" not in final  # there are no classes
    evaluated = run_job(elsewhere, "task=eval", f"load={runs[0]}", "trust=[mine.*]")
    assert read_metrics(evaluated)[-1]["test/loss"] == pytest.approx(final["test/loss"], abs=1e-12)


def test_a_mistake_in_a_loss_is_one_message(elsewhere):
    failed = start(elsewhere, "--config-dir", "conf", "experiment=mine", "~loss.scale", "loss._target_=mine.Measured")
    assert failed.returncode == 2
    assert "error: loss._target_=mine.Measured: " in failed.stderr
    assert "scale" in failed.stderr


def test_a_function_is_a_loss_too_and_its_counts_may_be_weights_that_add_up_to_less_than_one(elsewhere):
    common = ["--config-dir", "conf", "experiment=mine", "duration=3", "~loss.scale", "+loss._partial_=true"]
    runs = [
        run_job(elsewhere, *common, f"loss._target_=mine.{loss}", f"run={loss}") for loss in ("absolute", "weighted")
    ]
    for key, value in last_model(runs[1]).items():
        assert (value - last_model(runs[0])[key]).abs().max() < 1e-9, key


class Wrong:
    train = val = test = ()


class NoPairs:
    train = val = test = [torch.ones(2)]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("collections.OrderedDict", "expected the datasets train, val and test"),
        ("tests.training.test_own_package.Wrong", "train is empty"),
        (
            "tests.training.test_own_package.NoPairs",
            r"train\[0\]: expected an item \(image tensor, target\), got a T",
        ),
        ("nowhere.Study", "data._target_=nowhere.Study: "),
    ],
)
def test_a_data_set_that_is_none_is_named(target, message):
    with pytest.raises(ConfigError, match=message):
        load_custom(OpenData({"_target_": target}))


@pytest.mark.parametrize("option", [{"workers": -1}, {"workers": "two"}, {"prefetch": 0}])
def test_options_of_loading_are_checked(option):
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(option))}: expected a number, "):
        OpenData({"_target_": "x", **option})


SEGMENTATION = ["experiment=segmentation", "tracker=none", "precision=fp64", "data.num_samples=100", "batch_size=7",
                "duration=12", "model.width=4", "model.depth=2", "log_every=1", "eval_every=6"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_segmentation_with_ragged_masks_is_exact_at_any_world_size(ranks, tmp_path, world_size):
    one = ranks(1, run_rank, tmp_path, (*SEGMENTATION, "run=one"))[0]
    many = ranks(world_size, run_rank, tmp_path, (*SEGMENTATION, "run=many"))[0]
    for key, value in last_model(many).items():
        assert (value - last_model(one)[key]).abs().max() < 1e-9, key
    ours, theirs = (
        [
            {k: v for k, v in record.items() if k.startswith(("train/loss", "val/", "test/"))}
            for record in read_metrics(run)
        ]
        for run in (one, many)
    )
    assert ours == [pytest.approx(record, abs=1e-9) for record in theirs]
    assert 0.0 < ours[-1]["test/mean_iou"] < 1.0


PER_CLASS = ["data=synthetic", "data.num_samples=200", "tracker=none", "duration=3ep", "metrics=per_class",
             "metrics.f1._target_=torchmetrics.classification.MulticlassF1Score", "metrics.f1.average=macro",
             "best=f1"]  # fmt: skip


def test_metrics_per_class_and_of_ones_own_choose_the_best(ranks, tmp_path):
    run = ranks(2, run_rank, tmp_path, (*PER_CLASS, "run=a"))[0]
    evaluated = [record for record in read_metrics(run) if "val/loss" in record]
    names = {"val/accuracy", "val/loss", "val/f1", *(f"val/recall/{number}" for number in range(4))}
    assert all(names <= record.keys() for record in evaluated)
    best = max(evaluated, key=lambda record: (record["val/f1"], -record["val/loss"]))
    counters = torch.load(sorted(run.glob("checkpoints/step_*.pt"))[-1], weights_only=True)["counters"]
    assert counters["best_step"] == best["step"]
    assert counters["best"] == {name.removeprefix("val/"): best[name] for name in names}
