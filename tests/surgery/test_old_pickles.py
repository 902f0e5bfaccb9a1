"""Whole modules that version 0.1.0 pickled are still read: a converted subclass, and a layer with its activation."""

from pathlib import Path

import torch

from syncbn import SyncBatchNorm, revert_sync_batchnorm
from tests.surgery.pickled_classes import Block, Doubled

PICKLED = Path(__file__).parents[1] / "data/v0.1.0/modules.pt"


def test_modules_pickled_by_0_1_0_compute_what_they_did_then():
    then = torch.load(PICKLED, weights_only=False)
    model = then["model"]
    assert [type(module).__name__ for module in model] == ["FusedBlock", "SyncDoubled", "SyncBatchNorm"]
    assert model[0].bn.activation == "relu"
    torch.testing.assert_close(model(then["input"]), then["output"], rtol=0, atol=1e-12)


def test_modules_pickled_by_0_1_0_get_their_original_classes_back():
    then = torch.load(PICKLED, weights_only=False)
    model = revert_sync_batchnorm(then["model"])
    assert [type(module) for module in model] == [Block, Doubled, torch.nn.BatchNorm2d]
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())
    torch.testing.assert_close(model(then["input"]), then["output"], rtol=0, atol=1e-12)
