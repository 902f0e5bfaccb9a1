"""`bn.fuse=true`: the same run, with less to do."""

import math

import pytest
import torch
from torch import nn

from syncbn.training.checkpoint.files import read
from syncbn.training.models.build import build_network
from tests.training.jobs import compose_config, read_metrics

SMALL = ["data=synthetic", "data.num_samples=130", "data.size=8", "model.width=4", "precision=fp64", "duration=6",
         "batch_size=16", "log_every=1"]  # fmt: skip
FREEZE = ["freeze.a.match=backbone.stage1", "freeze.a.stats=true", "freeze.a.affine=true", "freeze.a.start=3"]

UNET = ["model=unet_small", "data=shapes", "model.depth=1", "loss.ignore_index=255"]


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], id="plain", marks=pytest.mark.slow),
        pytest.param(FREEZE, id="freeze plan"),
        pytest.param(UNET, id="unet", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_trajectory_is_that_of_the_operators_one_by_one(job, num_ranks, extra):
    if "data=shapes" in extra:
        small = [override for override in SMALL if not override.startswith("data")]
        overrides = [*small, *extra, "data.size=16"]
    else:
        overrides = [*SMALL, *extra]
    runs = [job(*overrides, f"bn.fuse={fuse}", f"run={fuse}", num_ranks=num_ranks) for fuse in ("false", "true")]
    losses = [[record["train/loss"] for record in read_metrics(run) if "train/loss" in record] for run in runs]
    assert len(losses[0]) >= 6
    for one, other in zip(*losses, strict=True):
        assert math.isclose(one, other, rel_tol=1e-9)


def checkpoint(run):
    return read(sorted((run / "checkpoints").glob("step*"))[-1], "load")


@pytest.mark.slow
def test_what_is_frozen_stays_and_the_checkpoint_has_the_same_keys(job):
    runs = [job(*SMALL, *FREEZE, f"bn.fuse={fuse}", f"run={fuse}") for fuse in ("false", "true")]
    contents = [checkpoint(run)["model"] for run in runs]
    assert list(contents[0]) == list(contents[1])
    torch.testing.assert_close(*contents, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_fused_run_is_resumed_audited_and_exported(job):
    fused = [*SMALL, "run=a", "bn.fuse=true", "bn.skip_nonfinite=true"]
    job(*fused)
    run = job(*fused, "duration=8")
    assert read_metrics(run)[-1]["step"] == 8
    job("task=audit", f"load={run}", "run=b")
    exported = job("task=export", "export.formats=[pt2,safetensors]", f"load={run}", "run=c")
    assert {"model.pt2", "model.safetensors"} < {path.name for path in (exported / "export").iterdir()}


def test_what_was_fused_and_what_was_left_is_logged(caplog):
    caplog.set_level("INFO")
    config = compose_config(*SMALL, "bn.fuse=true", "model.stages=2", "model.depth=1")
    build_network(config.model, config.bn, 1, 10)
    assert "bn.fuse: fused 5 of 6 batch normalizations" in caplog.text
    assert "left backbone.stage2.0.shortcut.bn: no activation that could be fused follows it" in caplog.text


class Leaky(nn.Sequential):
    """A network whose second layer can be lean."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 2, 3))  # fmt: skip


def test_lean_layers_are_logged_and_a_model_without_any_is_a_warning(caplog):
    caplog.set_level("INFO")
    config = compose_config(*SMALL, "bn.fuse=true", "bn.memory=lean")
    model = build_network({"_target_": "tests.training.models.test_fuse.Leaky"}, config.bn, 1, 2)
    assert [model[1].memory, model[4].memory] == ["default", "lean"]
    assert "bn.memory: 1 of 2 batch normalizations are lean" in caplog.text
    assert "bn.memory: keep their input: 1: its output does not tell what went into relu" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    build_network(config.model, config.bn, 1, 10)
    assert "WARNING" in [record.levelname for record in caplog.records if "are lean" in record.message]
