"""Evaluation counts each sample once, whatever the ranks and the sizes of batches."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from syncbn.training.data import Data, Split
from syncbn.training.losses import CrossEntropy
from syncbn.training.metrics import EVAL_BATCH_SIZE, evaluate
from syncbn.training.place import Place


def make_split(num):
    generator = torch.Generator().manual_seed(num)
    return Split(torch.randn(num, 1, 2, 2, generator=generator), torch.randint(3, (num,), generator=generator))


def check_exact(num):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(1), nn.Linear(4, 3)).double()
    split = make_split(num)
    data = Data(split, split, split, num_classes=3, shift=0, flip=False)
    place = Place(rank, world_size, torch.device("cpu"), torch.float64)
    metrics = evaluate(model, data, split, CrossEntropy(), place)
    outputs = model(data.eval_batch(split, torch.arange(num), torch.float64)[0])
    assert metrics["loss"] == pytest.approx(F.cross_entropy(outputs, split.labels).item(), abs=1e-12)
    assert round(metrics["accuracy"] * num) == int((outputs.argmax(1) == split.labels).sum())
    assert model.training  # modes are restored
    return metrics


@pytest.mark.parametrize("num", [1, 2, 7, EVAL_BATCH_SIZE + 25])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_mean_over_all_samples_at_any_world_size(ranks, world_size, num):
    results = ranks(world_size, check_exact, num)
    assert all(result == results[0] for result in results)
