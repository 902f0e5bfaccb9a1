"""Around a job: the process group goes on every path, a person sees progress, and the layer needs torch alone."""

import io
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch.distributed as dist
from rich.console import Console

from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed import world
from syncbn.training.launch import overrides
from syncbn.training.launch.overrides import held_back
from syncbn.training.launch.process_group import process_group
from syncbn.training.tasks import run, train
from syncbn.training.tracking import console
from tests.training.checkpoint.test_kills import listening_addresses
from tests.training.checkpoint.test_resume import SMALL
from tests.training.jobs import ROOT, compose_config


@pytest.fixture
def only_rank(monkeypatch):
    """This process as the only rank of a job, whose store it hosts itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what the code under test puts there is taken back
        monkeypatch.delenv(name)
    world.store.cache_clear()
    yield
    world.store.cache_clear()


FURTHER = (ConfigError("a key"), KeyboardInterrupt(), SystemExit(3))


@pytest.mark.parametrize(
    "error",
    [None, ValueError("a bug"), *(pytest.param(e, marks=pytest.mark.slow) for e in FURTHER)],
)
def test_the_process_group_is_destroyed_on_every_path(only_rank, error):
    def job():
        with process_group("cpu", "0", 60.0):
            assert dist.is_initialized()
            if error is not None:
                raise error

    if error is None:
        job()
    else:
        with pytest.raises(type(error)):
            job()
    assert not dist.is_initialized()


def test_a_multirun_makes_one_group_after_the_other(only_rank):
    for job in ("0", "1"):
        with process_group("cpu", job, 60.0):
            assert dist.get_world_size() == 1


def test_the_store_of_rank_0_listens_on_the_loopback_device_alone(only_rank):
    before = listening_addresses(os.getpid())
    world.store()
    assert listening_addresses(os.getpid()) - before <= {"0100007F"}


def test_a_port_that_another_job_has_is_one_line_with_the_remedy(only_rank):
    with (
        socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))),
        pytest.raises(ConfigError, match=r"^MASTER_PORT: 127\.0\.0\.1:\d+ cannot be listened on .* --standalone"),
    ):
        world.store()


def test_what_rank_zero_proposes_stays(only_rank, monkeypatch):
    monkeypatch.setattr(world, "agreed", {})
    assert world.agree("name", lambda: "first") == "first"
    monkeypatch.setattr(world, "agreed", {})  # as in a process that torchrun has restarted
    assert world.agree("name", lambda: "second") == "first"


def check_waits(directory):
    mark, store = directory / "mark", dist.distributed_c10d._get_default_store()
    with mock.patch.object(world, "store", return_value=store):  # that of torchrun is not here
        if world.rank() == 0:
            store.get("the other is about to wait")
            mark.touch()
        else:
            store.set("the other is about to wait", "")
        world.wait_for_rank_0("marked")
    assert mark.exists()


def test_nobody_leaves_before_rank_0_has_done_what_is_its_task(ranks, tmp_path):
    ranks(2, check_waits, tmp_path)


def test_a_terminal_shows_a_progress_bar_and_anything_else_does_not(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=screen, force_terminal=True, width=80))
    with console.progress(10, 0, enabled=True) as show:
        show(3, 0.25)
    assert "3/10" in screen.getvalue()
    assert "loss 0.2500" in screen.getvalue()
    monkeypatch.setattr(console, "CONSOLE", Console(file=io.StringIO()))
    with console.progress(10, 0, enabled=True) as show:
        assert show is None


def test_the_layer_and_all_public_names_need_torch_alone_and_not_its_compiler():
    code = """
import sys, syncbn
[getattr(syncbn, name) for name in syncbn.__all__]
extra = {"hydra", "omegaconf", "wandb", "torchmetrics", "sklearn", "rich", "safetensors"} & set(sys.modules)
assert not extra, extra
slow = {"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tracker_closes_after_the_process_group_so_that_no_rank_waits_for_an_upload(
    only_rank, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/a").mkdir(parents=True)
    closed = []
    close = train.Tracker.close

    def watched(self, *, failed):
        closed.append((dist.is_initialized(), failed))
        close(self, failed=failed)

    monkeypatch.setattr(train.Tracker, "close", watched)
    config = compose_config(*SMALL, "duration=1", "run=a")
    run.run(config, tmp_path / "outputs/a")
    assert closed == [(False, False)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK: .* no MASTER_ADDR and no MASTER_PORT; start train.py with torchrun"),
        ({"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: .* no WORLD_SIZE;"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: .* no RANK and .* or unset WORLD_SIZE$"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, None),  # as some clusters set them everywhere
        ({}, None),
    ],
)
def test_half_of_a_launcher_s_variables_is_an_error_that_names_the_other_half(variables, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        world.check_variables()


@pytest.mark.parametrize("task", ["task=eval", "+task=eval", "++task=export"])
def test_a_task_with_load_keeps_what_is_meant_for_the_stored_configuration_from_hydra(task, monkeypatch):
    monkeypatch.setattr(overrides, "_held_back", [])
    assert overrides._hold_back([task, "load=outputs/a", "model.deep=3"]) == [task, "load=outputs/a"]
    assert held_back() == ["model.deep=3"]


@pytest.mark.parametrize("task", ["task=train", "++task=data"])
def test_a_task_without_load_gives_hydra_everything(task, monkeypatch):
    monkeypatch.setattr(overrides, "_held_back", [])
    assert overrides._hold_back([task, "model.deep=3"]) == [task, "model.deep=3"]
    assert held_back() == []
