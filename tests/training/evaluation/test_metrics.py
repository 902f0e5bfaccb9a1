"""Evaluation counts each sample once, whatever the ranks and the sizes of batches."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torchmetrics import classification

from syncbn.training.config.errors import ConfigError
from syncbn.training.data.dataset import Split
from syncbn.training.data.images import ImageData
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.evaluation.evaluate import EVAL_BATCH_SIZE, evaluate
from syncbn.training.evaluation.metrics import Best, choose_best
from syncbn.training.evaluation.tallies import Accuracy, ClassBalance
from syncbn.training.losses.losses import CrossEntropy


def make_split(num):
    generator = torch.Generator().manual_seed(num)
    return Split(torch.randn(num, 1, 2, 2, generator=generator), torch.randint(3, (num,), generator=generator))


def check_exact(num):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(4, 3), nn.Dropout(0.5)).double()
    split = make_split(num)
    data = ImageData(split, split, split, num_classes=3, shift=0, flip=False)
    context = RankContext(rank, world_size, torch.device("cpu"), torch.float64)
    metrics = evaluate(model, data, split, CrossEntropy(), context)
    assert model.training  # modes are restored
    outputs = model.eval()(data.eval_batch(split, torch.arange(num), torch.float64)[0])
    assert metrics["loss"] == pytest.approx(F.cross_entropy(outputs, split.labels).item(), abs=1e-12)
    assert round(metrics["accuracy"] * num) == int((outputs.argmax(1) == split.labels).sum())
    return metrics


@pytest.mark.parametrize("num", [1, 2, 7, EVAL_BATCH_SIZE + 25])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_mean_over_all_samples_at_any_world_size(ranks, world_size, num):
    results = ranks(world_size, check_exact, num)
    assert all(result == results[0] for result in results)


def chosen(best, num_classes=3, **metrics):
    outputs, targets = torch.randn(2, 3), torch.tensor([0, 2])
    targets = targets if num_classes else torch.randn(2, 3)
    return choose_best(best, metrics, outputs, targets, has_accuracy=num_classes is not None)


@pytest.mark.parametrize(
    ("best", "num_classes", "expected"),
    [
        ("auto", 3, Best("accuracy", lowest=False)),
        ("auto", None, Best("loss", lowest=True)),
        ("mae", None, Best("mae", lowest=True)),
        ("r2", None, Best("r2", lowest=False)),
    ],
)
def test_the_best_is_the_lowest_of_a_metric_that_is_an_error(best, num_classes, expected):
    metrics = {} if num_classes else {"mae": torchmetrics.MeanAbsoluteError(), "r2": torchmetrics.R2Score()}
    assert chosen(best, num_classes, **metrics) == expected


def test_of_a_metric_with_a_number_per_class_one_is_chosen():
    recall = classification.MulticlassRecall(3, average=None)
    assert chosen("recall/2", recall=recall).by == "recall/2"
    for wrong in ("recall", "recall/3", "recal"):
        with pytest.raises(ConfigError, match=f"best: expected auto or one of .*recall/2, got '{wrong}'"):
            chosen(wrong, recall=recall)


def test_a_metric_that_cannot_take_the_outputs_is_found_before_training():
    with pytest.raises(ConfigError, match=r"metrics\.f1: cannot take the model's outputs: "):
        chosen("auto", f1=classification.BinaryF1Score())


def test_a_metric_for_which_two_samples_are_too_few_passes():
    class Picky(torchmetrics.MeanMetric):
        def compute(self):
            raise ValueError("three samples or more")

        def update(self, outputs, targets):
            pass

    assert chosen("picky", picky=Picky()) == Best("picky", lowest=False)


@pytest.mark.parametrize("ignored", [None, 255, 1])
@pytest.mark.parametrize("shape", [(7,), (7, 2, 3)])
def test_accuracy_and_balance_are_those_of_torchmetrics(shape, ignored):
    generator = torch.Generator().manual_seed(3)
    outputs, labels = torch.randn(7, 4, *shape[1:], generator=generator), torch.randint(4, shape, generator=generator)
    labels[2] = labels[2] if ignored is None else ignored
    options = {"ignore_index": ignored, "validate_args": False}
    theirs = classification.MulticlassAccuracy(4, average="micro", **options)
    recalls = classification.MulticlassStatScores(4, average=None, **options)
    accuracy, balance = Accuracy(ignored), ClassBalance(4, ignored)
    for part in (slice(0, 3), slice(3, 7), slice(0, 0)):
        for one in (accuracy, balance, *([theirs, recalls] if part != slice(0, 0) else [])):
            one.update(outputs[part], labels[part])
    right, *_, support = recalls.compute().unbind(1)
    occurs = support > 0
    assert accuracy.compute() == theirs.compute()
    assert balance.compute()["recall"] == (right / support.double())[occurs].mean()
    assert balance.compute()["ratio"] == support[occurs].max().double() / support[occurs].min()


def test_of_no_label_that_counts_the_accuracy_is_0():
    accuracy = Accuracy(255)
    accuracy.update(torch.randn(2, 3), torch.tensor([255, 255]))
    assert accuracy.compute() == 0


def test_an_evaluation_has_one_collective_of_its_own(ranks):
    assert ranks(2, count_collectives) == [1, 1]


def count_collectives():
    split = make_split(7)
    data = ImageData(split, split, split, num_classes=3, shift=0, flip=False)
    context = RankContext(dist.get_rank(), 2, torch.device("cpu"), torch.float64)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(4, 3)).double()
    with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers:
        evaluate(model, data, split, CrossEntropy(), context, metrics={"/balance": ClassBalance(3, None)})
    return gathers.call_count
