"""A run that version 0.1.0 began goes on to the values that 0.1.0 itself reached.

tests/data/v0.1.0 holds its checkpoints after 8 and after 16 steps (and the best one, of step 8), written by

    python train.py run=v010 precision=fp64 data=synthetic data.num_samples=100 data.size=8 data.channels=1 data.shift=1
        data.flip=true model.width=2 model.stages=2 batch_size=8 duration=16 eval_every=8 save.every=8 save.keep=3
        log_every=4 ema=0.9 clip_norm=1.0 tracker=none freeze.stem.match=backbone.stem freeze.stem.until=12
        freeze.stem.weights=true

on torch 2.13: averaged weights, clipping, augmentation, and a freeze rule that ends between the two.
"""

import shutil
from pathlib import Path

import torch

from syncbn.training.checkpoint.files import read
from syncbn.training.config.parsing import flatten
from tests.training.jobs import run_rank

WRITTEN = Path(__file__).parents[2] / "data/v0.1.0"
OWN = {"config.run", "config.resume", "tracker.run"}  # of a run, not of its trajectory
# Keys that 0.1.0 did not have, and the value that computes as it did.
NEW = {"config.bn.skip_nonfinite": False, "config.early_stop": None, "config.optimizer.decay_norm_and_bias": True,
       "config.optimizer.groups": {}, "config.loss.class_weights": None, "config.data.mean": "auto",
       "config.data.std": "auto", "config.data.augment": {}, "config.data.sampler": "shuffled",
       "config.eval.path": None, "config.predict.path": None, "config.predict.batch_size": 32,
       "config.predict.flip": False, "config.graph": False, "config.tracker.examples": 12,
       "config.tracker.tensorboard": False, "config.swa": None, "config.bn.averaged": "running"}  # fmt: skip
DESCRIBED = {"data.image.size": [8, 8], "data.image.channels": 1, "data.image.fit": "crop", "data.image.range": None}


def go_on(cwd):
    """The content of the last checkpoint of a run that goes on from step 8."""
    # A checkpoint from elsewhere does not say whether a run is tracked (docs/security.md), so the command does.
    run_dir = run_rank(cwd, (f"resume={cwd / 'old/step_00000008.pt'}", "run=again", "tracker=none"))
    return read(run_dir / "checkpoints/step_00000016.pt", "resume")


def check_same_values(content):
    assert {*content.pop("parameter_groups")["rest"]} < content["model"].keys()  # which 0.1.0 did not store
    assert content["counters"].pop("macro_recall")  # nor this
    now, then = (dict(flatten(part)) for part in (content, read(WRITTEN / "step_00000016.pt", "resume")))
    new = NEW | DESCRIBED
    assert now.keys() == then.keys() | new.keys()
    assert {key: now[key] for key in new} == new
    for key in then.keys() - OWN:
        if isinstance(then[key], torch.Tensor):
            torch.testing.assert_close(
                now[key], then[key], rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
            )
        elif isinstance(then[key], float):
            assert abs(now[key] - then[key]) < 1e-10, key
        else:
            assert now[key] == then[key], key


def check_goes_on(cwd):
    check_same_values(go_on(cwd))


def test_a_checkpoint_of_0_1_0_goes_on_to_the_values_that_0_1_0_reached(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "old")
    check_goes_on(tmp_path)


def test_at_two_ranks_too(ranks, tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "old")
    ranks(2, check_goes_on, tmp_path)


def test_its_configuration_is_not_another_one_now(tmp_path):
    shutil.copytree(WRITTEN, tmp_path / "old")
    stored = read(WRITTEN / "step_00000008.pt", "resume")["config"]
    expected = dict(flatten({"config": stored})) | NEW
    expected |= {"config.run": "again", "config.resume": str(tmp_path / "old/step_00000008.pt")}
    assert dict(flatten({"config": go_on(tmp_path)["config"]})) == expected
