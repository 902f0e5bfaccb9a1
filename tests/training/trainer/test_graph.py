"""Steps that are replayed from a graph train as eager ones do, bit for bit; what a graph would bake in shows.

The graph is a recording of operators (`tests.recording`), which repeats what a CUDA graph repeats.
"""

import copy
import shutil
from contextlib import nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.distributed.stopping import Stopped, StopRequest
from syncbn.training.optim.averages import WeightAverage
from syncbn.training.optim.update import Update
from syncbn.training.tracking.tracker import Tracker
from syncbn.training.trainer import trainer as trainer_module
from syncbn.training.trainer.build import build_components, context_for
from syncbn.training.trainer.capture import CAPTURES
from syncbn.training.trainer.deferred import DeferredResults
from syncbn.training.trainer.graph import GraphedSteps
from syncbn.training.trainer.trainer import Trainer
from tests.recording import RecordingCapture
from tests.training.jobs import compose_config, run_rank

# 40 training samples: steps of 12, 12, 12 and 4.
SMALL = ("data=synthetic", "data.num_samples=50", "data.size=8", "data.workers=0", "batch_size=12", "model.width=4",
         "model.stages=1", "tracker=none", "tracker.report=false", "log_every=7", "eval_every=99", "save.every=99",
         "duration=15", "ema=0.99", "clip_norm=0.5", "audit.level=off")  # fmt: skip


@cache
def composed(*overrides):
    small = (one for one in SMALL if "data=shapes" not in overrides or not one.startswith(("data=", "model.")))
    return compose_config(*small, *overrides)


def trained(directory, capture, *overrides, edit=None, device="cpu"):
    """A trainer after its run, on this rank.

    Args:
        edit: called with the trainer before it runs.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").touch()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    config = copy.deepcopy(composed(*overrides))
    context = context_for(config, RankContext(rank, world_size, torch.device(device), torch.float32))
    tracker = Tracker(config.tracker, directory, {}, active=context.is_first)
    trainer = Trainer(build_components(config, context, None), directory, tracker, StopRequest(), capture)
    if edit is not None:
        edit(trainer)
    trainer.run()
    tracker.close()
    return trainer


def state_of(trainer):
    """All that a checkpoint holds of the training."""
    names = ("model", "optimizer", "schedule", "scaler", "average", "totals")
    return {name: part.state_dict() for name, part in trainer.checkpoints.parts.items() if name in names}


def differ(one, other):
    """The names of the parts of two states that differ in any bit."""
    return [name for name, part in one.items() if not is_same(part, other[name])]


def is_same(one, other):
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The state of the same run without a graph, made once for each set of overrides."""
    made = {}

    def make(*overrides, edit=None):
        if (overrides, edit) not in made:
            directory = tmp_path_factory.mktemp("eager")
            made[overrides, edit] = copy.deepcopy(state_of(trained(directory, None, *overrides, edit=edit)))
        return made[overrides, edit]

    return make


def replayed(trainer):
    """The steps that were replayed, as their numbers in each graph."""
    return [recording.num_replays for recording in trainer.graphed._capture.recordings]


def test_a_graph_trains_as_without_it(tmp_path, eager):
    trainer = trained(tmp_path, RecordingCapture())
    assert differ(state_of(trainer), eager()) == []
    assert replayed(trainer) == [7]  # of 15: 3 are short, 3 watched, one comes first and one is captured


def with_dropout(trainer):
    trainer.model.head.register_forward_pre_hook(lambda _, inputs: F.dropout(inputs[0], 0.3))


def bake_rate(patch):
    patch.setattr(Update, "_rates_on_device", lambda self, numbers: nullcontext())


def bake_count(patch):
    update = WeightAverage.update
    patch.setattr(
        WeightAverage, "update", lambda self, model, left_out, step, share=None: update(self, model, left_out, step)
    )


def bake_seed(patch):
    seed, compute = trainer_module.seed_generators, Trainer._compute
    patch.setattr(trainer_module, "seed_generators", lambda key, device: keys.append((key, device)))
    keys = []

    def seeding(self, *args):
        seed(*keys[-1])
        return compute(self, *args)

    patch.setattr(Trainer, "_compute", seeding)


def keep_graph(patch):
    patch.setattr(GraphedSteps, "forget", lambda self: None)


def keep_batch(patch):
    patch.setattr(GraphedSteps, "_put", lambda *args: None)


FREEZE = ("freeze.a.match=backbone.stem", "freeze.a.start=5", "freeze.a.until=8")


@pytest.mark.parametrize(
    ("plant", "overrides", "edit", "where"),
    [
        (bake_rate, (), None, "optimizer"),
        (bake_count, (), None, "average"),
        (bake_seed, (), with_dropout, "model"),
        (keep_graph, FREEZE, None, "model"),
        (keep_batch, (), None, "model"),
    ],
)
def test_what_a_graph_would_bake_in_is_caught(tmp_path, monkeypatch, eager, plant, overrides, edit, where):
    expected = eager(*overrides, edit=edit)
    plant(monkeypatch)
    trainer = trained(tmp_path, RecordingCapture(), *overrides, edit=edit)
    assert sum(replayed(trainer)) > 0
    assert where in differ(state_of(trainer), expected)


def poisoned(trainer):
    """Two batches have pixels that are not finite, one of them in a step that is replayed."""
    micro_batches = trainer.loader.micro_batches

    def poison(sampler, seed, step):
        for images, labels in micro_batches(sampler, seed, step):
            yield (images / 0 if step in (5, 11) else images), labels

    trainer.loader.micro_batches = poison
    trainer.results = DeferredResults(torch.device("cpu"), lag=1)  # as on a GPU: a step later


def skipping(trainer):
    poisoned(trainer)
    trainer.config.on_nonfinite = "skip"


def stopping(trainer):
    poisoned(trainer)
    trainer.config.on_nonfinite = "stop"


ADAMW = ("optimizer=adamw", "accumulate=2", *FREEZE, "optimizer.on_unfreeze=reset")


@pytest.mark.parametrize(
    ("overrides", "edit"),
    [(FREEZE, None), (ADAMW, None), ((), with_dropout), ((), skipping), ((), stopping),
     pytest.param(("ema=null", "swa=6"), skipping, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_graph_trains_as_without_it_whatever_happens(tmp_path, eager, overrides, edit):
    trainer = trained(tmp_path, RecordingCapture(), *overrides, edit=edit)
    assert sum(replayed(trainer)) > 0
    assert differ(state_of(trainer), eager(*overrides, edit=edit)) == []


def asked_on_the_last_rank(trainer):
    """In step 4 the last rank is asked to stop, which the ranks learn of in the next step, a replayed one."""
    micro_batches = trainer.loader.micro_batches

    def asking(sampler, seed, step):
        yield from micro_batches(sampler, seed, step)
        trainer.stop.requested |= step == 4 and trainer.context.rank == trainer.context.world_size - 1

    trainer.loader.micro_batches = asking


def check_ranks_stop_together(directory):
    trainers = []

    def edit(trainer):
        trainers.append(trainer)
        asked_on_the_last_rank(trainer)

    for number, capture in enumerate((None, RecordingCapture())):
        with pytest.raises(Stopped) as stopped:
            trained(directory / f"{number}", capture, edit=edit)
        assert stopped.value.step == 6
    assert replayed(trainers[1]) == [3]
    assert differ(*map(state_of, trainers)) == []


# Everything at once: a short step at the end of an epoch, layers that freeze and unfreeze, a schedule, averages.
WHOLE = (*SMALL, "duration=50", "schedule.warmup=5", "freeze.a.match=backbone.stem", "freeze.a.start=18",
         "freeze.a.until=31", "log_every=9", "eval_every=20", "save.every=25", "save.keep=9",
         "bn.momentum=cumulative")  # fmt: skip


def check_whole_runs(cwd, *overrides):
    """Compares 50 steps without a graph and with one, from the beginning and resumed after 25."""
    made = []
    with mock.patch.dict(CAPTURES, {"cpu": lambda device: made.append(RecordingCapture()) or made[-1]}):
        common = (*WHOLE, *overrides)
        whole = run_rank(cwd, (*common, "run=whole"))
        from_start = run_rank(cwd, (*common, "graph=true", "run=start"))
        if not dist.is_initialized() or dist.get_rank() == 0:
            (cwd / "outputs/resumed/checkpoints").mkdir(parents=True)
            shutil.copy(whole / "checkpoints/step_00000025.pt", cwd / "outputs/resumed/checkpoints")
        if dist.is_initialized():
            dist.barrier()
        resumed = run_rank(cwd, (*common, "graph=true", "run=resumed"))
    assert [[recording.num_replays for recording in one.recordings] for one in made] == [[10, 7, 10], [2, 10]]
    # Statistics that differ between ranks are pooled in a checkpoint: with them no resumed run is the same to the bit.
    for run, steps in ((from_start, (25, 50)), (resumed, () if "bn.sync=false" in overrides else (50,))):
        for step in steps:
            one, other = (
                torch.load(path / f"checkpoints/step_{step:08d}.pt", weights_only=True) for path in (run, whole)
            )
            parts = one.keys() & {"model", "average", "optimizer", "schedule", "scaler", "totals"}
            assert differ({part: one[part] for part in parts}, other) == [], (run, step)


def test_ranks_replay_the_same_steps_and_stop_after_the_same_one(ranks, tmp_path):
    ranks(2, check_ranks_stop_together, tmp_path)


RUNS = [
    (1, ()),
    (2, ()),
    (3, ("accumulate=2",)),
    (2, ("precision=fp64", "optimizer=adamw")),
    (2, ("precision=bf16", "bn.fuse=true", "bn.memory=lean")),
    (2, ("bn.sync=false", "bn.momentum=null", "freeze.a.stats=false")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "overrides"), RUNS)
def test_a_run_with_graphs_is_the_run_without_them_to_the_bit(ranks, tmp_path, world_size, overrides):
    ranks(world_size, check_whole_runs, tmp_path, *overrides)


def test_the_key_graph_replays_steps(tmp_path, monkeypatch):
    capture = RecordingCapture()
    monkeypatch.setitem(CAPTURES, "cpu", lambda device: capture)
    run_rank(tmp_path, (*SMALL, "duration=6", "graph=true", "run=a"))
    assert [recording.num_replays for recording in capture.recordings] == [2]


SHAPES = ("data=shapes", "model=unet_small", "model.width=4", "model.depth=1", "data.ragged=0")
OTHERS = {
    "virtual": ("bn.sync=false", "bn.virtual_ranks=2"),
    "skip_nonfinite": ("bn.skip_nonfinite=true",),
    "smoothed": ("loss.label_smoothing=0.1", "loss.class_weights=balanced"),
    "groups": ("optimizer.groups.top.match=head", "optimizer.groups.top.lr_scale=0.5"),
    "dice": (*SHAPES, "loss=dice"),
    "ce_dice": (*SHAPES, "loss=ce_dice", "loss.class_weights=balanced"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_and_losses_are_captured_too(tmp_path, eager, name):
    trainer = trained(tmp_path, RecordingCapture(), *OTHERS[name])
    assert sum(replayed(trainer)) > 0
    assert differ(state_of(trainer), eager(*OTHERS[name])) == []
