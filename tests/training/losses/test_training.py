"""Runs with each loss: the same trajectory at any world size, metrics that match, weights of classes that stay."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from syncbn.training.config.errors import ConfigError
from tests.training.jobs import read_metrics
from tests.training.trainer.test_train import load_last

SAME = ["tracker=none", "precision=fp64", "batch_size=14", "log_every=1", "save.every=1", "audit.level=off"]


class Study:
    """Images of 4x4 in three uneven classes (the last is rare), with several labels, a number or a mask beside it."""

    num_classes = 3

    def __init__(self, target="class"):
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(60, 1, 4, 4, generator=generator)
        label = torch.tensor([0] * 14 + [1] * 5 + [2]).repeat(3)
        masks = (images[:, 0] > 0).long() + (images[:, 0] > 1)
        masks[0] = 255
        targets = {
            "class": label,
            "labels": (images.flatten(1)[:, :3] > 0).float(),
            "numbers": images.flatten(1)[:, :3] * 2,
            "mask": masks,
        }[target]
        self.train, self.val, self.test = (
            TensorDataset(images[cut], targets[cut]) for cut in (slice(20), slice(20, 40), slice(40, 60))
        )


class Net(nn.Module):
    """Logits of an image, or of each pixel."""

    def __init__(self, num_classes, pixels=False):
        super().__init__()
        body = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 1)
        self.body = nn.Sequential(*body)
        with torch.no_grad():
            self.body[3].bias[0] = 3.0  # class 0 at first
        self.pixels = pixels

    def forward(self, images):
        outputs = self.body(images)
        return outputs if self.pixels else outputs.mean((2, 3))


def own(target, pixels=False):
    return ["data=custom", f"data._target_={__name__}.Study", f"+data.target={target}", "model=custom",
            f"model._target_={__name__}.Net", f"+model.pixels={pixels}"]  # fmt: skip


CASES = {
    "balanced": ([*own("class"), "loss.class_weights=balanced"], {"accuracy"}),
    "ce_dice": (
        [*own("mask", True), "loss=ce_dice", "loss.ignore_index=255", "loss.class_weights=balanced", "metrics=dice"],
        {"accuracy", "dice"},
    ),
    "bce": ([*own("labels"), "loss=bce", "metrics=multilabel"], {"f1", "auroc"}),
    "mse": ([*own("numbers"), "loss=mse", "metrics=regression"], {"mae", "rmse"}),
}


# The first is in the tests of world sizes and of resumes, the others add up as bce does.
SLOW = ("balanced", "ce_dice", "mse")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES]
)
def test_a_run_is_the_same_at_any_world_size_and_reports_what_matches_its_loss(job, case):
    options, expected = CASES[case]
    runs = [job(*SAME, *options, "duration=3", f"run=w{world}", num_ranks=world) for world in (1, 3)]
    models = [load_last(run)["model"] for run in runs]
    for key, value in models[0].items():
        assert (models[1][key] - value).abs().max() < 1e-9, key
    measured = [read_metrics(run)[-1] for run in runs]
    assert {name.removeprefix("test/") for name in measured[0] if name.startswith("test/")} == {*expected, "loss"}
    for name, value in measured[0].items():
        assert name == "train/samples_per_second" or measured[1][name] == pytest.approx(value, abs=1e-6), name


def test_balanced_weights_are_the_runs_from_its_beginning_and_validation_is_weighted_alike(job, monkeypatch):
    options = [*SAME, *own("class"), "loss.class_weights=balanced"]
    first = job(*options, "duration=2", "run=a")
    weights = load_last(first)["loss"]["class_weights"]
    assert weights.tolist() == pytest.approx([20 / (3 * 14), 20 / (3 * 5), 20 / 3])
    assert load_last(first)["config"]["loss"]["class_weights"] == "balanced"
    monkeypatch.setattr("syncbn.training.losses.class_weights._count", None)  # whoever counts again fails
    again = job(*options, "duration=3", "run=a")
    assert torch.equal(load_last(again)["loss"]["class_weights"], weights)
    told = {name: value for name, value in read_metrics(again)[-1].items() if name.startswith("test/")}
    [evaluated] = read_metrics(job("task=eval", f"load={again}", f"trust=[{__package__}.*]", "run=e"))
    assert {name: evaluated[name] for name in told} == told


def test_accuracy_that_misleads_is_a_warning_at_the_end(job, caplog):
    with caplog.at_level(logging.WARNING):
        job(*SAME, *own("class"), "optimizer.lr=0.01", "duration=3", "run=a")
    assert "by its accuracy of 0.7" in caplog.text
    assert "the most frequent class of the validation set has 14.0 times as many as the rarest" in caplog.text
    assert "metrics=macro_recall best=macro_recall" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        job(*SAME, *own("class"), "optimizer.lr=0.01", "duration=3", "run=b", "metrics=macro_recall",
            "best=macro_recall")  # fmt: skip
    assert "by its accuracy" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loss=bce"], "loss: bce is for targets of a 0 or 1 for each label, which only data=table with"),
        ([*own("class"), "loss=bce"], "loss=bce: expected targets of 0 and 1, one for each label"),
        ([*own("numbers", True), "loss=mse"], r"model: expected outputs of shape \(2, 3\), that of the targets, got"),
        ([*own("class"), "loss.class_weights=[1,2]"], "loss.class_weights: expected a number for each of 3 classes"),
    ],
)
def test_a_loss_that_does_not_fit_the_targets_is_one_line_before_training(job, options, message):
    with pytest.raises(ConfigError, match=message):
        job(*SAME, *options, "duration=1", "run=a")
