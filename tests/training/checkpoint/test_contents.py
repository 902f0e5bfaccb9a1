"""What a checkpoint holds is checked when it is read, and whether it fits before anything trains with it."""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.training.checkpoint import contents, files, frozen, state, weights
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.model import InitConfig
from syncbn.training.models.pretrained import Drift, load_subnet
from syncbn.training.trainer.counters import Counters, Totals

RUN = {"step": 3, "config": {"seed": 1}, "model": {"w": torch.zeros(2)}}


def reading(tmp_path, **parts):
    """Writes a checkpoint whose digest fits, and reads it."""
    files.write_atomically(tmp_path / "a.pt", RUN | parts)
    return files.read(tmp_path / "a.pt", "resume")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"step": None}, "step is null, expected a whole number"),
        ({"step": -1}, "step is -1, expected 0 or more"),
        ({"step": 2**70}, "step is a whole number of more than 64 bits"),
        ({"config": [1]}, "config is a list, expected a mapping"),
        ({"model": {1: torch.zeros(1)}}, "model has the key 1, expected a string"),
        ({"model": {"w": "x"}}, "model.w is 'x', expected a tensor"),
        ({"optimizer": {"state": {}}}, "optimizer has no 'param_groups'"),
        ({"optimizer": {"state": {0: 7}, "param_groups": []}}, "optimizer.state.0 is 7, expected a mapping"),
        ({"counters": {"step": "3"}}, "counters.step is '3', expected a whole number or a mapping"),
        ({"counters": {"best": {"loss": None}}}, "counters.best.loss is null, expected a number"),
        ({"data": {"classes": "ab", "mean": 0, "std": 1}}, "data.classes is 'ab', expected a list"),
        ({"drift": {"a": {"bn": [1, 2]}}}, r"drift.a.bn\[0\] is 1, expected a tensor"),
        ({"tracker": {"id": 5, "run": "a"}}, "tracker.id is 5, expected null or a string"),
        ({"frozen": {"a": ["luck"]}}, r"frozen.a\[0\] is 'luck', expected 'stats' or 'affine' or 'weights'"),
        ({"weights": "best"}, "weights is 'best', expected 'raw' or 'ema'"),
    ],
)
def test_a_part_of_another_type_is_an_error_that_names_file_part_and_type(tmp_path, parts, message):
    with pytest.raises(ConfigError, match=rf"^resume: '.*a\.pt' is malformed: {message}$"):
        reading(tmp_path, **parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "is sparse .sparse_coo."),
        (lambda: torch.eye(2).to_sparse_csr(), "is sparse .sparse_csr."),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is quantized"),
        (lambda: torch.zeros(2, device="meta"), "is on the device meta, which has no values"),
        (lambda: torch.nested.as_nested_tensor([torch.zeros(1), torch.zeros(2)]), "is a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of what it calls beta, a prototype or deprecated
def test_a_tensor_that_has_no_digest_is_named(tmp_path, make, message):
    torch.save({**RUN, "model": {"w": make()}, files.DIGEST: "0"}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=rf"a\.pt' is malformed: model\.w {message}; expected a dense tensor"):
        files.read(tmp_path / "a.pt", "resume")


def test_a_tensor_expanded_beyond_all_memory_is_neither_hashed_nor_copied(tmp_path):
    endless = {"running_mean": torch.zeros(1).expand(2**40)}
    for content in ({**RUN, "model": endless, files.DIGEST: "0"}, endless):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ConfigError, match=r"a\.pt' has \d+ bytes and would take more than 16 times as many"):
            files.read(tmp_path / "a.pt", "resume")


def test_small_tensors_that_are_expanded_are_read(tmp_path):
    torch.save({"w": torch.ones(1).expand(8)}, tmp_path / "a.pt")
    assert files.read(tmp_path / "a.pt", "load")["w"].tolist() == [1.0] * 8


def test_what_is_nested_without_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "MAX_ITEMS", 20_000)  # so that it ends soon
    deep, doubled = {}, [0]
    for _ in range(200):
        deep = {"a": deep}
    for _ in range(60):
        doubled = [doubled, doubled]
    for content, message in ((deep, "more than 100 levels"), ({"model": doubled}, "more than 20000 entries")):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ConfigError, match=rf"^load: .*a\.pt' .*{message}"):
            files.read(tmp_path / "a.pt", "load")


def test_attributes_that_a_file_sets_are_gone(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    state._metadata = 5  # torch would ask it for the version of each module
    weight = nn.Parameter(torch.ones(2))
    weight.detach = "x"
    torch.save({"bn": state, "w": weight}, tmp_path / "a.pt")
    content = files.read(tmp_path / "a.pt", "load")
    assert type(content["bn"]) is dict
    assert type(content["w"]) is torch.Tensor
    assert "detach" not in vars(content["w"])


def test_complex_weights_of_a_model_of_ones_own_come_back(tmp_path):
    weights = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(reading(tmp_path, model={"w": weights.conj()})["model"]["w"], weights.conj())


# Into what it is loaded


def loading(part, content, tmp_path):
    state.load_into(part, content, tmp_path / "a.pt", "resume")


def test_an_imaginary_part_is_not_dropped(tmp_path):
    layer = nn.BatchNorm1d(2)
    content = {**layer.state_dict(), "running_mean": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(ConfigError, match=r"a\.pt does not fit .*: running_mean is complex in it"):
        loading(layer, content, tmp_path)


def optimizer():
    made = torch.optim.SGD(nn.Linear(2, 3).parameters(), lr=0.1, momentum=0.9, fused=True)
    for parameter in made.param_groups[0]["params"]:
        made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["state"][0].update(momentum_buffer=torch.zeros(5)), "the momentum_buffer of parameter 0"),
        (lambda state: state["param_groups"][0].update(lr="x"), "no number for lr"),
        (lambda state: state["param_groups"][0].pop("momentum"), "no number for momentum"),
        (lambda state: state["param_groups"].append({"params": []}), "other groups of parameters"),
        (lambda state: state["state"].update({7: {}}), "parameters that it does not list"),
    ],
)
def test_a_state_of_another_optimizer_is_an_error(tmp_path, change, message):
    content = optimizer().state_dict()
    change(content)
    with pytest.raises(ConfigError, match=rf"a\.pt does not fit .*: .*{message}"):
        loading(optimizer(), content, tmp_path)


def test_how_an_optimizer_computes_is_not_the_file_s_business_its_numbers_are(tmp_path):
    content = optimizer().state_dict()
    content["param_groups"][0].update(lr=0.7, fused=False, foreach=True, luck=7)
    loaded = optimizer()
    loading(loaded, content, tmp_path)
    [group] = loaded.param_groups
    assert (group["lr"], group["fused"], group["foreach"]) == (0.7, True, None)
    assert "luck" not in group


def test_a_schedule_takes_numbers_and_no_methods(tmp_path):
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0)
    loading(schedule, schedule.state_dict() | {"last_epoch": 5, "step": 7, "optimizer": None}, tmp_path)
    assert schedule.last_epoch == 5
    assert callable(schedule.step)
    assert schedule.optimizer is not None
    with pytest.raises(ConfigError, match="has 2 base_lrs, expected 1"):
        loading(schedule, schedule.state_dict() | {"base_lrs": [0.1, 0.1]}, tmp_path)


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        (Counters(), {"step": 1}, "its counters lack, or have besides, best, best_step"),
        (Counters(), {**Counters().state_dict(), "best": 5}, "best of its counters is 5"),
        (Totals(torch.device("cpu")), {"values": torch.zeros(1)}, "it has 1 totals, expected 4"),
        (frozen.FrozenSwitches(nn.Sequential()), {"nose": ["stats"]}, "frozen what the model does not have, 'nose'"),
        (frozen.FrozenSwitches(nn.Sequential(nn.Linear(1, 1))), {"0": ["stats"]}, "the statistics of '0', which has"),
    ],
)
def test_a_state_that_a_part_cannot_take_is_one_line(tmp_path, part, content, message):
    before = part.state_dict()
    with pytest.raises(ConfigError, match=rf"^resume: .*a\.pt does not fit this configuration: .*{message}"):
        loading(part, content, tmp_path)
    assert str(part.state_dict()) == str(before)


def test_drift_is_measured_from_layers_of_the_model(tmp_path):
    model, drift = nn.Sequential(nn.Sequential(SyncBatchNorm(3))), Drift()
    drift.remember(model, "0")
    drift.require_layers(model)
    for other in ({"nose": {"0": [torch.zeros(3)] * 2}}, {"0": {"0": [torch.zeros(4)] * 2}}):
        drift.load_state_dict(other)
        with pytest.raises(ValueError, match="which are none of the model"):
            drift.require_layers(model)


def test_a_best_model_of_another_form_is_passed_over(tmp_path, caplog):
    model = nn.Linear(2, 2)
    checkpoints = state.Checkpoints(tmp_path / "checkpoints", 1, facts={"config": {}}, model=model)
    checkpoints.save_best(4, nn.Linear(2, 3))
    checkpoints.wait()
    assert checkpoints.find_best(tmp_path / "elsewhere.pt", 4) is None
    assert "best.pt does not fit the model; it is passed over" in caplog.text
    checkpoints.save_best(4, model)
    checkpoints.wait()
    assert checkpoints.find_best(tmp_path / "elsewhere.pt", 4) == tmp_path / "checkpoints/best.pt"
    checkpoints.close()


# A state dict from elsewhere


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(1)}, "it has the key 1; expected names of tensors"),
        ({"a": 5}, "'a' is a int"),
        ({"model": {}}, "it holds no tensor"),
        ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "has 'a' twice, with and without a prefix"),
    ],
)
def test_a_dict_that_is_no_state_dict_says_why(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=rf"^init\.a\.path: '.*a\.pt' .*{message}"):
        weights.read_model_weights(tmp_path / "a.pt", "init.a.path")


def test_a_tensor_may_be_named_like_a_wrapper(tmp_path):
    torch.save({"module": torch.zeros(1), "module._orig_mod": torch.ones(1)}, tmp_path / "a.pt")
    assert list(weights.read_model_weights(tmp_path / "a.pt", "PATH")) == ["module", "_orig_mod"]


def test_of_a_state_dict_only_what_is_loaded_has_to_be_usable(tmp_path):
    target = nn.Sequential(nn.BatchNorm1d(2))
    good = {f"0.{key}": value for key, value in nn.BatchNorm1d(2).state_dict().items()}
    config = InitConfig(str(tmp_path / "a.pt"), strict=False)
    torch.save({**good, "0.table": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    load_subnet(target, "0", config)
    torch.save({**good, "0.running_var": torch.ones(2, dtype=torch.complex64)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"init\.0\.path: .*cannot be used: running_var has the type complex64"):
        load_subnet(target, "0", config)


def test_a_name_in_an_error_is_printable_and_short():
    assert contents.clipped("a\n" * 99) == "a\\n" * 32 + "a..."
