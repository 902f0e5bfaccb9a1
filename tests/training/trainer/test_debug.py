"""debug=overfit says whether a model can learn, debug=profile where its time goes, --help what there is."""

import gzip
import json
import subprocess
import sys

import pytest
import torch
import yaml

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data.registry import load_data
from syncbn.training.models.build import build_network
from syncbn.training.trainer import overfit
from tests.training.jobs import ROOT, compose_config, read_metrics, start

TINY = ["data=synthetic", "data.num_samples=130", "data.size=8", "model.width=4"]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sound_model_overfits_and_stops_as_soon_as_it_has(job, num_ranks):
    run = job("debug=overfit", *TINY, "run=a", num_ranks=num_ranks)
    evaluated = [record for record in read_metrics(run) if "val/accuracy" in record]
    assert evaluated[-1]["val/accuracy"] >= overfit.FITTED
    assert all(record["val/accuracy"] < overfit.FITTED for record in evaluated[:-1])
    assert evaluated[-1]["step"] < 300


@pytest.mark.slow
def test_a_frozen_model_that_cannot_is_one_message_and_exit_code_1(tmp_path):
    frozen = ["freeze.a.match=backbone", "freeze.a.weights=true", "duration=20"]
    done = start(tmp_path, "debug=overfit", *frozen)
    assert done.returncode == 1
    assert done.stderr.startswith("error: overfit: after 20 steps the accuracy on 32 samples is 0.")
    assert "frozen are 77104 of 77754 parameters" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_statistics_that_evaluation_uses_and_training_does_not_are_found(job):
    with pytest.raises(TrainingError, match=r"look at bn\.momentum"):
        job("debug=overfit", *TINY, "bn.momentum=1e-6", "duration=60", "run=a")


def test_more_samples_than_there_are_is_a_mistake():
    with pytest.raises(ConfigError, match="overfit: expected at most the 104 training samples, got 105"):
        overfit.only_a_few(load_data(compose_config(*TINY).data), 105)


def test_every_rank_leaves_a_trace_and_one_a_table(job):
    run = job("debug=profile", *TINY, "profile=1", "duration=6", "run=a", num_ranks=2)
    names = sorted(path.name for path in (run / "profile").iterdir())
    assert names == ["operators.txt", "trace-rank0.json.gz", "trace-rank1.json.gz"]
    for rank in range(2):
        trace = json.loads(gzip.decompress((run / f"profile/trace-rank{rank}.json.gz").read_bytes()))
        steps = [event for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")]
        assert len(steps) == 1
    assert "aten::mkldnn_convolution" in (run / "profile/operators.txt").read_text()


@pytest.mark.slow
def test_a_run_too_short_to_profile_says_so(job, caplog):
    run = job("debug=profile", *TINY, "duration=2", "run=a")
    assert "profile: nothing to show, the first 5 steps are warm-up" in caplog.text
    assert not (run / "profile").exists()


TIMM = """
from torch import nn

def create_model(model_name, pretrained, in_chans, num_classes):
    assert (model_name, pretrained) == ("resnet18", False)
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
"""


def test_a_timm_model_gets_the_channels_and_classes_of_the_data(tmp_path, monkeypatch):
    if "timm" not in sys.modules:  # a stand-in, where it is not installed
        (tmp_path / "timm.py").write_text(TIMM)
        monkeypatch.syspath_prepend(tmp_path)
    config = compose_config("model=timm")
    model = build_network(config.model, config.bn, in_channels=2, num_classes=7)
    monkeypatch.delitem(sys.modules, "timm")
    assert next(model.parameters()).shape[1] == 2
    assert list(model.parameters())[-1].shape == (7,)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    config = compose_config("model=timm")
    with pytest.raises(
        ConfigError, match=r"model\._target_=timm\.create_model: timm is not installed; pip install timm"
    ):
        build_network(config.model, config.bn, in_channels=1, num_classes=10)


@pytest.mark.parametrize("flags", [["--help"], pytest.param(["--cfg", "job"], marks=pytest.mark.slow)], ids=" ".join)
def test_what_only_prints_does_not_import_torch(flags):
    code = f"""
import sys, runpy
sys.argv[1:] = {flags}
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "AssertionError" not in done.stderr


def test_help_has_a_line_per_group_with_every_choice(tmp_path):
    done = start(tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    for group in (path for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "hydra"):
        shown = [choice.strip(" *") for choice in lines[group.name].strip()[len(group.name) :].split(",")]
        assert shown == sorted(path.stem for path in group.glob("*.yaml"))
    assert "digits*" in lines["data"]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_under_torchrun_it_is_printed_once(tmp_path, flags):
    done = start(tmp_path, *flags, num_ranks=2)
    assert done.returncode == 0, done.stderr
    first = "Trains a network" if flags == ["--help"] else "batch_size: 64"
    assert done.stdout.count(first) == 1


GROUPS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name in ("data", "model", "experiment", "debug") and yaml.safe_load(path.read_text())
)
NEED_FILES = (
    "fashion",
    "fine_tuning",
    "small_batch",
    "image_folder",
    "mask_folder",
    "data=table",
    "hf",
    "data=custom",
)  # which tests of their own make


@pytest.mark.parametrize("choice", [choice for choice in GROUPS if not any(name in choice for name in NEED_FILES)])
def test_every_choice_builds_its_data_and_model(choice, tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text(TIMM)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"model=custom": ["model._target_=timm.create_model", "+model.model_name=resnet18",
                                  "+model.pretrained=false", "+model.in_chans=data.num_channels",
                                  "+model.num_classes=data.num_classes"],
                 "model=unet_small": ["data=shapes"], "data=shapes": ["model=unet_small"]}  # fmt: skip
    config = compose_config(choice, *arguments.get(choice, []))
    data = load_data(config.data)
    model = build_network(config.model, config.bn, data.num_channels, data.num_classes)
    sys.modules.pop("timm", None)
    images, targets = data.train_batch(torch.arange(2), 0, 0, torch.float32)
    assert model.eval()(images).shape == (2, data.num_classes, *targets.shape[1:])
