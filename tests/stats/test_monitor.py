"""What a monitor reads is what the layers hold."""

import torch
from torch import nn

from syncbn import Monitor, SyncBatchNorm


def test_a_snapshot_holds_every_layer_by_name():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), SyncBatchNorm(3), nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    model(torch.randn(4, 1, 8, 8))
    snapshot = Monitor(model).snapshot()
    assert list(snapshot) == ["1", "2.0"]
    assert torch.equal(snapshot["1"].running_var, model[1].running_var.double())
    assert torch.equal(snapshot["1"].weight, model[1].weight.detach().double())
    assert snapshot["2.0"].weight is None


def test_scalars_count_dead_channels_and_show_switches():
    layer = SyncBatchNorm(4).freeze(affine=False)
    with torch.no_grad():
        layer.weight[0] = 1e-4
        layer.running_var[1] = 0.0
    scalars = Monitor(nn.Sequential(layer)).snapshot()["0"].scalars()
    assert scalars["dead_channels"] == 0.5
    assert (scalars["stats_frozen"], scalars["affine_frozen"]) == (1.0, 0.0)


def test_a_model_without_batch_normalization_has_an_empty_snapshot():
    assert Monitor(nn.Linear(2, 2)).snapshot() == {}
