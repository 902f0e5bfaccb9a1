"""Several machines: hosts with addresses of their own train one model, are cut off, die, and are replaced."""

import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from tests.deploy.hosts import Network
from tests.training.jobs import ROOT, LiveJob, read_metrics, start
from tests.training.trainer.test_train import load_last

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(240)]

STEPS, SAVE_EVERY = 300, 10
DATA = ["data=synthetic", "data.num_samples=400", "data.size=16", "data.shift=1", "batch_size=16"]
JOB = [*DATA, f"duration={STEPS}", "log_every=1", "eval_every=50", f"save.every={SAVE_EVERY}", "tracker=none",
       "run=job", "precision=fp64", "collective_timeout=5"]  # fmt: skip
WIDTH = ["model.width=8"]
# A dead node is missed after 3 s; a joining one does not make the others wait for a further one.
QUICK = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=90"
STORE = "store:29400"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run directory of the job on one machine with two ranks, when nothing happens to it."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = start(cwd, *JOB, *WIDTH, num_ranks=2)
    assert done.returncode == 0, done.stderr
    return cwd / "outputs/job"


@pytest.fixture
def network():
    with Network() as made:
        yield made


@pytest.fixture
def store(network):
    """A rendezvous store on an address of its own."""
    host = network.host("store")
    command = [*host.prefix(ROOT), sys.executable, "docker/cluster/store.py", "29400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "rendezvous store on port 29400\n"
        yield host
        host.switch_off()


@contextmanager
def node(host, cwd, overrides=WIDTH, endpoint=STORE, nodes="2", num_ranks=1):
    """torchrun on a host, one node of the job."""
    options = ("--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test",
               "--rdzv-conf", QUICK, "--max-restarts", "3")  # fmt: skip
    share = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with LiveJob(
        cwd, *JOB, *overrides, num_ranks=num_ranks, options=options, prefix=host.prefix(cwd), timeout=200, **share
    ) as job:
        yield job


def records_of(run_dir):
    return [{k: v for k, v in r.items() if k != "train/samples_per_second"} for r in read_metrics(run_dir)]


def check_same_bits(run_dir, expected):
    ours, theirs = load_last(run_dir), load_last(expected)
    assert ours["step"] == theirs["step"]
    assert all(torch.equal(ours["model"][key], value) for key, value in theirs["model"].items())
    assert records_of(run_dir) == records_of(expected)  # every step once, with the same numbers


def check_same_trajectory(run_dir, expected):
    ours, theirs = load_last(run_dir), load_last(expected)
    assert ours["step"] == theirs["step"]
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(records_of(run_dir), records_of(expected), strict=True):
        assert of_any_world(ours) == pytest.approx(of_any_world(theirs), rel=1e-6, abs=1e-8)


def of_any_world(record):
    """Without what one rank alone does not have: differences between ranks."""
    return {key: value for key, value in record.items() if not key.endswith("between_rank_share")}


def check_little_lost(output, before):
    """That the job went on from a checkpoint that was due, at most, one save before step `before`."""
    resumed = [int(step) for step in re.findall(r"resumed from \S+ at step (\d+)", output)]
    # One that was being written when the node died does not count.
    assert resumed
    assert resumed[-1] > before - 2 * SAVE_EVERY


def last_step(output):
    return max(int(step) for step in re.findall(r"step (\d+)/", output))


def test_two_nodes_of_two_ranks_train_as_one_machine_of_four_and_hold_the_same_bits(network, tmp_path):
    (tmp_path / "witness.py").write_text(WITNESS)
    net = ["model=custom", "model._target_=witness.Net", "duration=40", "eval_every=20"]
    done = start(tmp_path, *JOB, *net, "run=expected", num_ranks=4)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.glob("digests-*"):
        path.unlink()
    a, b = network.host("a"), network.host("b")
    with (
        node(a, tmp_path, net, endpoint="a:29400", num_ranks=2) as first,
        node(b, tmp_path, net, endpoint="a:29400", num_ranks=2) as second,
    ):
        assert first.finish() == 0, first.output
        assert second.finish() == 0, second.output
    assert "4 rank(s) on cpu" in first.output
    check_same_bits(tmp_path / "outputs/job", tmp_path / "outputs/expected")
    digests = [path.read_text() for path in sorted(tmp_path.glob("digests-*"))]
    assert len(digests) == 4
    assert len(digests[0].split()) >= 3
    assert len(set(digests)) == 1


def test_a_node_that_is_cut_off_and_comes_back_goes_on_with_the_others(network, store, tmp_path, undisturbed):
    a, b = network.host("a"), network.host("b")
    with node(a, tmp_path) as first, node(b, tmp_path) as second:
        first.wait_for("step 30/")
        b.cut()
        first.wait_for("in a collective for longer than collective_timeout allows")
        b.mend()
        assert first.finish() == 0, first.output
        assert second.finish() == 0, second.output
    check_little_lost(first.output, 30)
    check_same_bits(tmp_path / "outputs/job", undisturbed)


def test_a_node_that_dies_is_replaced_by_a_new_one(network, tmp_path, undisturbed):
    a, b, c = (network.host(name) for name in "abc")
    with node(a, tmp_path, endpoint="a:29400") as first, node(b, tmp_path, endpoint="a:29400"):
        first.wait_for("step 30/")
        b.cut()  # a power cut says goodbye to nobody
        b.switch_off()
        with node(c, tmp_path, endpoint="a:29400") as third:
            assert first.finish() == 0, first.output
            assert third.finish() == 0, third.output
    check_little_lost(first.output, 30)
    check_same_bits(tmp_path / "outputs/job", undisturbed)


def test_without_the_node_that_holds_the_store_all_end_and_go_on_when_they_are_started_again(
    network, tmp_path, undisturbed
):
    a, b, c = (network.host(name) for name in "abc")
    # A store that has fallen silent is given up when the kernel gives up sending to it: by default after a quarter of
    # an hour, here after some seconds.
    sysctl = ("sysctl", "--quiet", "--write", "net.ipv4.tcp_retries2=3")
    subprocess.run([*b.prefix(tmp_path), *sysctl], check=True, timeout=20)
    with node(a, tmp_path, endpoint="a:29400") as first, node(b, tmp_path, endpoint="a:29400") as second:
        first.wait_for("step 30/")
        a.cut()
        a.switch_off()
        assert second.finish() != 0, second.output
    with node(c, tmp_path, endpoint="c:29400") as third, node(b, tmp_path, endpoint="c:29400") as second:
        assert third.finish() == 0, third.output
        assert second.finish() == 0, second.output
    check_little_lost(third.output + second.output, 30)  # rank 0, which says so, may be on either
    check_same_bits(tmp_path / "outputs/job", undisturbed)


def test_with_the_store_elsewhere_the_node_of_rank_zero_may_die_too(network, store, tmp_path, undisturbed):
    a, b, c = (network.host(name) for name in "abc")
    with node(a, tmp_path) as first, node(b, tmp_path) as second:
        first.wait_for("step 30/")
        a.cut()
        a.switch_off()
        with node(c, tmp_path) as third:
            assert second.finish() == 0, second.output
            assert third.finish() == 0, third.output
    check_little_lost(second.output, 30)
    check_same_bits(tmp_path / "outputs/job", undisturbed)


def test_one_of_two_nodes_goes_on_alone_and_takes_another_in_along_the_same_trajectory(
    network, store, tmp_path, undisturbed
):
    a, b, c = (network.host(name) for name in "abc")
    with node(a, tmp_path, nodes="1:2") as first:
        with node(b, tmp_path, nodes="1:2"):
            first.wait_for("2 rank(s) on cpu")
            first.wait_for("step 30/")
            b.cut()
            b.switch_off()
        first.wait_for("1 rank(s) on cpu")
        check_little_lost(first.output, 30)
        with node(c, tmp_path, nodes="1:2") as third:
            first.wait_for("2 rank(s) on cpu")
            assert first.finish() == 0, first.output
            assert third.finish() == 0, third.output
    check_same_trajectory(tmp_path / "outputs/job", undisturbed)


# A network that writes down, at every evaluation, what each rank holds.
WITNESS = """
import hashlib
import os
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)
        )

    def forward(self, x):
        if not self.training and "RANK" in os.environ:
            digest = hashlib.sha256()
            for value in self.state_dict().values():
                digest.update(value.detach().cpu().numpy().tobytes())
            with open(f"digests-{os.environ['RANK']}", "a") as file:
                file.write(digest.hexdigest() + "\\n")
        return super().forward(x)
"""
