"""task=parity: whatever train.py can train, compared with one process; what it compares, writes and ends with."""

import json

import pytest
import torch

from syncbn.auditing.parity.comparison import SizeResult
from syncbn.auditing.parity.parity import Result
from syncbn.auditing.parity.rules import new_finding
from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.tasks import parity
from syncbn.training.tasks.run import run
from tests.training.jobs import compose_config, start

SMALL = ["model.width=4", "model.stages=1"]


@pytest.fixture
def compared(monkeypatch):
    """What is handed over to be compared, without a comparison; `findings` are what it then finds."""
    calls = {"findings": []}

    def compare(build, loss, batch, **options):
        calls.update(build=build, loss=loss, batch=batch, options=options)
        return Result(calls["findings"], [SizeResult(2, (7, 5), None, None)])

    monkeypatch.setattr(parity, "compare", compare)
    return calls


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start_here(*overrides):
        run(compose_config("task=parity", *SMALL, *overrides), tmp_path)
        return json.loads((tmp_path / "parity.json").read_text())

    return start_here


def test_it_compares_the_configured_model_loss_and_batch(task, compared):
    content = task(
        "freeze.mine.match=backbone.stem.bn", "parity.world_sizes=[1,2,4]", "parity.steps=3", "batch_size=20"
    )
    assert (content["samples"], content["findings"]) == (20, [])
    assert content["world_sizes"] == [{"world_size": 2, "cut": [7, 5], "first": None, "difference": None}]
    model, (images, labels) = compared["build"](), compared["batch"]
    assert model.training
    assert model.backbone.stem.bn.stats_frozen
    assert (len(images), len(labels), images.dtype) == (20, 20, torch.float64)
    options = compared["options"]
    assert (list(options["world_sizes"]), options["steps"], options["timeout"]) == ([1, 2, 4], 3, 600)
    total, count = compared["loss"](model.double()(images), labels)
    assert count == 20
    assert total.isfinite()


def test_findings_are_written_and_end_the_job_with_exit_code_1(task, compared, tmp_path):
    compared["findings"] = [new_finding("local-batch-norm", "backbone.stem.bn", 0.25, detail="", remedy="convert")]
    with pytest.raises(TrainingError, match=r"^parity: local-batch-norm in backbone\.stem\.bn; see .*parity\.json$"):
        task()
    [finding] = json.loads((tmp_path / "parity.json").read_text())["findings"]
    assert (finding["rule"], finding["difference"]) == ("local-batch-norm", 0.25)


def test_what_is_no_difference_does_not_fail(task, compared):
    compared["findings"] = [new_finding("float64-refused", "", error="no", limit=1e-3)]
    assert [one["severity"] for one in task()["findings"]] == ["info"]


def test_under_torchrun_it_is_an_error(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"^task=parity: starts its own ranks; use python train\.py"):
        parity.run(compose_config("task=parity"), tmp_path, None)


@pytest.mark.parametrize("given", ["[]", "[1]", "[0,2]"])
def test_world_sizes_that_compare_nothing_are_an_error(given):
    with pytest.raises(ConfigError, match=r"^parity\.world_sizes: expected a list of numbers of ranks, one of them"):
        compose_config("task=parity", f"parity.world_sizes={given}")


def test_what_is_no_list_of_numbers_names_the_key():
    with pytest.raises(ConfigError, match=r"^parity\.world_sizes: expected list\[int\], got \['a'\]"):
        compose_config("task=parity", "parity.world_sizes=[a]")


@pytest.mark.slow
def test_the_default_model_trains_the_same_and_without_synchronization_it_does_not(tmp_path):
    done = start(tmp_path, "task=parity", "run=a")
    assert done.returncode == 0, done.stderr
    assert "no findings" in done.stdout
    local = start(tmp_path, "task=parity", "run=b", "bn.sync=false")
    assert local.returncode == 1
    assert local.stderr.startswith("error: parity: local-batch-norm in backbone.stem.bn (9 findings); see outputs/b/")
    findings = json.loads((tmp_path / "outputs/b/parity.json").read_text())["findings"]
    assert {one["rule"] for one in findings} == {"local-batch-norm"}


@pytest.mark.slow
def test_it_compares_what_a_package_of_one_s_own_trains(tmp_path):
    (tmp_path / "mine_parity.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self, num_classes):\n"
        "        super().__init__()\n        self.linear = torch.nn.Linear(64, num_classes)\n\n"
        "    def forward(self, x):\n        x = x.flatten(1)\n        return self.linear(x - x.mean(0))\n"
    )
    done = start(tmp_path, "task=parity", "run=a", "model=custom", "model._target_=mine_parity.Net")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: parity: mixes-samples in the model; see outputs/a/parity.json")
