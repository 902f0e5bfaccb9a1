"""Which network device the ranks use, and what several machines need of the store."""

import logging
import os
from pathlib import Path

import pytest

from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed import network, world
from syncbn.training.launch import process_group, resolvers

NODE = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "a",
        "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_MAX_RESTARTS": "3"}  # fmt: skip
AGENT = "TORCHELASTIC_USE_AGENT_STORE"


class Store(dict):
    """As much of a store as the ranks use here."""

    def set(self, key, value):
        self[key] = value.encode()

    def wait(self, keys, timeout):
        assert all(key in self or self.check([key]) for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def node(monkeypatch):
    """One rank of two machines; the store, in which the other ranks have said what they are called."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", AGENT):
        monkeypatch.setenv(name, "")  # so that what the code under test puts there is taken back
        monkeypatch.delenv(name)
    for name, value in NODE.items():
        monkeypatch.setenv(name, value)
    store = Store()
    monkeypatch.setattr(world, "store", lambda: store)
    monkeypatch.setattr(world, "agreed", {})
    ways = {"a": "127.0.1.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(network, "source_address", ways.get)
    monkeypatch.setattr(network, "addresses_of", lambda name: {"lo": {"127.0.1.1"}}.get(name, {"10.0.0.1"}))
    monkeypatch.setattr(network.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth7")])
    return store


def others(store, *addresses):
    store.update({f"syncbn/address/{rank}": address.encode() for rank, address in enumerate(addresses, start=1)})


def test_the_loopback_device_has_its_address():
    assert "127.0.0.1" in network.addresses_of("lo")
    assert network.addresses_of("no such device") == set()
    assert network.source_address("127.0.0.1") == "127.0.0.1"


def test_a_host_whose_own_name_leads_to_loopback_takes_the_device_that_leads_to_the_others(node):
    others(node, "127.0.1.1", "10.0.0.2", "10.0.0.2")
    network.choose_device()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "NCCL_SOCKET_IFNAME" not in os.environ  # it may use several at once


def test_several_nodes_on_one_machine_stay_on_loopback(node):
    others(node, *["127.0.1.1"] * 3)
    network.choose_device()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_users_own_choice_stays_and_the_others_still_learn_the_address(node, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    others(node, *["127.0.1.1"] * 3)
    network.choose_device()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert node["syncbn/address/0"] == b"127.0.1.1"


def test_a_host_without_a_way_leaves_it_to_gloo(node, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    network.choose_device()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_where_the_store_is_new_at_every_attempt_a_run_needs_a_name(node, monkeypatch):
    with pytest.raises(ConfigError, match=r"run: .*run="):
        resolvers._run_name(Path("outputs"), None)
    assert resolvers._run_name(Path("outputs"), "mine") == "mine"


@pytest.mark.parametrize(
    ("variables", "warns"),
    [
        ({AGENT: "True"}, True),
        ({AGENT: "False"}, False),
        ({AGENT: "True", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({AGENT: "True", "GROUP_WORLD_SIZE": "1"}, False),
        ({AGENT: "True", "RANK": "1"}, False),
    ],
)
def test_a_store_that_keeps_new_nodes_waiting_is_warned_of(node, monkeypatch, caplog, variables, warns):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        process_group._warn_of_lasting_store()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warns


def test_the_attempt_is_rank_zeros_word_where_each_machine_counts_for_itself(node, monkeypatch):
    node.get, node.check = lambda key: b"2", lambda keys: True
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert world.attempt() == "2"
    monkeypatch.setenv(AGENT, "True")
    assert world.attempt() == "0"
