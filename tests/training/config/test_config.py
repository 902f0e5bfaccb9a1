"""The configuration is strict to the last key, and every mistake is one message that names the key and the remedy."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from syncbn.training.config.duration import Duration
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.keys import TASKS
from syncbn.training.config.schema import SCHEMAS, Config
from tests.training.jobs import ROOT, compose_config, outcome, run_rank, start

# Seen when Hydra makes the run directory.
MISTAKES_OF_HYDRA = [(["run=../elsewhere"], "run: expected a directory name")]
MISTAKES = [
    (["optimizer.lrr=1"], "optimizer.lrr: no such key; did you mean optimizer.lr?"),
    (["+optimizer.lrr=1"], "optimizer.lrr: no such key; did you mean optimizer.lr?"),
    (["+save.keepp=1"], "save.keepp: no such key; did you mean save.keep?"),
    (["optimizer.lr=abc"], "optimizer.lr: expected float, got 'abc'"),
    (["bn.eps=abc"], "bn.eps: expected float | None, got 'abc'"),
    (["optimizer.lr=[1,2"], "optimizer.lr=[1,2: not a valid override"),
    (["data=nope"], "data=nope: no such choice; choose one of custom, digits, fashion_mnist, hf, image_folder,"),
    (["nope=1"], "nope: no such key"),
    (["epochs=3"], "epochs: no such key; write duration=3ep"),
    (["learning_rate=0.1"], "learning_rate: no such key; write optimizer.lr=0.1"),
    (["gpus=2"], "gpus: no such key; write torchrun --nproc-per-node 2 train.py"),
    (["model.num_classes=5"], "model.num_classes: no such key; the number comes from the data (a class for each dir"),
    (["+model.in_chans=3"], "model.in_chans: no such key; the number comes from the data (data.channels, where"),
    (
        ["model._target_=mine.Net"],
        "model._target_: belongs to model=custom; write model=custom model._target_=mine.Net",
    ),
    (
        ["model=resnet50"],
        "model=resnet50: no such choice; choose one of custom, resnet_small, timm, unet_small; one of",
    ),
    (
        ["model=mine.Net"],
        "model=mine.Net: no such choice; choose one of custom, resnet_small, timm, unet_small; a class",
    ),
    (["optimizer=Adam"], "optimizer=Adam: no such choice; choose one of adamw, custom, sgd; did you mean optimizer=ad"),
    (
        ["data=./photos"],
        "data=./photos: no such choice; choose one of custom, digits, fashion_mnist, hf, image_folder,",
    ),
    (["lr", "0.1"], "lr: expected KEY=VALUE in one word, without spaces around the ="),
    (["task=test"], "task: expected task=eval, which is its name here, got 'test'"),
    (["device=cuda:1"], "device: expected cuda, got 'cuda:1'; CUDA_VISIBLE_DEVICES=1 in front of the command chooses"),
    (["save=5"], "save: expected its keys, save.every, save.keep, got 5"),
    (["init=nope.pt"], "init: expected sub-networks by name, as in init.backbone.path=FILE, got 'nope.pt'"),
    (["init.backbone=nope.pt"], "init.backbone: expected a key below it, init.backbone.path=FILE"),
    (["freeze.backbone=true"], "freeze.backbone: expected a key below it, freeze.backbone.match=PATTERN"),
    (["trust=mine.Net"], "trust: expected list[str], got 'mine.Net'; a list is written trust=[mine.Net]"),
    (["lr=0.05"], "lr: no such key; did you mean optimizer.lr?"),
    (["tracker.groupp=x"], "tracker.groupp: no such key; did you mean tracker.group?"),
    (["tracker.examples=-1"], "tracker.examples: expected a number of images from 0 to 100, got -1"),
    (["data.path=x"], "data.path: the chosen data has no such key, only data=fashion_mnist"),
    (["optimizer=adamw", "optimizer.momentum=0.9"], "optimizer.momentum: the chosen optimizer has no such key, only"),
    (["model=custom", "model.gain=8"], "model.gain: no such key; an argument of a model of your own needs a +"),
    (["precision=fp8"], "precision: expected one of fp64, fp32, bf16, fp16, got 'fp8'"),
    (["batch_size=0"], "batch_size: expected 1 or more samples over all ranks, got 0"),
    (["duration=5 apples"], "duration: expected a duration such as 200 (steps), 5ep (epochs), got '5 apples'"),
    (["freeze.a.matchh=x"], "freeze.a.matchh: no such key; did you mean freeze.a.match?"),
    (["freeze.a.match=x", "freeze.a.stats=maybe"], "freeze.a.stats: expected bool, got 'maybe'"),
    (["freeze.a.match=x", "freeze.a.until=3x"], "freeze.a.until: expected a duration"),
    (["init.backbone.pth=x"], "init.backbone.pth: no such key; did you mean init.backbone.path?"),
    (["model=custom"], "model._target_: required"),
    (["loss=custom"], "loss._target_: required"),
    (["optimizer=custom"], "optimizer._target_: required"),
    (["optimizer=custom", "optimizer._target_=x", "optimizer._args_=[1]"], "optimizer._args_: expected the name of an"),
    (["optimizer=adamw", "+optimizer.momentum=0.9"], "optimizer.momentum: no such key; known to optimizer=adamw"),
    (["optimizer=adamw", "optimizer.betas=[0.9,1.0]"], "optimizer.betas: expected two numbers, each 0 or more"),
    (["save.every=0"], "save.every: expected more than 0, got '0'"),
    (["bn.skip_nonfinite=3"], "bn.skip_nonfinite: expected bool, got 3"),
    (["batch_size=99999999999999999999"], "batch_size: expected a whole number of 64 bits, got 99999999999999999999"),
    (["collective_timeout=inf"], "collective_timeout: expected a number of seconds above 0, 1e+09 at most, got inf"),
    (["optimizer.groups.a=1"], "optimizer.groups.a: expected a key below it, optimizer.groups.a.match=PATTERN"),
    (["data.augment.a=3"], "data.augment.a: expected a key below it, data.augment.a._target_=torchvision."),
    (["optimizer.groups={a:{matchh:x}}"], "optimizer.groups.a.matchh: no such key; did you mean optimizer.groups.a.ma"),
    (["optimizer.groups.a.matchh=x"], "optimizer.groups.a.matchh: no such key; did you mean optimizer.groups.a.match?"),
    (["optimizer.groups.a.lr_scale=2"], "optimizer.groups.a.match: required, and not given"),
    (["optimizer.groups.a.match=x", "optimizer.groups.a.lr_scale=0"], "optimizer.groups.a.lr_scale: expected a"),
    (["optimizer.groups.a.match=x", "optimizer.groups.a.weight_decay=-1"], "optimizer.groups.a.weight_decay: exp"),
    (["optimizer.groups.a.match=[]"], "optimizer.groups.a.match: expected a pattern or a list of patterns, got []"),
    (["optimizer.groups=3"], "optimizer.groups: expected groups by name, as in optimizer.groups.NAME.match=PATTERN"),
    (["schedule=step"], "schedule: expected either schedule.milestones=[10ep,15ep] or schedule.step_size=5ep, got"),
    (
        ["schedule=step", "schedule.step_size=5ep", "schedule.gamma=1"],
        "schedule.gamma: expected a number",
    ),
    (["schedule=poly", "schedule.power=0"], "schedule.power: expected a number above 0, got 0.0"),
    (["schedule=step", "schedule.milestones=[5 apples]"], "schedule.milestones: expected a duration such as"),
    (["early_stop=5 apples"], "early_stop: expected a duration such as 200 (steps), 5ep (epochs), got '5 apples'"),
    (["metrics.f1.average=macro"], "metrics.f1._target_: required; give a metric"),
    (["best="], "best: expected auto, loss, or the name of a validation metric, got ''"),
    (["task=eval"], "load: expected a checkpoint or a run directory for task=eval"),
    (["task=recal"], f"task: expected one of {', '.join(TASKS)}, got 'recal'"),
    (["task=eval", "load=x", "eval.weight=raw"], "eval.weight: no such key; did you mean eval.weights?"),
    (["eval.weights=best"], "eval.weights: expected one of auto, raw, ema, got 'best'"),
    (["eval.precise_bn=0"], "eval.precise_bn: expected null or 1 or more global batches, got 0"),
    (["recalibrate.batches=0"], "recalibrate.batches: expected null or 1 or more global batches, got 0"),
    (["export.formats=[onxx]"], "export.formats: expected null or some of safetensors, pt2, onnx, got ['onxx']"),
    (["export.formats={a: 1}"], "export.formats: expected list[str] | None, got {'a': 1}"),
    (["export.formats=[]"], "export.formats: expected null or some of safetensors, pt2, onnx, got []"),
    (["bn.group=rack"], "bn.group: expected world, node, or a number of ranks, got 'rack'"),
    (["bn.group=2", "bn.sync=false"], "bn.group: expected world where bn.sync=false, got 2"),
    (["bn.memory=lean"], "bn.memory: expected default unless bn.fuse=true, got 'lean'"),
    (["bn.virtual_ranks=4"], "bn.virtual_ranks: expected null unless bn.sync=false, got 4"),
    (["bn.virtual_ranks=0", "bn.sync=false"], "bn.virtual_ranks: expected null or 1 or more ranks, got 0"),
    (["bn.virtual_ranks=4", "bn.sync=false", "bn.buffers=per_group"], "bn.buffers: expected pool with bn.virtual_ra"),
    (["model.norm=layer"], "model.norm: expected one of batch, group, got 'layer'"),
    (["model.norm=group", "model.width=6"], "model.width: expected a multiple of 4 where model.norm=group, got 6"),
    (["bn.fuse=true", "bn.sync=false"], "bn.fuse: expected false where bn.sync=false, got True"),
    (["bn.skip_nonfinite=true", "bn.sync=false"], "bn.skip_nonfinite: expected false unless bn.sync=true or bn.vir"),
    (["bn.own_group=true", "bn.group=2"], "bn.own_group: expected false unless bn.sync=true and bn.group=world"),
    (["bn.own_group=true", "bn.sync=false"], "bn.own_group: expected false unless bn.sync=true and bn.group=world"),
    (["data.workers=-1"], "data.workers: expected a number of processes, 0 or more, got -1"),
    (["data.prefetch=0"], "data.prefetch: expected 1 batch or more, got 0"),
    (["data=image_folder"], "data.path: "),
    (["data=image_folder", "data.path=x", "data.channels=4"], "data.channels: expected 3 (RGB) or 1 (gray), got 4"),
    (["data=image_folder", "data.path=x", "data.cache=much"], "data.cache: expected auto, 0, or a size such as 500MB"),
    (["data=mask_folder", "data.path=x", "data.num_classes=999"], "data.num_classes: expected 2 to 255, got 999"),
    (["data=shapes", "data.num_classes=5"], "data.num_classes: expected 2 to 4: background, squares, disks, triangles"),
    (["data.classes=[1]"], "data.classes: expected two or more labels, each once, got [1]"),
]
MISTAKES_THAT_NEED_THE_MODEL_OR_DATA = [
    (["data=fashion_mnist", "data.path=/nowhere"], "data.path: expected the file train-images-idx3-ubyte"),
    (["data=image_folder", "data.path=/nowhere"], "data.path: expected a directory, found none at '/nowhere'"),
    (["data=shapes"], "model: expected logits of shape (2, 4, 32, 32), got (2, 4); this data has masks, a class for"),
    (["freeze.a.match=backbon"], "freeze.a: match='backbon' selects no module; did you mean backbone"),
    (["freeze=backbone", "bn.sync=false"], "freeze.backbone: backbone.stem.bn is a BatchNorm2d"),
    (["freeze.a.match=*", "freeze.a.weights=true"], "freeze: every parameter is frozen at step 0"),
    (["init.backbone.path=/nope.pt"], "init.backbone.path: expected a checkpoint, found no file '/nope.pt'"),
    (
        ["init.body.path=/nope.pt"],
        "init.body: the model has no sub-network 'body'; its top-level ones are backbone, head",
    ),
    (["model=custom", "model._target_=nope.Net"], "model._target_=nope.Net: "),
    (["loss=custom", "loss._target_=torch.nn.BCELoss"], "loss: cannot take the model's outputs"),
    (["loss=custom", "loss._target_=torch.nn.CrossEntropyLoss"], "loss: expected a sum and a count"),
    (["metrics.f1._target_=torch.nn.Linear"], "metrics.f1._target_=torch.nn.Linear: "),
    (["metrics.accuracy._target_=torchmetrics.MeanMetric"], "metrics.accuracy: expected a name that is not taken"),
    (["best=f1"], "best: expected auto or one of accuracy, loss, got 'f1'"),
    (["model=unet_small"], "model: expected logits of shape (2, 10), got (2, 10, 8, 8); this data has one label an"),
]


def check_one_message(done, message):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_message_that_names_the_key(overrides, message):
    told = outcome(overrides)
    assert isinstance(told, str)
    assert told.startswith(message)
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(("overrides", "message"), [*MISTAKES[::10], *MISTAKES_OF_HYDRA], ids=lambda value: value[0])
def test_on_the_command_line_it_is_all_that_is_printed(tmp_path, overrides, message):
    check_one_message(start(tmp_path, *overrides), message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    MISTAKES_THAT_NEED_THE_MODEL_OR_DATA,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_that_only_the_model_or_data_shows_is_one_message_too(tmp_path, overrides, message):
    with pytest.raises(ConfigError) as caught:
        run_rank(tmp_path, tuple(overrides))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_such_a_mistake_ends_the_command_like_any_other(tmp_path):
    overrides, message = MISTAKES_THAT_NEED_THE_MODEL_OR_DATA[0]
    check_one_message(start(tmp_path, *overrides), message)
    measured = start(tmp_path, "debug=data", "batch_size=9999")
    check_one_message(measured, "batch_size: expected two steps or more to measure, got 1")


def test_under_torchrun_a_mistake_is_printed_once(tmp_path):
    done = start(tmp_path, "optimizer.lr=abc", num_ranks=2)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("error: optimizer.lr: expected float, got 'abc'") == 1
    assert not list(tmp_path.glob("outputs/*/metrics.jsonl"))


def test_composing_a_config_does_not_import_torch(tmp_path):
    code = "import sys, runpy; sys.argv[1:] = ['--cfg', 'job']; runpy.run_path('train.py', run_name='__main__')"
    check = "; assert 'torch' not in sys.modules; print('composed')"
    done = subprocess.run([sys.executable, "-c", code + check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "composed" in done.stdout


@pytest.mark.parametrize(
    "choice",
    sorted(
        f"{path.parent.relative_to(ROOT / 'configs')}={path.stem}"
        for path in (ROOT / "configs").rglob("*.yaml")
        if path.parent.name not in ("configs", "job_logging", "help")
    ),
)
def test_every_config_file_composes_and_passes_the_schema(choice):
    required = {
        "model=custom": ["model._target_=torch.nn.Linear"],
        "loss=custom": ["loss._target_=torch.nn.Linear"],
        "data=custom": ["data._target_=torch.nn.Linear"],
        "optimizer=custom": ["optimizer._target_=torch.optim.NAdam"],
        "schedule=step": ["schedule.step_size=5ep"],
        "data=image_folder": ["data.path=x"],
        "experiment=fine_tuning": ["data.path=x", "init.model.path=x"],
        "data=hf": ["data.path=x"],
        "data=mask_folder": ["data.path=x", "data.num_classes=2"],
        "data=table": ["data.path=x"],
    }
    extra = required.get(choice, ["experiment=small_batch"] if choice.startswith("experiment/small_batch=") else [])
    assert isinstance(compose_config(choice, *extra), Config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_yaml_starts_with_the_command_that_runs_it_and_fits_on_a_screen(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert len(lines) <= (95 if path.name == "train.yaml" else 60)  # the root lists every key there is


def test_yaml_and_schema_have_the_same_root_keys():
    keys = set(yaml.safe_load((ROOT / "configs/train.yaml").read_text())) - {"defaults", "hydra"}
    groups = {"tracker", "freeze", "metrics", *SCHEMAS}
    assert keys | groups == {field.name for field in fields(Config)}


def test_a_rule_from_the_command_line_needs_no_plus():
    config = compose_config("freeze.mine.match=backbone", "freeze.mine.until=5ep", "init.backbone.path=x.pt")
    assert config.freeze["mine"].match == "backbone"
    assert config.freeze["mine"].until == "5ep"
    assert config.init["backbone"].path == "x.pt"


def test_names_and_paths_are_text_as_they_are_typed(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = compose_config(
        "task=predict",
        "run=2024_01_15",
        "load=~/runs/gr\u00f6\u00dfe (2)",
        "predict.path=1.10",
        "init.head.path=~/a#b=c",
    )
    assert (config.run, config.load) == ("2024_01_15", "/home/me/runs/gr\u00f6\u00dfe (2)")
    assert (config.predict.path, config.init["head"].path) == ("1.10", "/home/me/a#b=c")
    more = compose_config("task=predict", "run=null", "load='1_0'", "predict.path=[a,b]")
    assert (more.run, more.load, more.predict.path) == (None, "1_0", ["a", "b"])


def test_named_entries_may_be_given_whole():
    config = compose_config(
        "freeze.a={match:backbone,weights:true}", "optimizer.groups={b:{match:head,lr_scale:2}}", "init={c:{path:x}}"
    )
    assert (config.freeze["a"].weights, config.optimizer.groups["b"].lr_scale, config.init["c"].path) == (True, 2, "x")


def test_null_removes_a_shipped_rule():
    assert compose_config("freeze=backbone", "freeze.backbone=null").freeze == {}


@given(value=st.integers(0, 10**6), unit=st.sampled_from(["", "ep", "min"]))
def test_durations_read_back(value, unit):
    duration = Duration.parse(f"{value}{unit}", allow_minutes=True)
    assert duration == Duration(float(value), {"": "steps", "ep": "epochs", "min": "minutes"}[unit])


def test_an_epoch_is_rounded_up_to_whole_steps():
    assert Duration.parse("0.5ep").in_steps(7) == 4


@given(text=st.text(max_size=8))
def test_what_is_no_duration_is_a_value_error(text):
    if re.fullmatch(r"\s*\d+(\s*(ep|min))?\s*|\s*\d+\.\d+\s*(ep|min)\s*", text):
        return
    with pytest.raises(ValueError, match="expected a duration such as"):
        Duration.parse(text, allow_minutes=True)


def test_a_group_cannot_be_chosen_over_a_stored_configuration():
    from syncbn.training.config.parsing import apply_overrides, to_dict

    stored = to_dict(compose_config())
    assert apply_overrides(stored, ["optimizer.lr=0.5"])["optimizer"]["lr"] == 0.5
    with pytest.raises(ConfigError, match="data: comes from load"):
        apply_overrides(stored, ["data=synthetic"])
    with pytest.raises(
        ConfigError, match=r"data\.workers: belongs to the configuration that load holds, over which no"
    ):
        apply_overrides(stored, ["data.workers=0,1"])
