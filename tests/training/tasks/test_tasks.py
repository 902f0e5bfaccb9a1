"""What is done with a run that is over: evaluated, recalibrated, exported; the same at any number of ranks."""

import json
import shutil
import sys
from importlib import util
from unittest.mock import patch

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from syncbn import precise_bn, revert_sync_batchnorm
from syncbn.training.checkpoint import files
from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data.registry import load_data as load_data
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.distributed.world import rank, world_size
from syncbn.training.tasks import export, export_formats, recalibrate
from syncbn.training.tasks.loaded import load_run
from tests.training.jobs import compose_config, read_metrics, run_rank, start

SLOW = pytest.mark.slow
SMALL = ("data=synthetic", "data.num_samples=125", "data.size=6", "model.width=4", "batch_size=24", "tracker=none")
TRAIN = (*SMALL, "duration=6", "eval_every=2", "save.every=2", "precision=fp64", "data.shift=1", "optimizer.lr=0.02")
TRUST = "trust=[mine_of_tasks.*]"
MINE = """
import torch
from torch import nn
from syncbn import SyncBatchNorm

class Leaky(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x))

class Refused(nn.BatchNorm2d):
    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return torch.native_batch_norm(x, self.weight, self.bias, *statistics, self.training, 0.1, self.eps)[0]

class Net(nn.Module):
    def __init__(self, kind="Leaky", last="BatchNorm1d"):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), globals()[kind](4)
        self.last = SyncBatchNorm(4) if last == "SyncBatchNorm" else nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.last(self.bn(self.conv(x)).mean((2, 3))))

class Two(Net):
    def forward(self, x):
        return {"out": super().forward(x)}

class Fixed(Net):
    def forward(self, x):
        return super().forward(x) if len(x) != 1 else super().forward(x) + 1
"""


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A run with averaged weights, in float64."""
    return run_rank(tmp_path_factory.mktemp("averaged"), (*TRAIN, "ema=0.5", "bn.averaged=running", "run=averaged"))


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """A module `mine_of_tasks` with models of a user's own."""
    (tmp_path / "mine_of_tasks.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine_of_tasks", None)


def read(path):
    return torch.load(path, weights_only=True)


def last_metrics(run):
    return read_metrics(run)[-1]


def is_equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


# Evaluation


def test_eval_takes_the_weights_that_are_asked_for(job, averaged):
    last = averaged / "checkpoints/step_00000006.pt"
    found = {
        weights: last_metrics(job("task=eval", f"load={last}", f"eval.weights={weights}", f"run={weights}"))
        for weights in ("auto", "raw", "ema")
    }
    assert found["auto"] == found["ema"] != found["raw"]
    recorded = [record["val/loss"] for record in read_metrics(averaged) if "val/loss" in record]
    assert found["ema"]["val/loss"] == pytest.approx(recorded[-1], abs=1e-12)


def test_weights_that_a_checkpoint_has_not_are_an_error(job, averaged):
    with pytest.raises(ConfigError, match=r"eval.weights=raw: .*best.pt holds the averaged weights alone; load"):
        job("task=eval", f"load={averaged}", "eval.weights=raw", "run=b")
    plain = job(*TRAIN, "run=plain")
    with pytest.raises(ConfigError, match=r"eval.weights=ema: .*best.pt holds no averaged weights"):
        job("task=eval", f"load={plain}", "eval.weights=ema", "run=c")


def test_eval_reports_metrics_before_and_after_precise_bn_and_writes_no_checkpoint(job, averaged, tmp_path):
    run = job("task=eval", f"load={averaged}", "eval.precise_bn=5", "run=b")
    recalibrated = job("task=recalibrate", f"load={averaged}", "run=r")
    both, (before,), (after,) = (
        last_metrics(run),
        read_metrics(job("task=eval", f"load={averaged}", "run=c")),
        read_metrics(job("task=eval", f"load={recalibrated}", "run=d")),
    )
    for name in ("val/accuracy", "val/loss", "test/accuracy", "test/loss"):
        assert both[name] == before[name]
        assert both[f"precise/{name}"] == after[name]
    assert both["precise/val/loss"] != both["val/loss"]
    assert not list(run.rglob("*.pt"))


def test_keys_of_a_task_come_from_its_own_command_line(job, averaged):
    recalibrated = job("task=recalibrate", f"load={averaged}", "recalibrate.batches=1", "eval.precise_bn=1", "run=r")
    assert read(recalibrated / "recalibrated.pt")["config"]["eval"]["precise_bn"] == 1
    assert "precise/val/loss" not in last_metrics(job("task=eval", f"load={recalibrated}", "run=e"))


def test_a_task_takes_sub_networks_of_other_runs_and_forgets_those_of_the_training(job, averaged, capsys):
    tuned = job(*TRAIN, f"init.backbone.path={averaged}", "freeze=backbone", "seed=1", "run=tuned")
    first, other = job(*TRAIN, "run=first"), job(*TRAIN, "seed=1", "run=other")
    own, mixed = (
        read(job("task=recalibrate", f"load={first}", "recalibrate.batches=1", *init, f"run={run}") / "recalibrated.pt")
        for run, init in (("own", ()), ("mixed", (f"init.backbone.path={other}",)))
    )
    weights = [key for key in own["model"] if "running" not in key and "tracked" not in key]
    backbone = read(other / "checkpoints/best.pt")["model"]
    assert all(torch.equal(mixed["model"][key], backbone[key]) for key in weights if key.startswith("backbone."))
    assert all(torch.equal(mixed["model"][key], own["model"][key]) for key in weights if key.startswith("head."))
    assert f"backbone of {other}" in capsys.readouterr().out.replace("\n", "")
    again = job("task=eval", f"load={tuned}", "run=again")  # by what it is, not by where it came from
    recorded = [record["val/loss"] for record in read_metrics(tuned) if "val/loss" in record]
    assert last_metrics(again)["val/loss"] in [pytest.approx(value, abs=1e-12) for value in recorded]
    with pytest.raises(ConfigError, match=r"init.backbone.path: .*nope"):
        job("task=eval", f"load={first}", "init.backbone.path=nope", "run=x")


# Recalibration


def batches_of_one_epoch(loaded):
    """What the documentation says is fed: global batches of the first epoch's order, images without augmentation."""
    sampler = Sampler(len(loaded.data.train), loaded.config.batch_size, 1, loaded.config.seed, 0, 1)
    for step in range(sampler.steps_per_epoch):
        yield loaded.data.eval_batch(loaded.data.train, sampler.samples(step, 0), torch.float64)[0]


def recalibrated_state(averaged, cwd, num_batches, accumulate):
    """The state that this rank would write, in float64."""
    config = compose_config("task=recalibrate", f"load={averaged}")
    loaded = load_run(config, cwd / "elsewhere", RankContext(rank(), world_size(), torch.device("cpu"), torch.float32))
    loaded.config.accumulate = accumulate
    recalibrate.recalibrate(loaded, num_batches)
    return loaded.model.state_dict()


@pytest.mark.parametrize(
    ("num_batches", "accumulate"),
    [pytest.param(None, 1, marks=pytest.mark.slow), (2, 1), pytest.param(99, 5, marks=pytest.mark.slow)],
)
def test_population_statistics_are_the_same_bits_on_every_rank_and_the_same_for_any_cut(
    ranks, averaged, tmp_path, num_batches, accumulate
):
    # 100 samples in batches of 24: the last has 4, so with micro-batches some ranks have none.
    alone = recalibrated_state(averaged, tmp_path, num_batches, accumulate)
    before = read(averaged / "checkpoints/best.pt")["model"]
    assert not torch.equal(alone["backbone.stem.bn.running_mean"], before["backbone.stem.bn.running_mean"])
    for number in (2, 3):
        states = ranks(number, recalibrated_state, averaged, tmp_path, num_batches, accumulate)
        assert all(is_equal(other, states[0]) for other in states[1:])
        torch.testing.assert_close(states[0], alone, rtol=1e-12, atol=1e-12)


def test_recalibration_is_precise_bn_of_the_averaged_weights_over_the_training_set(job, averaged, tmp_path):
    run = job("task=recalibrate", f"load={averaged}", "run=r", num_ranks=2)
    written, best = read(run / "recalibrated.pt"), read(averaged / "checkpoints/best.pt")
    assert (written["step"], written["weights"]) == (best["step"], "ema")
    context = RankContext(0, 1, torch.device("cpu"), torch.float32)
    loaded = load_run(compose_config("task=eval", f"load={averaged}"), tmp_path / "elsewhere", context)
    precise_bn(loaded.model, batches_of_one_epoch(loaded))
    torch.testing.assert_close(written["model"], loaded.model.state_dict(), rtol=1e-12, atol=1e-12)
    for key, value in best["model"].items():
        assert torch.equal(written["model"][key], value) != key.endswith(("running_mean", "running_var")), key


@pytest.mark.parametrize("num_ranks", [2, pytest.param(1, marks=SLOW)])
def test_a_run_ends_with_the_population_statistics_of_its_averaged_weights(job, averaged, tmp_path, num_ranks):
    # It goes on from where it ended, whatever it had then, so that the end alone is done again.
    for path in averaged.rglob("*.*"):
        if path.is_file() and path.name != "summary.json":
            copy = tmp_path / "outputs/again" / path.relative_to(averaged)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    again = job("run=again", "bn.averaged=population", num_ranks=num_ranks)
    recalibrated = job("task=recalibrate", f"load={averaged}", "run=r")
    ended, before = (read(path / "checkpoints/best.pt") for path in (again, averaged))
    torch.testing.assert_close(ended["model"], read(recalibrated / "recalibrated.pt")["model"], rtol=1e-12, atol=1e-12)
    assert ended["step"] == before["step"]
    measured = json.loads((again / "summary.json").read_text())["metrics"]
    expected = last_metrics(recalibrated)
    assert measured["val/loss"] == pytest.approx(expected["precise/val/loss"], abs=1e-12)
    assert measured["val/loss"] != pytest.approx(expected["val/loss"], abs=1e-6)


def test_recalibration_tells_metrics_before_and_after_and_the_drift_of_each_layer(job, averaged):
    run = job("task=recalibrate", f"load={averaged}", "run=r")
    metrics = last_metrics(run)
    assert {"val/loss", "precise/val/loss", "drift/backbone.stem.bn"} <= metrics.keys()
    assert not any("test" in name for name in metrics)  # what to keep is for validation to say
    before, after = (read(path)["model"] for path in (averaged / "checkpoints/best.pt", run / "recalibrated.pt"))
    mean, var = (before[f"backbone.stem.bn.{name}"] for name in ("running_mean", "running_var"))
    moved = ((after["backbone.stem.bn.running_mean"] - mean).abs() / (var + 1e-5).sqrt()).max()
    assert metrics["drift/backbone.stem.bn"] == pytest.approx(float(moved), rel=1e-9)


def test_load_and_init_take_what_was_recalibrated(job, averaged):
    run = job("task=recalibrate", f"load={averaged}", "run=r")
    written = read(run / "recalibrated.pt")["model"]
    for path in (run, run / "recalibrated.pt"):
        tuned = job(*TRAIN, f"init.backbone.path={path}", "freeze=backbone", f"run=tuned-{path.name}")
        state = read(tuned / "checkpoints/best.pt")["model"]
        assert torch.equal(state["backbone.stem.bn.running_mean"], written["backbone.stem.bn.running_mean"])


def test_frozen_statistics_are_not_recalibrated(job, averaged):
    frozen = job(*TRAIN, f"init.backbone.path={averaged}", "freeze.a.match=backbone.stem", "run=frozen")
    run = job("task=recalibrate", f"load={frozen}", "run=r", num_ranks=2)
    before, after = (read(path)["model"] for path in (frozen / "checkpoints/best.pt", run / "recalibrated.pt"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not any(key.startswith("backbone.stem.") for key in moved)


def test_a_model_without_statistics_that_may_move_is_an_error(job, averaged):
    frozen = job(*TRAIN, f"init.backbone.path={averaged}", "freeze=backbone", "run=frozen")
    with pytest.raises(ConfigError, match="load: the model has no batch normalization with running statistics"):
        job("task=recalibrate", f"load={frozen}", "run=r")


@pytest.mark.parametrize("bn", [pytest.param("bn.sync=false", marks=pytest.mark.slow), "bn.group=1"])
def test_local_batch_normalization_is_recalibrated_over_the_world_too(job, bn):
    run = job(*TRAIN, bn, "run=a", num_ranks=2)
    alone, pair = (job("task=recalibrate", f"load={run}", f"run=r{n}", num_ranks=n) for n in (1, 2))
    torch.testing.assert_close(
        *(read(path / "recalibrated.pt")["model"] for path in (alone, pair)), rtol=1e-12, atol=1e-12
    )


def check_several_ranks_are_refused(cwd, run):
    with pytest.raises(ConfigError, match=r"bn is a Refused whose own behaviour would be lost: .*; use one rank"):
        run_rank(cwd, ("task=recalibrate", f"load={run}", TRUST, "run=r"))


def test_a_layer_that_cannot_be_synchronized_is_recalibrated_on_one_rank_alone(job, ranks, own_modules, tmp_path):
    model = ("model=custom", "model._target_=mine_of_tasks.Net", "+model.kind=Refused", "bn.sync=false")
    trained = job(*(o for o in TRAIN if not o.startswith("model.")), *model, "run=a")
    ranks(2, check_several_ranks_are_refused, tmp_path, trained)
    run = job("task=recalibrate", f"load={trained}", TRUST, "run=r")
    before, after = (read(path)["model"] for path in (trained / "checkpoints/best.pt", run / "recalibrated.pt"))
    assert not torch.equal(before["bn.running_mean"], after["bn.running_mean"])


def test_outputs_that_are_not_finite_are_not_exported(job, averaged, tmp_path):
    checkpoint = read(averaged / "checkpoints/best.pt")
    checkpoint["model"]["head.bias"][0] = torch.inf
    del checkpoint[files.DIGEST]
    files.write_atomically(tmp_path / "infinite.pt", checkpoint)
    with pytest.raises(ConfigError, match=r"infinite.pt on validation samples are not finite"):
        job("task=export", f"load={tmp_path / 'infinite.pt'}", "run=x")


def test_statistics_that_are_not_finite_are_not_written(job, averaged, monkeypatch, tmp_path):
    def poisoned(config):
        data = load_data(config)
        data.train.images[3, 0, 0, 0] = torch.nan
        return data

    monkeypatch.setattr("syncbn.training.tasks.loaded.registry.load_data", poisoned)
    with pytest.raises(TrainingError, match=r"the statistics of backbone.stem.bn are not finite"):
        job("task=recalibrate", f"load={averaged}", "run=r")
    assert not (tmp_path / "outputs/r/recalibrated.pt").exists()


@pytest.mark.parametrize(
    "task",
    ["eval", pytest.param("recalibrate", marks=SLOW), pytest.param("export", marks=SLOW)],
)
def test_what_is_loaded_is_never_changed(job, averaged, task, tmp_path):
    def content(directory):
        return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    before = content(averaged)
    job(f"task={task}", f"load={averaged}", "run=b")
    assert content(averaged) == before
    recalibrated = job("task=recalibrate", f"load={averaged}", "run=r")
    for path in (recalibrated, recalibrated / "recalibrated.pt"):
        with pytest.raises(ConfigError, match="holds what load names, which is never changed; choose another name"):
            job(f"task={task}", f"load={path}", "run=r")


# Export


def files_in(run):
    return sorted(path.name for path in (run / "export").iterdir())


def evaluated_by_hand(run):
    """Images as export.json tells to make them, and what the trained model says to them."""
    config = compose_config("task=eval", f"load={run}", TRUST)
    context = RankContext(0, 1, torch.device("cpu"), torch.float32)
    loaded = load_run(config, run.parent / "nowhere", context)
    with torch.no_grad():
        images = loaded.data.val.images
        return loaded, images, loaded.model.eval()(loaded.data.eval_batch(loaded.data.val, torch.arange(len(images)),
                                                                          loaded.context.dtype)[0])  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_file_computes_what_the_model_does_from_what_export_json_says(job, num_ranks):
    trained = job(*TRAIN, "precision=fp32", "run=a")
    run = job("task=export", f"load={trained}", "run=x", num_ranks=num_ranks)
    assert files_in(run) == ["export.json", "model.onnx", "model.pt2", "model.safetensors"]
    told = json.loads((run / "export/export.json").read_text())
    loaded, pixels, expected = evaluated_by_hand(trained)
    mean, std = (torch.tensor(told["input"][name])[:, None, None] for name in ("mean", "std"))
    images = (pixels - mean) / std
    assert told["input"]["shape"] == ["batch", *images.shape[1:]]
    assert told["output"]["labels"] == ["0", "1", "2", "3"]
    assert set(told["largest_difference"]) == {"model.onnx", "model.pt2", "model.safetensors"}

    program = torch.export.load(run / "export/model.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in operators)  # nothing of ours
    session = onnxruntime.InferenceSession(run / "export/model.onnx", providers=["CPUExecutionProvider"])
    plain = revert_sync_batchnorm(loaded.model)
    assert not any(type(layer).__module__.startswith("syncbn.nn") for layer in plain.modules())
    plain.load_state_dict(load_file(run / "export/model.safetensors"))
    for number in (1, 3, len(images)):
        some, right = images[:number], expected[:number]
        for actual in (program.module()(some), torch.from_numpy(session.run(None, {"images": some.numpy()})[0]),
                       plain(some)):  # fmt: skip
            torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-4)


def test_kept_classes_are_labels_by_their_names(job):
    trained = job("data.classes=[7,2,5]", "model.width=2", "duration=1", "tracker=none", "run=a")
    run = job("task=export", f"load={trained}", "export.formats=[safetensors]", "run=x")
    told = json.loads((run / "export/export.json").read_text())
    assert told["output"]["labels"] == ["7", "2", "5"]


@pytest.mark.slow
@pytest.mark.parametrize("last", ["BatchNorm1d", "SyncBatchNorm"])
def test_a_model_of_ones_own_gets_its_own_classes_back(job, own_modules, last):
    model = ("model=custom", "model._target_=mine_of_tasks.Net", f"+model.last={last}")
    trained = job(*(o for o in TRAIN if not o.startswith("model.")), *model, "precision=fp32", "run=a")
    run = job("task=export", f"load={trained}", TRUST, "run=x")
    assert len(files_in(run)) == 4
    import mine_of_tasks

    net = mine_of_tasks.Net()  # a plain BatchNorm1d at its end
    net.load_state_dict(load_file(run / "export/model.safetensors"))
    loaded, pixels, expected = evaluated_by_hand(trained)
    images = loaded.data.eval_batch(loaded.data.val, torch.arange(len(pixels)), torch.float32)[0]
    torch.testing.assert_close(net.eval()(images), expected, rtol=1e-5, atol=1e-5)
    assert type(loaded.model.bn) is not mine_of_tasks.Leaky  # it was synchronized


def check_a_broken_export(cwd, run):
    def write_something_else(*arguments):
        return lambda images: write(*arguments)(images) + 1e-6

    write = export.WRITERS["pt2"]
    with (
        patch.dict(export.WRITERS, pt2=write_something_else),
        pytest.raises(ConfigError, match=r"export.formats: model.pt2 differs from the evaluated model by 1e-06 "),
    ):
        run_rank(cwd, ("task=export", f"load={run}", "run=x"))


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_file_that_computes_something_else_is_an_error_on_every_rank_and_leaves_nothing_behind(
    job, ranks, averaged, tmp_path, num_ranks
):
    ranks(num_ranks, check_a_broken_export, tmp_path, averaged)
    assert list((tmp_path / "outputs/x").iterdir()) == []
    first = job("task=export", f"load={averaged}", "export.formats=[safetensors]", "run=x")
    before = (first / "export/model.safetensors").read_bytes()
    ranks(num_ranks, check_a_broken_export, tmp_path, averaged)
    assert [path.name for path in first.iterdir()] == ["export"]
    assert files_in(first) == ["export.json", "model.safetensors"]
    assert (first / "export/model.safetensors").read_bytes() == before


def test_a_model_that_cannot_be_exported_is_a_clear_error(job, own_modules, tmp_path):
    model = ("model=custom", "model._target_=mine_of_tasks.Fixed")
    trained = job(*(o for o in TRAIN if not o.startswith("model.")), *model, "run=a")
    with pytest.raises(ConfigError, match=r"export.formats: .*pt2"):
        job("task=export", f"load={trained}", TRUST, "export.formats=[pt2]", "run=x")
    with pytest.raises(ConfigError, match=r"model: expected one tensor as its output to export, got dict"):
        job("task=export", f"load={trained}", "model._target_=mine_of_tasks.Two", "run=x")
    assert list((tmp_path / "outputs/x").iterdir()) == []


def test_onnx_is_left_out_without_its_extra_and_an_error_if_asked_for(job, averaged, monkeypatch, caplog):
    monkeypatch.setattr(
        export_formats, "find_spec", lambda name: None if name == "onnxscript" else util.find_spec(name)
    )
    with caplog.at_level("INFO"):
        run = job("task=export", f"load={averaged}", "precision=fp32", "run=x")
    assert "no model.onnx: it needs onnxscript; pip install 'syncbn[export]'" in caplog.text
    assert files_in(run) == ["export.json", "model.pt2", "model.safetensors"]
    with pytest.raises(ConfigError, match=r"export.formats: onnx cannot be written: it needs onnxscript; pip"):
        job("task=export", f"load={averaged}", "export.formats=[onnx]", "run=y")


def test_float64_goes_without_onnx(job, averaged):
    assert "model.onnx" not in files_in(job("task=export", f"load={averaged}", "run=x"))
    with pytest.raises(ConfigError, match="onnxruntime has no float64 convolution to check it with; add prec"):
        job("task=export", f"load={averaged}", "export.formats=[onnx]", "run=y")


# The command line


@pytest.mark.slow
def test_a_chain_of_tasks_under_torchrun_as_a_user_types_it(job, tmp_path):
    job(*SMALL, "duration=3", "run=first")
    for command in (
        ["task=recalibrate", "load=outputs/first", "recalibrate.batches=3", "run=second"],
        ["task=export", "load=outputs/second", "export.formats=[pt2]", "run=third"],
    ):
        done = start(tmp_path, *command, num_ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs/second/recalibrated.pt").is_file()
    assert (tmp_path / "outputs/third/export/model.pt2").is_file()
    done = start(tmp_path, "task=eval", "load=outputs/first", "eval.weights=ema", num_ranks=2)
    assert done.returncode != 0
    assert (
        done.stderr.count("error: eval.weights=ema: outputs/first/checkpoints/best.pt holds no averaged weights") == 1
    )


def test_a_multirun_of_evaluations_ends_in_one_table(job, tmp_path):
    job(*SMALL, "duration=3", "run=first")
    job(*SMALL, "duration=3", "seed=1", "run=second")
    evaluations = ["task=eval", "load=outputs/first,outputs/second", "eval.precise_bn=2", "run=both", "tracker=none"]
    done = start(tmp_path, "-m", *evaluations)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.split("sweep outputs/both")[1]
    assert [table.count(f"load=outputs/{run} ") for run in ("first", "second")] == [1, 1]
    assert all(name in table for name in ("val/accuracy", "test/accuracy", "precise/val/accuracy"))
