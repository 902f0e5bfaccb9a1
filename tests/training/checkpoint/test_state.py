"""Checkpoints are written whole or not at all, and read without running code from the file."""

import os
import pickle
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.training.checkpoint import files, frozen, state
from syncbn.training.config.errors import ConfigError, RankError
from syncbn.training.config.model import InitConfig
from syncbn.training.models.pretrained import Drift, load_subnet


def make_checkpoints(directory, keep=2):
    model = nn.Sequential(nn.Linear(2, 3), SyncBatchNorm(3))
    parts = {"model": model, "frozen": frozen.FrozenSwitches(model)}
    return model, state.Checkpoints(directory / "checkpoints", keep, facts={"config": {}}, **parts)


def test_the_newest_are_kept(tmp_path):
    _, checkpoints = make_checkpoints(tmp_path)
    for step in (5, 20, 100):
        checkpoints.save(step)
    checkpoints.close()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000020.pt", "step_00000100.pt"]


def test_a_damaged_file_of_a_later_step_does_not_push_out_what_is_saved(tmp_path):
    _, checkpoints = make_checkpoints(tmp_path, keep=1)
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "step_00000010.pt").write_bytes(b"half of it")
    for step in (2, 4, 6):
        checkpoints.save(step)
    checkpoints.close()
    assert files.newest(tmp_path).path == directory / "step_00000006.pt"
    assert not (directory / "step_00000004.pt").exists()


def test_beginning_sets_a_future_aside_and_clears_what_a_kill_has_left(tmp_path):
    _, checkpoints = make_checkpoints(tmp_path, keep=9)
    for step in (2, 4, 6):
        checkpoints.save(step)
    checkpoints.wait()
    (tmp_path / "checkpoints/.step_00000008.pt.123.tmp").write_bytes(b"half of it")
    checkpoints.begin(4)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000002.pt", "step_00000004.pt", "step_00000006.pt.abandoned"]
    checkpoints.close()


def test_state_and_frozen_switches_come_back(tmp_path):
    model, checkpoints = make_checkpoints(tmp_path)
    model[1].freeze(affine=False)
    checkpoints.save(7)
    checkpoints.close()
    path = tmp_path / "checkpoints/step_00000007.pt"
    other, loading = make_checkpoints(tmp_path)
    assert loading.load(files.StoredCheckpoint.read(path, "resume"), "resume") == 7
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[1].stats_frozen
    assert not other[1].affine_frozen


def test_what_the_state_has_free_is_free_again(tmp_path):
    _, checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(7)
    checkpoints.close()
    other, loading = make_checkpoints(tmp_path)
    other[1].freeze()
    loading.load(files.StoredCheckpoint.read(tmp_path / "checkpoints/step_00000007.pt", "resume"), "resume")
    assert not other[1].stats_frozen
    assert other[1].weight.requires_grad


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_for_the_newest_good_one(tmp_path, caplog):
    _, checkpoints = make_checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(step)
    checkpoints.close()
    paths = [tmp_path / f"checkpoints/step_{step:08d}.pt" for step in (1, 2, 3, 4, 5)]
    paths[4].write_bytes(paths[4].read_bytes()[:-100])  # truncated
    torch.save({"hello": 1}, paths[3])  # foreign
    content = torch.load(paths[2], weights_only=True)
    content["model"]["0.weight"][0, 0] += 1e-3  # tampered with
    torch.save(content, paths[2])
    assert files.newest(tmp_path).path == paths[1]
    assert len(caplog.records) == 3
    assert "has been changed since it was written" in caplog.text
    with pytest.raises(ConfigError, match=r"load: .*its digest does not fit"):
        files.read(paths[2], "load")
    del content["sha256"]
    torch.save(content, paths[2])
    with pytest.raises(ConfigError, match=r"load: .*its digest"):
        files.read(paths[2], "load")


def test_saving_copies_so_that_training_may_go_on_at_once(tmp_path, monkeypatch):
    changed = threading.Event()

    def write_later(path, content):
        assert changed.wait(timeout=60)
        files.write_atomically(path, content)

    monkeypatch.setattr(state, "write_atomically", write_later)
    model, checkpoints = make_checkpoints(tmp_path)
    expected = model[0].weight.clone()
    checkpoints.save(1)
    with torch.no_grad():
        model[0].weight.add_(1.0)  # before it is written
    changed.set()
    checkpoints.close()
    saved = files.read(tmp_path / "checkpoints/step_00000001.pt", "load")
    assert torch.equal(saved["model"]["0.weight"], expected)


def test_a_full_disk_is_reported_at_once_fails_the_job_at_its_end_and_keeps_the_last_good_one(
    tmp_path, caplog, monkeypatch
):
    _, checkpoints = make_checkpoints(tmp_path)
    checkpoints.save(1)
    checkpoints.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    checkpoints.save(2)
    checkpoints.wait()
    assert "step_00000002.pt failed, the last good checkpoint stays: [Errno 28] No space left" in caplog.text
    with pytest.raises(RankError, match=r"^a checkpoint could not be written: \S+step_00000002.pt: .*No space left.*"
                                        r" goes on from \S+step_00000001.pt, the last good checkpoint$"):  # fmt: skip
        checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001.pt"]


def test_the_digest_depends_on_every_key_type_shape_and_byte():
    tensors = [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.int32), torch.tensor([0.0, 1e-45])]
    plain = [[1, 2], [1, [2]], 1, 1.0, True, None]
    values = [{}, {"b": torch.zeros(2)}, *({"a": value} for value in (*tensors, *plain))]
    assert len({files.digest(value) for value in values}) == len(values)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, flushed = tmp_path / "a.pt", []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(path.exists()))
    files.write_atomically(path, {"step": 1})
    assert flushed == [False, True]  # the file, and the directory that names it


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.pt"
    files.write_atomically(path, {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        files.write_atomically(path, {"step": lambda: None})
    assert files.read(path, "load") == {"step": 1}
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
        files.read(path, "load")
    assert capsys.readouterr().out == ""


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, width), SyncBatchNorm(width))
        self.head = nn.Linear(width, 2)


def save(state, directory, kind):
    path = directory / f"a.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(dict(state), path)
    else:
        torch.save({"state_dict": state} if kind == "wrapped" else dict(state), path)
    return path


SOURCES = {
    "compiled in DDP": lambda net: {f"_orig_mod.module.{key}": value for key, value in net.state_dict().items()},
    "with a compiled part": lambda net: {
        k.replace("backbone.", "backbone._orig_mod."): v for k, v in net.state_dict().items()
    },
    "its own state": lambda net: net.backbone.state_dict(),
    "a whole model": lambda net: net.state_dict(),
    "a model in DDP": lambda net: {f"module.{key}": value for key, value in net.state_dict().items()},
}


@pytest.mark.parametrize("kind", ["torch", "safetensors", "wrapped"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_sub_network_is_loaded_from_any_state_dict(tmp_path, source, kind):
    donor, target = Net(), Net()
    donor.backbone[1].running_mean.fill_(3.0)
    head = target.head.weight.clone()
    report = load_subnet(target, "backbone", InitConfig(str(save(SOURCES[source](donor), tmp_path, kind))))
    assert len(report.loaded) == 7
    assert report.problems() == []
    assert torch.equal(target.backbone[0].weight, donor.backbone[0].weight)
    assert torch.equal(target.backbone[1].running_mean, torch.full((3,), 3.0))
    assert torch.equal(target.head.weight, head)


def test_a_prefix_of_ones_own(tmp_path):
    donor, target = Net(), Net()
    path = save({f"encoder.net.{k}": v for k, v in donor.backbone.state_dict().items()}, tmp_path, "torch")
    load_subnet(target, "backbone", InitConfig(str(path), prefix="encoder.net."))
    assert torch.equal(target.backbone[0].weight, donor.backbone[0].weight)
    with pytest.raises(
        ConfigError, match=r"init.backbone.prefix: no key of .* begins with 'enc\.'; they begin with encoder\."
    ):
        load_subnet(target, "backbone", InitConfig(str(path), prefix="enc."))


DAMAGE = {
    "missing": (lambda s: s.pop("backbone.1.weight"), "lacks 1.weight"),
    "unexpected": (lambda s: s.update({"backbone.x": torch.zeros(1)}), "has besides x"),
    "mismatched": (lambda s: s.update({"backbone.0.weight": torch.zeros(9, 9)}), "has in another shape 0.weight"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_an_error_or_a_warning_that_names_the_keys(tmp_path, kind, caplog):
    damage, message = DAMAGE[kind]
    content = dict(Net().state_dict())
    damage(content)
    path = save(content, tmp_path, "torch")
    with pytest.raises(ConfigError, match=rf"init.backbone.path: .*{message}; .*or set init.backbone.strict=false"):
        load_subnet(Net(), "backbone", InitConfig(str(path)))
    report = load_subnet(Net(), "backbone", InitConfig(str(path), strict=False))
    assert [len(getattr(report, name)) for name in DAMAGE] == [int(name == kind) for name in DAMAGE]
    assert message in caplog.text


def test_missing_running_statistics_are_called_out(tmp_path, caplog):
    content = dict(Net().backbone.state_dict())
    del content["1.running_var"]
    load_subnet(Net(), "backbone", InitConfig(str(save(content, tmp_path, "torch")), strict=False))
    assert "these layers normalize with mean 0 and variance 1: 1.running_var" in caplog.text


def test_a_state_of_which_nothing_fits_is_an_error_also_where_it_need_not_be_strict(tmp_path):
    path = save({"a": torch.zeros(3)}, tmp_path, "torch")
    with pytest.raises(ConfigError, match=r"nothing in .* fits backbone: it lacks .*; it has besides a"):
        load_subnet(Net(), "backbone", InitConfig(str(path), strict=False))


def test_a_state_from_before_the_counter_existed_fits_and_a_counter_alone_does_not(tmp_path):
    content = dict(Net().backbone.state_dict())
    counter = content.pop("1.num_batches_tracked")
    assert load_subnet(Net(), "backbone", InitConfig(str(save(content, tmp_path, "torch")))).problems() == []
    path = save({"1.num_batches_tracked": counter}, tmp_path, "torch")
    with pytest.raises(ConfigError, match=r"nothing in .* fits backbone"):
        load_subnet(Net(), "backbone", InitConfig(str(path), strict=False))


def named(state, old="", new=""):
    return {new + k.removeprefix(old) if k.startswith(old) else k: value for k, value in state.items()}


NAMES = {
    "key": (lambda s: {"ema": s, "state_dict": Net().state_dict()}, {"key": "ema"}),
    "nested key": (lambda s: {"a": {"b": s}}, {"key": "a.b"}),
    "wrapped in a model": (lambda s: named(s, new="model."), {}),
    "prefix": (lambda s: named(s, new="net."), {"prefix": "net"}),
    "rename": (
        lambda s: named(named(s, "head", "fc"), "backbone.1", "bn"),
        {"rename": {"fc.": "head.", "bn": "backbone.1"}},
    ),
    "a child": (lambda s: named(named(s, "backbone."), "head.", "h."), {"rename": {"h": "head", ".": "backbone"}}),
    "both": (
        lambda s: named(named(s, "backbone", "net.enc"), "head", "net.fc") | {"other": torch.ones(1)},
        {"prefix": "net", "rename": {"enc": "backbone", "fc": "head"}},
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_whole_model_is_loaded_whatever_its_names_in_the_file(tmp_path, case):
    wrap, options = NAMES[case]
    donor, target = Net(), Net()
    torch.save(wrap(donor.state_dict()), tmp_path / "a.pt")
    assert len(load_subnet(target, "model", InitConfig(str(tmp_path / "a.pt"), **options)).loaded) == 9
    torch.testing.assert_close(target.state_dict(), donor.state_dict(), rtol=0, atol=0)


def test_another_number_of_classes_is_one_line_with_the_flag_that_leaves_the_head_out(tmp_path, caplog):
    donor, target = Net(), Net()
    donor.head = nn.Linear(3, 1000)
    path, before = save(donor.state_dict(), tmp_path, "torch"), target.head.weight.clone()
    with pytest.raises(
        ConfigError,
        match=r"^init.model.path: .* has weights for other classes: head.weight is of 1000, expected 2;"
        r" init.model.skip=head loads the rest",
    ):
        load_subnet(target, "model", InitConfig(str(path)))
    with caplog.at_level("INFO"):
        load_subnet(target, "model", InitConfig(str(path), skip="head"))
    assert "init.model: 7 of 9 tensors loaded from" in caplog.text
    assert "2 skipped: head.weight, head.bias" in caplog.text
    assert torch.equal(target.head.weight, before)
    assert torch.equal(target.backbone[0].weight, donor.backbone[0].weight)


@pytest.mark.parametrize(
    ("name", "skip", "num"),
    [("model", ["head", "fc", "backbone.1"], 2), ("backbone", "backbone.1", 2), ("backbone", "1.*", 2)],
)
def test_skip_leaves_out_what_only_the_file_or_only_the_model_has(tmp_path, name, skip, num):
    state = named(Net().state_dict(), "head", "fc")
    del state["backbone.1.weight"]
    path = str(save(state, tmp_path, "torch"))
    with pytest.raises(
        ConfigError, match=r"lacks (backbone\.)?1\.weight.*; init\.\w+\.skip=.* leaves these out, or set"
    ):
        load_subnet(Net(), name, InitConfig(path))
    assert len(load_subnet(Net(), name, InitConfig(path, skip=skip)).loaded) == num


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "ema"}, r"init.model.key: .* has no state dict 'ema'; it has weights, other"),
        ({}, r"init.model.path: .* is not a state dict of tensors, 'weights' is a dict; init.model.key=weights takes"),
        (
            {"key": "weights", "rename": {"body": "b"}},
            r"init.model.rename: no key of .* begins with 'body'; they begin",
        ),
        ({"key": "weights", "rename": {"backbone": "", "head": ""}, "strict": False}, r"fits model: .* nearest"),
        (
            {"key": "weights", "rename": {"backbone.0": "head"}},
            r"rename: gives backbone.0.weight and head.weight .* one",
        ),
        (
            {"key": "weights", "skip": "hed"},
            r"init.model.skip: 'hed' is neither in the model nor .*did you mean head\?",
        ),
        ({"key": "inner", "strict": False}, r"\(init.model.rename={.: backbone}\)"),
        ({"key": "other", "strict": False}, r"nearest names: x.backbone.0.weight for .*\(init.model.prefix=x\)"),
    ],
)
def test_a_key_of_init_that_fits_nothing_is_one_line(tmp_path, options, message):
    state = Net().state_dict()
    torch.save(
        {"weights": state, "other": named(state, new="x."), "inner": Net().backbone.state_dict()}, tmp_path / "a.pt"
    )
    with pytest.raises(ConfigError, match=message) as error:
        load_subnet(Net(), "model", InitConfig(str(tmp_path / "a.pt"), **options))
    assert "\n" not in str(error.value)


def test_drift_is_the_largest_move_of_a_running_mean_in_running_std():
    model, drift = Net(), Drift()
    model.backbone[1].running_var.fill_(4.0 - 1e-5)
    drift.remember(model, "backbone")
    assert drift.measure(model) == {"drift/backbone": 0.0}
    model.backbone[1].running_mean[1] += 3.0
    restored = Drift()
    restored.load_state_dict(drift.state_dict())
    assert restored.measure(model)["drift/backbone"] == pytest.approx(1.5)
