"""Checkpoints are written whole or not at all, and read without running code from the file."""

import pickle

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.training import state
from syncbn.training.config import ConfigError, InitConfig
from syncbn.training.models import load_subnet


def make_checkpoints(directory, keep=2):
    model = nn.Sequential(nn.Linear(2, 3), SyncBatchNorm(3))
    parts = {"model": model, "frozen": state.FrozenSwitches(model)}
    return model, state.Checkpoints(directory / "checkpoints", keep, **parts)


def test_the_newest_are_kept(tmp_path):
    _, checkpoints = make_checkpoints(tmp_path)
    for step in (5, 100, 20):
        checkpoints.save(step, {})
    assert [path.name for path in checkpoints.all()] == ["step_00000020.pt", "step_00000100.pt"]


def test_state_and_frozen_switches_come_back(tmp_path):
    model, checkpoints = make_checkpoints(tmp_path)
    model[1].freeze(affine=False)
    path = checkpoints.save(7, {"seed": 1})
    other, loading = make_checkpoints(tmp_path)
    assert loading.load(path, "resume") == 7
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[1].stats_frozen
    assert not other[1].affine_frozen


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.pt"
    state.write_atomically(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        state.write_atomically(path, {"step": lambda: None})
    assert state.read(path, "load") == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


class Exploit:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps(Exploit())], ids=["empty", "text", "pickle"]
)
def test_a_file_that_is_no_checkpoint_is_an_error_that_names_the_key(tmp_path, content, capsys):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"load: .*a.pt' is not a readable checkpoint"):
        state.read(path, "load")
    assert capsys.readouterr().out == ""


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, width), SyncBatchNorm(width))
        self.head = nn.Linear(width, 2)


@pytest.mark.parametrize("whole_model", [True, False])
def test_a_sub_network_is_loaded_from_a_whole_model_or_its_own_state(tmp_path, whole_model):
    source, target = Net(), Net()
    source.backbone[1].running_mean.fill_(3.0)
    torch.save(source.state_dict() if whole_model else source.backbone.state_dict(), tmp_path / "a.pt")
    head = target.head.weight.clone()
    assert "loaded 7 tensors into backbone" in load_subnet(target, "backbone", InitConfig(str(tmp_path / "a.pt")))
    assert torch.equal(target.backbone[0].weight, source.backbone[0].weight)
    assert torch.equal(target.backbone[1].running_mean, torch.full((3,), 3.0))
    assert torch.equal(target.head.weight, head)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("backbone.1.running_mean"), r"lacks 1.running_mean; expected the state of backbone"),
        (lambda s: s.update({"backbone.x": torch.zeros(1)}), "has besides x"),
        (lambda s: s.update({"backbone.0.weight": torch.zeros(9, 9)}), "has in another shape 0.weight"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_that_names_the_keys(tmp_path, damage, message):
    content = Net().state_dict()
    damage(content)
    torch.save(dict(content), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=f"init.backbone.path: .*{message}"):
        load_subnet(Net(), "backbone", InitConfig(str(tmp_path / "a.pt")))
