"""A key that the chosen task does not read is an error, and the table of who reads what has every key."""

from dataclasses import fields

import pytest

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.keys import READERS, TASKS, readers, require_no_sweep, require_readers
from syncbn.training.config.schema import Config
from syncbn.training.launch.explain import known_keys

ROOTS = [field.name for field in fields(Config)]


@pytest.mark.parametrize("key", ROOTS)
def test_the_table_has_every_root_key(key):
    assert key in READERS


def test_the_table_has_no_other_keys_and_no_other_tasks():
    assert READERS.keys() <= {*known_keys()}
    assert {task for tasks in READERS.values() for task in tasks} == {*TASKS}


def test_what_has_an_entry_of_its_own_is_read_by_fewer_tasks_than_what_it_lies_in():
    for key, tasks in READERS.items():
        assert len({*tasks}) == len(tasks) > 0
        if "." in key:
            assert {*tasks} < {*READERS[key.split(".")[0]]}, key


def test_a_key_below_another_is_read_by_the_same_tasks():
    assert readers("model.width") == READERS["model"]
    assert readers("save.every") == READERS["save"]
    assert readers("bn.momentum") == ("train", "audit", "parity")
    assert readers("nope.x") is None


@pytest.mark.parametrize(
    ("task", "override", "key"),
    [
        ("train", "load=outputs/a", "load"),
        ("train", "eval.weights=ema", "eval.weights"),
        ("train", "recalibrate.batches=3", "recalibrate.batches"),
        ("train", "export.formats=[pt2]", "export.formats"),
        ("train", "export={formats: [pt2]}", "export"),
        ("eval", "optimizer.lr=0.1", "optimizer.lr"),
        ("eval", "++duration=5ep", "duration"),
        ("eval", "freeze.mine.match=stem", "freeze.mine.match"),
        ("eval", "save.keep=1", "save.keep"),
        ("eval", "audit.level=error", "audit.level"),
        ("eval", "recalibrate.batches=3", "recalibrate.batches"),
        ("eval", "resume=none", "resume"),
        ("eval", "tracker.mode=online", "tracker.mode"),
        ("eval", "bn={eps: 1e-3, virtual_ranks: 4}", "bn.virtual_ranks"),
        ("eval", "~schedule", "schedule"),
        ("eval", "early_stop=5ep", "early_stop"),
        ("eval", "ema=null", "ema"),  # as trained or not, eval.weights says it
        ("recalibrate", "eval.precise_bn=10", "eval.precise_bn"),
        ("audit", "loss.label_smoothing=0.1", "loss.label_smoothing"),
        ("export", "batch_size=32", "batch_size"),
        ("export", "device=cuda", "device"),
        ("eval", "data.mean=imagenet", "data.mean"),  # the checkpoint has the numbers
        ("eval", "data.augment.crop.size=8", "data.augment.crop.size"),
        ("data", "data.sampler=balanced", "data.sampler"),
        ("data", "model.width=8", "model.width"),
        ("data", "load=outputs/a", "load"),
        ("parity", "precision=fp32", "precision"),
        ("parity", "load=outputs/a", "load"),
        ("train", "parity.steps=3", "parity.steps"),
    ],
)
def test_a_key_without_effect_is_an_error_that_names_the_task_and_those_that_read_it(task, override, key):
    tasks = ", ".join(readers(key))
    with pytest.raises(ConfigError, match=rf"^{key}: task={task} does not read it, only task={tasks}; "):
        require_readers(task, ["run=a", override])


@pytest.mark.parametrize(
    ("task", "override"),
    [
        ("train", "audit.level=error"),
        ("train", "init.backbone.path=outputs/a"),
        ("eval", "data.path=photos"),
        ("eval", "batch_size=512"),
        ("eval", "precision=fp64"),
        ("eval", "device=cpu"),
        ("eval", "output_dir=elsewhere"),
        ("eval", "model.width=8"),
        ("eval", "bn.eps=1e-3"),
        ("eval", "bn={eps: 1e-3}"),
        ("eval", "tracker=none"),
        ("eval", "+tracker.mode=disabled"),
        ("recalibrate", "freeze.mine.match=stem"),
        ("data", "duration=200"),
        ("parity", "parity.world_sizes=[1,4]"),
        ("parity", "bn.sync=false"),
        ("data", "debug=data"),
        ("eval", "hydra.verbose=true"),
        ("train", "experiment=pretrain"),
        ("no such task", "load=outputs/a"),
    ],
)
def test_a_key_with_an_effect_is_none(task, override):
    require_readers(task, [override])


def test_what_a_sweep_goes_over_is_given_too():
    with pytest.raises(ConfigError, match=r"^optimizer.lr: task=eval does not read it"):
        require_readers("eval", ["optimizer.lr=0.1,0.2"])


@pytest.mark.parametrize("override", ["run=a,b", "output_dir=a,b", "share=group,all", "debug=one_batch,overfit"])
def test_what_holds_for_all_jobs_of_a_multirun_has_one_value(override):
    keys = ("run", "output_dir", "share", "debug")
    with pytest.raises(ConfigError, match=rf"^{override.partition('=')[0]}: is the same for all jobs of a multirun"):
        require_no_sweep(["seed=1,2", override], keys)
    require_no_sweep(["seed=1,2", "trust=[a,b]", "run=a"], keys)
