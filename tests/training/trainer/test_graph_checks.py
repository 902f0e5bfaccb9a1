"""What cannot be captured is an error at start, which says what to do."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.training.config.errors import ConfigError
from syncbn.training.trainer.capture import CAPTURES
from syncbn.training.trainer.graph_checks import capture_for, check, check_parts
from tests.recording import RecordingCapture
from tests.training.jobs import compose_config

CPU = torch.device("cpu")
GOOD = SimpleNamespace(may_draw=False, skips_on_device=True)


@cache
def _composed():
    return compose_config("graph=true")


def config(**changes):
    """The configuration with graphs; `bn_*` changes are of the group `bn`."""
    bn = {key.removeprefix("bn_"): value for key, value in changes.items() if key.startswith("bn_")}
    others = {key: value for key, value in changes.items() if not key.startswith("bn_")}
    return replace(_composed(), bn=replace(_composed().bn, **bn), **others)


@pytest.fixture
def _captures_on_the_cpu(monkeypatch):
    monkeypatch.setitem(CAPTURES, "cpu", RecordingCapture)


def test_without_a_gpu_there_are_no_graphs():
    with pytest.raises(ConfigError, match=r"^graph: expected an NVIDIA GPU, .* got a CPU; set graph=false"):
        check(config(), CPU, 1)
    check(config(graph=False), CPU, 1)
    assert capture_for(config(graph=False), CPU) is None


@pytest.mark.usefixtures("_captures_on_the_cpu")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True}, "set compile=false or graph=false"),
        ({"bn_debug": True}, "set bn.debug=false"),
        ({"bn_own_group": True}, "one communicator.*set bn.own_group=false, or"),
        ({"bn_group": "node"}, "one communicator.*set bn.group=world, or"),
        ({"bn_group": 2}, "one communicator.*set bn.group=world, or"),
    ],
)
def test_what_a_graph_cannot_do_is_named_with_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=f"^graph: .*{message}"):
        check(config(**changes), CPU, 2)
    check(config(**changes, graph=False), CPU, 2)


@pytest.mark.usefixtures("_captures_on_the_cpu")
def test_one_rank_alone_has_no_communicators_and_local_layers_use_none():
    check(config(bn_group="node"), CPU, 1)
    check(config(bn_sync=False), CPU, 2)
    assert isinstance(capture_for(config(), CPU), RecordingCapture)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (
            SimpleNamespace(may_draw=True, skips_on_device=True),
            "may draw random numbers on the host; choose optimizer=sgd",
        ),
        (
            SimpleNamespace(may_draw=False, skips_on_device=False),
            "waits for the device in every step; choose optimizer=",
        ),
    ],
)
def test_an_optimizer_that_needs_the_host_is_named(built, message):
    with pytest.raises(ConfigError, match=f"^graph: this optimizer {message}"):
        check_parts(config(), built, nn.Identity(), 10)
    check_parts(config(graph=False), built, nn.Identity(), 10)


def test_a_layer_that_counts_on_the_host_is_named_but_not_ours():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=None))
    with pytest.raises(ConfigError, match=r"^graph: 1, a BatchNorm2d with momentum=None, waits .* set bn.sync=true"):
        check_parts(config(), GOOD, model, 10)
    check_parts(config(), GOOD, SyncBatchNorm.convert_sync_batchnorm(model), 10)


@pytest.mark.parametrize(("key", "text"), [("log_every", "1"), ("eval_every", "1ep")])
def test_a_run_of_which_every_step_is_logged_would_replay_none(key, text):
    with pytest.raises(ConfigError, match=f"^graph: has no effect with {key}={text}, .* choose a larger {key}, or"):
        check_parts(config(**{key: text}), GOOD, nn.Identity(), 1)
