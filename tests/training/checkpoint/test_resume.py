"""Going on with a run: the same trajectory, the same configuration, and no result that nobody measured."""

import json
import logging
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn

from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.files import StoredCheckpoint, write_atomically
from syncbn.training.checkpoint.resume import checkpoint_to_resume, merge_with_stored
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.parsing import to_dict
from syncbn.training.distributed.stopping import Stopped
from syncbn.training.models.resnet import ResnetSmall
from syncbn.training.tracking.tracker import cut_back
from syncbn.training.trainer.counters import Counters
from syncbn.training.trainer.trainer import Trainer
from syncbn.training.trainer.validation import Validation
from tests.training.images import save_image
from tests.training.jobs import OPTIMIZERS, compose_config, read_metrics, run_rank
from tests.training.trainer.test_train import load_last

SMALL = ["data=synthetic", "data.num_samples=130", "data.size=8", "model.width=4", "tracker=none", "batch_size=16"]


def without_speed(record):
    return {key: value for key, value in record.items() if key != "train/samples_per_second"}


def table_of(cwd):
    """Overrides for 130 images of nine classes that a table lists, three of each patient; a quarter is tested."""
    lines = ["image,diagnosis,patient"]
    for number in range(130):
        save_image(cwd / f"scans/{number}.png", number, size=(8, 8))
        lines.append(f"scans/{number}.png,{'abcdefghi'[number // 3 % 9]},p{number // 3}")
    (cwd / "study.csv").write_text("\n".join(lines))
    return ["data=table", f"data.path={cwd}/study.csv", "data.label=diagnosis", "data.group=patient", "data.fold=1",
            "data.folds=4", "data.size=8", "data.workers=0"]  # fmt: skip


SLOW = [(1, "sgd"), (2, "sgd"), (3, "sgd"), (4, "sgd"), (2, "adamw"), (2, "custom"), (4, "custom")]


@pytest.mark.parametrize(
    ("num_ranks", "optimizer"), [(1, "custom"), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_two_interruptions_are_bit_exact_with_everything_on(job, tmp_path, num_ranks, optimizer):
    # Schedule, averaged weights, accumulation with a ragged last window, transforms, momentum, groups of parameters;
    # balanced draws, some of them twice in an epoch; a sub-network that stays frozen and one that is released on the
    # way. Weights from a file, weights of classes. Images of a table, divided into folds by patient.
    donor = ResnetSmall(in_channels=3, num_classes=9, width=4, depth=1, stages=3)
    torch.save({"ema": {f"net.{name}": value for name, value in donor.state_dict().items()}}, tmp_path / "donor.pt")
    same = [*SMALL[3:], *table_of(tmp_path), *OPTIMIZERS[optimizer],
            "duration=16", "log_every=3", "eval_every=7", "accumulate=3", "early_stop=14",
            "swa=8" if optimizer == "sgd" else "ema=0.9",  # of the two interruptions one is before step 8
            "data.sampler=balanced", "data.augment.jiggle._target_=tests.training.transforms.Jiggle",
            "data.mean=0.1", "data.std=[1,1,2]",
            "optimizer.groups.top.match=[head,backbone.stem]", "optimizer.groups.top.lr_scale=0.5",
            "optimizer.groups.top.weight_decay=0.1", "optimizer.decay_norm_and_bias=false",
            "freeze.backbone.match=backbone.stage1", "freeze.backbone.weights=true",
            "freeze.early.match=backbone.stem", "freeze.early.until=9", "loss.class_weights=balanced",
            f"init.model.path={tmp_path}/donor.pt", "init.model.key=ema", "init.model.prefix=net",
            "init.model.skip=head"]  # fmt: skip
    whole = job(*same, "save.every=1", "save.keep=99", "run=whole", num_ranks=num_ranks)
    parts = tmp_path / "outputs/parts"
    shutil.copytree(whole, parts)
    # As if the job had been killed after these steps, before it could record more; at 9 the plan unfreezes.
    for cut in (5, 9) if num_ranks == 1 else (5, 12):
        for path in (parts / "checkpoints").glob("step_*.pt"):
            path.unlink()
        shutil.copyfile(whole / f"checkpoints/step_{cut:08d}.pt", parts / f"checkpoints/step_{cut:08d}.pt")
        (parts / "summary.json").unlink()
        job(*same, "save.every=1ep", "run=parts", num_ranks=num_ranks)
    expected, actual = load_last(whole), load_last(parts)
    assert actual["frozen"] == expected["frozen"]
    for part in ("model", "average", "optimizer", "schedule", "counters", "drift", "loss"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0, msg=part)
    assert actual.get("averaged_steps") == expected.get("averaged_steps")
    measured = [[without_speed(record) for record in read_metrics(run)] for run in (parts, whole)]
    assert measured[0] == measured[1]


class WithDropout(nn.Sequential):
    """A network that draws numbers in every step."""

    def __init__(self, in_channels, num_classes):
        body = nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        super().__init__(*body, nn.Dropout(0.5), nn.LazyLinear(num_classes))


def test_what_a_model_draws_after_a_resume_is_what_it_would_have_drawn(job, tmp_path):
    small = [option for option in SMALL if not option.startswith("model.")]
    same = [*small, "model=custom", f"model._target_={__name__}.WithDropout", "duration=6", "save.every=1",
            "save.keep=99"]  # fmt: skip
    whole = job(*same, "run=whole")
    parts = tmp_path / "outputs/parts/checkpoints"
    parts.mkdir(parents=True)
    shutil.copyfile(whole / "checkpoints/step_00000003.pt", parts / "step_00000003.pt")
    expected, actual = load_last(whole)["model"], load_last(job(*same, "run=parts"))["model"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), pytest.param(3, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_another_world_size_goes_on_along_the_same_trajectory(job, tmp_path, before, after):
    same = [*SMALL[3:], *table_of(tmp_path), "schedule=poly", "duration=16", "precision=fp64", "save.every=1",
            "save.keep=99", "log_every=1", "data.shift=1"]  # fmt: skip
    whole = job(*same, "run=whole", num_ranks=before)
    parts = tmp_path / "outputs/parts"
    (parts / "checkpoints").mkdir(parents=True)
    shutil.copyfile(whole / "checkpoints/step_00000005.pt", parts / "checkpoints/step_00000005.pt")
    job(*same, "run=parts", num_ranks=after)
    expected, actual = load_last(whole)["model"], load_last(parts)["model"]
    assert all((actual[key] - value).abs().max() < 1e-9 for key, value in expected.items())


def test_a_changed_key_is_an_error_that_names_it_and_unnamed_keys_are_the_runs(job, tmp_path):
    run = job(*SMALL, "duration=3", "optimizer.lr=0.2", "run=a")
    with pytest.raises(ConfigError, match=r"^optimizer.lr: the run that "):
        job(*SMALL, "optimizer.lr=0.3", "run=a")
    with pytest.raises(ConfigError, match=r"^data."):
        job("data=digits", "run=a")
    job("duration=5", "run=a")  # the stored configuration, longer
    assert load_last(run)["step"] == 5
    assert load_last(run)["config"]["optimizer"]["lr"] == 0.2
    assert load_last(run)["config"]["data"]["name"] == "synthetic"


def test_how_a_run_computes_is_its_own_configuration_s_business_named_again_or_not(job, monkeypatch):
    run = job(*SMALL, "duration=1", "precision=fp64", "deterministic=true", "channels_last=true", "run=a")
    seen = []
    train_step = Trainer._train_step

    def look(self, step):
        seen.append((self.context.dtype, self.context.channels_last, torch.are_deterministic_algorithms_enabled()))
        train_step(self, step)

    monkeypatch.setattr(Trainer, "_train_step", look)
    job("duration=2", "run=a")
    assert seen == [(torch.float64, True, True)]
    assert load_last(run)["model"]["head.weight"].dtype == torch.float64
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_checkpoint_is_read_and_hashed_once_at_a_resume(job, monkeypatch):
    job(*SMALL, "duration=2", "run=a")
    hashed = []
    monkeypatch.setattr(files, "digest", lambda content, digest=files.digest: hashed.append(content) or digest(content))
    job("duration=3", "run=a")
    at_start = [content["step"] for content in hashed if content["step"] == 2 and "optimizer" in content]
    assert at_start == [2]


def test_a_finished_run_says_what_it_said_and_uses_the_test_set_no_more(job, caplog):
    run = job(*SMALL, "duration=3", "run=a")
    before = read_metrics(run)
    for duration in (3, 2):  # a shorter one is over as well
        caplog.clear()
        with caplog.at_level(logging.INFO):
            job(*SMALL, f"duration={duration}", "run=a")
        assert "this run is finished" in caplog.text
        assert read_metrics(run) == before


def test_resume_none_in_a_directory_that_holds_a_run_is_refused(job, tmp_path):
    job(*SMALL, "duration=2", "run=a")
    with pytest.raises(ConfigError, match=r"^resume: "):
        job(*SMALL, "duration=2", "run=a", "resume=none")


def test_a_run_can_go_on_from_another_runs_checkpoint_or_directory(job, tmp_path):
    first = job(*SMALL, "duration=10", "run=a")
    second = job(*SMALL, "duration=11", f"resume={first}", "run=b")
    assert load_last(second)["step"] == 11
    with pytest.raises(ConfigError, match=r"^resume: expected a checkpoint, found no file"):
        job(*SMALL, "run=c", "resume=nowhere.pt")


def test_another_shape_is_one_message(job, tmp_path):
    run = job(*SMALL, "duration=2", "run=a")
    with pytest.raises(ConfigError, match=r"^load: "):
        job("task=eval", f"load={run}", "model.width=8")


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("options", [[], pytest.param(["ema=0.8"], marks=pytest.mark.slow)], ids=str)
def test_eval_prints_the_numbers_of_the_run_bit_for_bit(job, tmp_path, num_ranks, options):
    run = job(*SMALL, *options, "duration=20", "eval_every=3", "run=a", num_ranks=num_ranks)
    told = json.loads((run / "summary.json").read_text())["metrics"]
    [again] = read_metrics(job("task=eval", f"load={run}", "run=b", num_ranks=num_ranks))
    names = ("val/accuracy", "val/loss", "test/accuracy", "test/loss")
    assert {name: again[name] for name in names} == {name: told[name] for name in names}


def test_eval_of_a_checkpoint_takes_the_averaged_weights_as_the_run_did(job, tmp_path):
    run = job(*SMALL, "ema=0.8", "duration=6", "eval_every=6", "run=a")
    [told] = [record for record in read_metrics(run) if "val/loss" in record]
    [again] = read_metrics(job("task=eval", f"load={run / 'checkpoints/step_00000006.pt'}", "run=b"))
    assert again["val/loss"] == told["val/loss"]


def test_eval_applies_overrides_to_the_stored_configuration(job, tmp_path):
    run = job(*SMALL, "duration=2", "run=a")
    noisy = job("task=eval", f"load={run}", "data.noise=3.0", "run=noisy")
    same = job("task=eval", f"load={run}", "run=same")
    assert read_metrics(noisy)[-1]["val/loss"] != read_metrics(same)[-1]["val/loss"]
    with pytest.raises(ConfigError, match=r"^data: comes from load here"):
        job("task=eval", f"load={run}", "data=digits")
    with pytest.raises(ConfigError, match=r"^run: "):
        job("task=eval", f"load={run}", "run=a")


def test_records_after_the_checkpoint_are_cut_and_half_a_line_too(job, tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "train/loss": 1.0}, {"step": 2, "val/loss": 1.0}, {"step": 3}, {"step": 2, "test/loss": 0.1}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 1, "tra')
    cut_back(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:2]


def check_each_in_its_own_directory(cwd):
    cwd = cwd / f"machine{dist.get_rank()}"
    cwd.mkdir()
    with pytest.raises(ConfigError, match=r"^run: rank 1 does not see the directory .* has to be on storage that all"):
        run_rank(cwd, (*SMALL, "duration=2", "run=a"))
    return [path.name for path in cwd.rglob("*.pt")]


def test_machines_that_do_not_share_the_run_directory_are_told_so(ranks, tmp_path):
    assert ranks(2, check_each_in_its_own_directory, tmp_path) == [[], []]


def test_a_signal_during_the_final_test_leaves_the_state_that_training_ended_with(job, tmp_path, monkeypatch):
    same = [*SMALL, "duration=9", "eval_every=3", "optimizer.lr=0.5"]
    whole = job(*same, "run=whole")
    original = Validation._evaluate

    def interrupted(self, model, split, *others):
        self._stop.requested |= split is self._components.data.test
        return original(self, model, split, *others)

    monkeypatch.setattr(Validation, "_evaluate", interrupted)
    monkeypatch.setattr(Counters, "is_best", lambda self, *_: self.step == 3 and setattr(self, "best_step", 3) is None)
    with pytest.raises(Stopped):
        job(*same, "run=parts")
    expected, actual = load_last(whole)["model"], load_last(tmp_path / "outputs/parts")["model"]
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_going_back_to_an_earlier_step_takes_neither_later_checkpoints_nor_the_later_best(job, tmp_path):
    run = job(*SMALL, "duration=12", "save.every=1", "save.keep=99", "eval_every=6", "run=a")
    again = job(*SMALL, "duration=12", "save.every=1", "save.keep=99", "eval_every=6", "run=b")
    job("duration=6", f"resume={run / 'checkpoints/step_00000004.pt'}", "run=a")
    assert load_last(run)["step"] == 6
    assert torch.load(run / "checkpoints/best.pt", weights_only=True)["step"] == 6  # not that of step 12
    for key, value in torch.load(again / "checkpoints/step_00000006.pt", weights_only=True)["model"].items():
        assert torch.equal(load_last(run)["model"][key], value)


@pytest.mark.slow
def test_without_synchronization_weights_resume_bit_for_bit_too(job, tmp_path):
    same = [*SMALL, "bn.sync=false", "duration=9", "save.every=1", "save.keep=99"]
    whole = job(*same, "run=whole", num_ranks=2)
    parts = tmp_path / "outputs/parts/checkpoints"
    parts.mkdir(parents=True)
    shutil.copyfile(whole / "checkpoints/step_00000004.pt", parts / "step_00000004.pt")
    expected, actual = load_last(whole)["model"], load_last(job(*same, "run=parts", num_ranks=2))["model"]
    assert all(torch.equal(actual[key], value) for key, value in expected.items() if "running" not in key)


def test_a_damaged_best_model_is_passed_over_and_found_anew(job, tmp_path, caplog):
    run = job(*SMALL, "duration=4", "eval_every=2", "run=a")
    best = run / "checkpoints/best.pt"
    best.write_bytes(best.read_bytes()[:-100])
    job("duration=6", "run=a")
    assert "best.pt' is not a readable checkpoint" in caplog.text
    assert torch.load(best, weights_only=True)["step"] in (4, 6)
    assert "test/accuracy" in read_metrics(run)[-1]


def test_a_run_none_of_whose_checkpoints_is_intact_is_not_begun_anew(job, tmp_path):
    run = job(*SMALL, "duration=2", "run=a")
    (run / "checkpoints/step_00000002.pt").write_bytes(b"half of it")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"^run: none of the 1 checkpoints in .*a/checkpoints is intact; choose"):
        job(*SMALL, "duration=4", "run=a")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_malformed_checkpoint_is_passed_over_for_an_older_one(job, caplog):
    run = job(*SMALL, "duration=4", "save.every=2", "run=a")
    newest = run / "checkpoints/step_00000004.pt"
    content = files.read(newest, "resume")
    write_atomically(newest, content | {"optimizer": None})
    (run / "summary.json").unlink()
    job("duration=6", "run=a")
    assert "step_00000004.pt' is malformed: optimizer is null, expected a mapping; it is passed over" in caplog.text
    assert load_last(run)["step"] == 6
    assert (run / "checkpoints/step_00000004.pt.abandoned").exists()  # nothing is lost


@pytest.mark.parametrize("content", ["{", "[1]", '{"step": 3}', '{"step": 3, "metrics": {"a": null}}', "\x00"])
def test_a_damaged_summary_is_passed_over_with_a_warning(job, caplog, content):
    run = job(*SMALL, "duration=3", "run=a")
    (run / "summary.json").write_text(content)
    job("run=a")
    assert "summary.json" in caplog.text
    assert "it is passed over" in caplog.text
    assert json.loads((run / "summary.json").read_text())["step"] == 3


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", pytest.param('{"a": 1}', marks=pytest.mark.slow), pytest.param("\xff", marks=pytest.mark.slow)],
)
def test_damaged_class_names_are_one_message_that_names_the_file(job, content):
    run = job(*SMALL, "duration=1", "run=a")
    (run / "classes.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^run: .*a/classes\.json (is damaged|is no list of class names)"):
        job("run=a")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "summary.json", "classes.json", "checkpoints"])
def test_what_is_no_file_where_a_run_writes_one_is_an_error_and_is_not_waited_for(job, tmp_path, name):
    path = tmp_path / "outputs/a" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=rf"^run: .*a/{name} is no (regular file|directory)"):
        job(*SMALL, "duration=1", "run=a")


def test_damaged_records_are_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b"[1]", b'{"step": null}', b'{"loss": 1}', b"\xff", b"[" * 100_000, b'{"step": 2}']
    path.write_bytes(b"\n".join(lines))
    cut_back(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert "metrics.jsonl: 5 damaged line(s) are left out" in caplog.text


def test_a_link_to_itself_is_no_checkpoint(job, tmp_path):
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    with pytest.raises(ConfigError, match=r"^resume: .*'loop\.pt' cannot be reached"):
        job(*SMALL, "duration=1", "resume=loop.pt", "run=a")
    run = job(*SMALL, "duration=1", "run=a")
    job("resume=loop.pt", "run=a")  # it has checkpoints of its own by now
    assert load_last(run)["step"] == 1


def check_foreign_file(cwd, path):
    with pytest.raises(ConfigError, match=r"^resume: '.*state\.pt' is not a checkpoint of a run"):
        run_rank(cwd, (*SMALL, f"resume={path}", "run=a"))
    with pytest.raises(ConfigError, match=r"^load: '.*state\.pt' is not a checkpoint of a run"):
        run_rank(cwd, ("task=eval", f"load={path}", "run=b"))


def test_a_foreign_state_dict_is_one_message_on_every_rank(ranks, tmp_path):
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "state.pt")
    ranks(2, check_foreign_file, tmp_path, tmp_path / "state.pt")


def check_only_one_can_read(cwd, path):
    if dist.get_rank() == 1:
        path = path.with_name("nowhere.pt")
    with pytest.raises(ConfigError, match=r"^resume: "):
        run_rank(cwd, (*SMALL, f"resume={path}", "run=a"))


def test_a_file_that_one_rank_cannot_read_stops_every_rank(ranks, tmp_path):
    ranks(2, check_only_one_can_read, tmp_path, stored_run(tmp_path / "other"))


def test_after_a_restart_a_run_goes_on_whatever_it_began_with(job, tmp_path, monkeypatch):
    first = job(*SMALL, "duration=2", "run=first")
    own = stored_run(tmp_path / "own")
    for resume in ("none", str(first), str(first / "checkpoints/step_00000002.pt")):
        config = compose_config(f"resume={resume}")
        with monkeypatch.context() as restarted:
            restarted.setenv("TORCHELASTIC_RESTART_COUNT", "1")
            assert checkpoint_to_resume(config, tmp_path / "own").path == own
    # Started again by hand with another run's checkpoint: that was where it began.
    assert checkpoint_to_resume(config, tmp_path / "own").path == own
    assert checkpoint_to_resume(config, tmp_path / "fresh").path == first / "checkpoints/step_00000002.pt"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["bn.sync=false"], ["bn.group=1"]], ids=str)
def test_how_often_a_run_is_saved_does_not_change_it(job, tmp_path, options):
    same = [*SMALL, *options, "duration=9", "eval_every=9"]
    rarely, often = (job(*same, f"save.every={n}", f"run=n{n}", num_ranks=2) for n in (50, 1))
    assert [without_speed(record) for record in read_metrics(rarely)] == [
        without_speed(record) for record in read_metrics(often)
    ]
    torch.testing.assert_close(load_last(rarely)["model"], load_last(often)["model"], rtol=0, atol=0)


def stored_run(directory, *overrides):
    config = compose_config(*overrides)
    path = directory / "checkpoints/step_00000007.pt"
    directory.mkdir(exist_ok=True)
    write_atomically(path, {"step": 7, "config": to_dict(config), "model": {}})
    return path


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["seed=1"], "seed"),
        (["model.width=8"], "model.width"),
        (["freeze=backbone"], "freeze.backbone.affine"),
        (["++freeze.mine.match=head"], "freeze.mine.match"),
        (["data=synthetic"], "data.channels"),
        (["bn.momentum=0.01"], "bn.momentum"),
        (["optimizer.groups.a.match=head"], "optimizer.groups.a.match"),
        (["optimizer.decay_norm_and_bias=false"], "optimizer.decay_norm_and_bias"),
        (["optimizer=adamw"], "optimizer.betas"),
        (["schedule=poly"], "schedule.name"),
    ],
)
def test_what_may_not_change_is_named(job, tmp_path, overrides, key):
    path = stored_run(tmp_path)
    with pytest.raises(ConfigError, match=f"^{key}: the run that"):
        merge_with_stored(compose_config(*overrides), StoredCheckpoint.read(path, "resume"), overrides)


def test_early_stop_ends_a_run_that_counts_as_finished_until_it_may_go_on(job, monkeypatch, caplog):
    monkeypatch.setattr(Counters, "is_best", lambda self, *_: self.step == 3 and setattr(self, "best_step", 3) is None)
    same = [*SMALL, "eval_every=3", "run=a"]
    with caplog.at_level(logging.INFO):
        run = job(*same, "duration=15", "early_stop=5")
    assert "no validation was better than that of step 3 for early_stop=5: training ends at step 9" in caplog.text
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["step"], summary["stopped"], load_last(run)["step"]) == (9, True, 9)
    before = read_metrics(run)
    monkeypatch.setattr(Trainer, "run", None)  # it has finished
    job(*same, "duration=15")
    monkeypatch.undo()
    assert read_metrics(run) == before
    job(*same, "duration=11", "early_stop=null")
    assert load_last(run)["step"] == 11


def test_what_may_change_is_taken_and_the_rest_is_the_runs(job, tmp_path):
    path = stored_run(tmp_path, "seed=5", "freeze=backbone")
    overrides = ["duration=9ep", "save.every=1ep", "tracker=none", "log_every=7"]
    merged = merge_with_stored(compose_config(*overrides), StoredCheckpoint.read(path, "resume"), overrides)
    assert (merged.seed, merged.duration, merged.save.every, merged.tracker.mode) == (5, "9ep", "1ep", "disabled")
    assert list(merged.freeze) == ["backbone"]
    assert checkpoint_to_resume(compose_config("resume=auto"), tmp_path).path == path


@pytest.mark.parametrize("read", [files.newest, files.read_best_or_newest])
def test_a_run_that_belongs_to_somebody_else_is_one_line(tmp_path, read):
    run = tmp_path / "private"
    (run / "checkpoints").mkdir(parents=True)
    tmp_path.parent.chmod(0o711)
    tmp_path.chmod(0o711)
    run.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # whom permissions hold for
    try:
        with pytest.raises(ConfigError, match=r"^load: .*(permission denied|cannot be reached)"):
            assert read(run, "load")
    finally:
        if is_root:
            os.seteuid(0)
        run.chmod(0o700)


def test_a_checkpoint_from_elsewhere_does_not_decide_whether_the_run_is_uploaded(job, tmp_path):
    first = job(*SMALL, "duration=1", "run=first")
    [path] = (first / "checkpoints").glob("step_*.pt")
    content = files.read(path, "resume")
    content["config"]["tracker"]["mode"] = "online"
    write_atomically(path, content)
    without_tracker = [override for override in SMALL if override != "tracker=none"]  # so that none is given
    second = job(*without_tracker, "duration=2", "run=second", f"resume={path}")
    assert OmegaConf.load(second / "config.yaml").tracker.mode == "offline"
