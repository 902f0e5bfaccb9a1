"""parity: planted faults are found and named, each alone and two in a row, and right models have no findings."""

import importlib
import os
import re
import signal
import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from syncbn import parity
from syncbn.__main__ import main
from syncbn.auditing.parity import command, processes
from syncbn.auditing.parity.batches import other_cuts, uneven
from syncbn.auditing.parity.diagnosis import Diagnosis
from syncbn.auditing.parity.errors import ParityError
from syncbn.auditing.parity.processes import RankProcesses
from syncbn.auditing.parity.rules import RULES
from syncbn.auditing.rules import table
from tests.auditing.parity import models
from tests.training.jobs import ROOT

TIMEOUT = 120.0


@pytest.fixture(scope="module")
def processes_of_two():
    """Two ranks that all tests of this file share; `parity` itself starts fresh ones."""
    with RankProcesses(2) as ranks:
        yield ranks


@pytest.fixture
def diagnose(processes_of_two):
    def run(build, loss=models.cross_entropy, batch=None):
        batch = models.images() if batch is None else batch
        processes_of_two.load((build, loss, batch), TIMEOUT)
        return Diagnosis(processes_of_two, 12, (1, 2), 2, lambda line: None).run()

    return run


def named(findings):
    return [(finding.layer, finding.rule) for finding in findings]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("build", "loss", "expected"),
    [
        (models.unconverted_branch, models.cross_entropy, [("right.1", "local-batch-norm")]),
        (models.functional, models.cross_entropy, [("head", "local-batch-norm")]),
        (models.right, models.mean_loss, [("loss", "loss-per-rank")]),
        (models.dropout, models.cross_entropy, [("head.0", "random-per-rank")]),
        pytest.param(models.with_queue, models.cross_entropy, [("head.0", "mixes-samples")], marks=slow),
        (models.contrastive, models.info_nce, [("loss", "mixes-samples")]),
        (models.Unused, models.cross_entropy, [("extra", "no-gradient")]),
        (models.counted, models.cross_entropy, [("left.3", "buffer-of-some-ranks")]),
        pytest.param(models.right, models.sum_loss, [("loss", "loss-per-rank")], marks=slow),
        pytest.param(models.Dropped, models.cross_entropy, [("", "random-per-rank")], marks=slow),
        pytest.param(models.centred, models.cross_entropy, [("left.3", "mixes-samples")], marks=slow),
        pytest.param(models.averaged, models.cross_entropy, [("left.3", "buffer-of-local-samples")], marks=slow),
        pytest.param(models.ByRank, models.cross_entropy, [("", "unexplained")], marks=slow),
        pytest.param(models.ByView, models.cross_entropy, [("", "empty-shard")], marks=slow),
    ],
)
def test_a_planted_fault_is_found_and_nothing_else(diagnose, build, loss, expected):
    findings = diagnose(build, loss)
    assert named(findings) == expected
    for finding in findings:
        assert finding.remedy
        assert finding.difference is None or finding.difference > 1e-3


@pytest.mark.parametrize(
    ("build", "loss", "expected"),
    [
        (models.branch_and_dropout, models.mean_loss,
         [("right.1", "local-batch-norm"), ("head.0", "random-per-rank"), ("loss", "loss-per-rank")]),
        pytest.param(models.functional_and_queue, models.mean_loss,
                     [("left.3.2", "mixes-samples"), ("head", "local-batch-norm"), ("loss", "loss-per-rank")],
                     marks=slow),
    ],
)  # fmt: skip
def test_one_fault_behind_another_is_found_too_in_the_order_of_the_network(diagnose, build, loss, expected):
    assert named(diagnose(build, loss)) == expected


@pytest.mark.parametrize(
    ("build", "loss", "batch"),
    [
        (models.resnet, models.cross_entropy, models.images),
        (models.unet, models.masked, models.masks),
        pytest.param(models.group_norm, models.cross_entropy, models.images, marks=slow),
        (models.frozen_in_part, models.cross_entropy, models.images),
        (models.torch_sync, models.cross_entropy, models.images),
        pytest.param(models.Shuffled, models.cross_entropy, models.images, marks=slow),
        pytest.param(models.Standardized, models.cross_entropy, models.images, marks=slow),
    ],
)
def test_a_right_model_has_no_findings(diagnose, build, loss, batch):
    assert diagnose(build, loss, batch()) == []


def test_an_expert_without_samples_on_a_rank_is_found_although_the_numbers_agree(diagnose):
    [finding] = diagnose(models.Expert, batch=models.expert_images())
    assert (finding.layer, finding.rule) == ("expert", "no-gradient")
    assert "no gradient on rank 1" in finding.why


@pytest.mark.slow
def test_a_mean_that_by_chance_has_equal_weights_in_one_cut_is_found_by_another(diagnose):
    # Of 12 labels 0, 1, 2, 0, ... without the zeros, [7, 5] has four each.
    assert named(diagnose(models.right, models.masked_mean_loss)) == [("loss", "loss-per-rank")]


@pytest.mark.slow
def test_a_loss_inside_of_the_model_is_found_as_one(diagnose):
    x, y = models.images()
    assert named(diagnose(models.LossInside, models.inner_loss, ((x, y), y))) == [("loss", "loss-per-rank")]


@pytest.mark.slow
def test_a_model_that_refuses_float64_is_compared_in_float32_and_says_so(diagnose):
    [finding] = diagnose(models.InFloat32)
    assert (finding.rule, finding.severity) == ("float64-refused", "info")
    both = diagnose(models.InFloat32, models.mean_loss)
    assert named(both) == [("", "float64-refused"), ("loss", "loss-per-rank")]


@pytest.mark.slow
def test_a_shard_that_the_model_cannot_take_is_named_with_its_rank(diagnose):
    [finding] = diagnose(models.OfSeven)
    assert (finding.layer, finding.rule) == ("", "shard-refused")
    assert "rank 1, which has 5 of 12 samples: RuntimeError: shape" in finding.why


@pytest.mark.slow
def test_three_world_sizes_at_once():
    lines = []
    found = parity(models.unconverted_branch, models.cross_entropy, models.images(), world_sizes=(1, 2, 4),
                   report=lines.append)  # fmt: skip
    assert named(found) == [("right.1", "local-batch-norm")]
    assert [line.partition(":")[0] for line in lines if "differs" in line] == [
        "world size 2, samples [7, 5]",
        "world size 4, samples [4, 3, 3, 2]",
    ]


@pytest.mark.slow
def test_when_the_time_is_up_it_says_where_the_ranks_are_and_what_to_shrink():
    with pytest.raises(ParityError, match=r"^timeout: 20 s are over \(rank 0 in .*; use a smaller batch") as caught:
        parity(models.Hanging, models.cross_entropy, models.images(), timeout=20)
    assert "\n" not in str(caught.value)


def test_the_command_line_prints_findings_and_exits_with_1(capsys, monkeypatch, processes_of_two):
    monkeypatch.setitem(command.compare.__globals__, "RankProcesses", lambda num: nullcontext(processes_of_two))
    name = "tests.auditing.parity.models"
    given = ["parity", f"{name}:unconverted_branch", f"{name}:cross_entropy", f"{name}:images"]
    assert main(given) == 1
    printed = capsys.readouterr()
    assert "error    local-batch-norm\n  layer  right.1 (differs by 0.045)\n" in printed.out
    assert "world size 2, samples [7, 5]: differs, first the output of right.1 in step 0 (0.045)" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:build", "nowhere:loss"], "MODULE:BUILD: nowhere cannot be imported (ModuleNotFoundError: No"),
        (["tests.auditing.parity.models:nope", "x:y"], "MODULE:BUILD: tests.auditing.parity.models has nothing of the"),
        (["tests.auditing.parity.models", "x:y"], "MODULE:BUILD: expected a module and a name in it, as in"),
        (["a:b", "a:c", "--world-sizes", "two"], "--world-sizes: expected numbers such as 1,2,4, got 'two'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(["parity", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_what_no_new_process_could_import_is_one_line(monkeypatch):
    with pytest.raises(ParityError, match=r"^build: cannot be sent to a new process .*; define it at the top level"):
        parity(lambda: models.right(), models.mean_loss, models.images())
    typed = types.FunctionType(models.right.__code__, models.right.__globals__, "typed")
    typed.__module__ = "__main__"
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # as in a notebook
    with pytest.raises(ParityError, match=r"^build: is defined in a notebook or console, where no new process"):
        processes._packed((typed, models.mean_loss, models.images()))


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from syncbn import parity\nfrom tests.auditing.parity.models import *\n"
                      "parity(right, mean_loss, images())\n")  # fmt: skip
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=TIMEOUT, check=False,
                          cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""})  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert 'put the call below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_ends_the_ranks_without_a_word_of_theirs():
    models_of = "tests.auditing.parity.models"
    started = subprocess.Popen(
        [sys.executable, "-m", "syncbn", "parity", f"{models_of}:Hanging", f"{models_of}:mean_loss",
         f"{models_of}:images"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        line = started.stderr.readline()
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does, to all of them
        said = started.communicate(timeout=60)  # returns when nobody holds the pipes any more
    finally:
        started.kill()
    assert line.startswith("one process, 12 samples")
    assert (started.returncode, *(text.strip() for text in said)) == (130, "", "")


def test_what_cannot_be_compared_is_an_error_that_names_the_argument():
    x, y = models.images()
    for arguments, message in [
        (((x, y), (1,)), r"^world_sizes: expected one above 1"),
        (((x, y), (0, 2)), r"^world_sizes: expected numbers of ranks"),
        (((x, y), 2), r"^world_sizes: expected numbers of ranks, 1 or more, got 2"),
        (((x[:2], y[:2]), (1, 2)), r"^batch: 2 samples cannot be cut unevenly over 2 ranks; give at least 3"),
        (((None, y), (1, 2)), r"^batch: expected inputs whose first dimension is the samples, got no tensor"),
        (((x, y, y), (1, 2)), r"^batch: expected \(inputs, targets\), got tuple"),
    ]:
        batch, sizes = arguments
        with pytest.raises(ValueError, match=message):
            parity(models.right, models.mean_loss, batch, world_sizes=sizes)


@pytest.mark.parametrize(("num", "world_size", "cut"), [(12, 2, [7, 5]), (13, 2, [8, 5]), (3, 2, [2, 1]),
                                                        (12, 4, [4, 3, 3, 2]), (5, 4, [2, 1, 1, 1])])  # fmt: skip
def test_a_cut_is_never_even(num, world_size, cut):
    assert uneven(num, world_size) == cut
    assert all(sum(other) == num and other[-1] >= 1 for other in other_cuts(cut))


@pytest.mark.slow
def test_the_page_shows_what_parity_says_about_its_three_mistakes(diagnose):
    mistakes = importlib.import_module("docs.parity_mistakes")
    page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    said = [f"{table(diagnose(*one))}\n" for one in mistakes.mistakes()]
    assert said == shown


def test_the_table_of_the_page_has_all_rules_with_their_severities():
    page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \|", page, re.MULTILINE)
    assert rows == [(name, rule.severity) for name, rule in RULES.items()]


@pytest.mark.vision
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_torchvision_s_networks_have_no_findings_but_those_that_they_earn(name):
    pytest.importorskip("torchvision")
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = parity(models.Torchvision(name), models.cross_entropy, (x, torch.arange(6) % 3))
    assert named(found) == []


@pytest.mark.vision
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"])
def test_timm_s_networks_have_no_findings(name):
    pytest.importorskip("timm")
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = parity(models.Timm(name), models.cross_entropy, (x, torch.arange(6) % 3))
    assert named(found) == []
