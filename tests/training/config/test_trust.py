"""A file is data: what a checkpoint or a run directory names is not called, unless this clone or this command says so.

Every attack here creates a file, `marker`, if it succeeds, as those in model, data, loss and metrics did in 0.1.0.
"""

import copy
import pickle
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from syncbn.training.checkpoint.files import read, write_atomically
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.trust import Command, check_origin, check_stored
from syncbn.training.launch.config_sources import check_sources
from syncbn.training.tasks import run as tasks
from tests.once import made_once
from tests.training.checkpoint.test_resume import SMALL
from tests.training.jobs import ROOT, compose_config, run_rank, start
from tests.training.trainer.test_train import load_last

MINE = __name__
RECALL = "torchmetrics.classification.MulticlassRecall"


class Net(nn.Sequential):
    def __init__(self, width=4, scale=None, **_):
        super().__init__(nn.Flatten(), nn.LazyLinear(width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))
        self(torch.zeros(2, 3, 8, 8))


class Scale:
    pass


def squared(outputs, targets):
    wanted = nn.functional.one_hot(targets, outputs.shape[1])
    return (outputs - wanted).square().sum(), torch.tensor(float(len(targets)))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(marker):
    """What version 0.1.0 unpickled: the model of the stored configuration."""
    payload = pickle.dumps(Bomb(marker))
    return {"_target_": "torch.load", "f": {"_target_": "io.BytesIO", "_args_": [payload]}, "weights_only": False}


def opened(marker):
    """A call that creates the file, without positional arguments."""
    return {"_target_": "builtins.open", "file": str(marker), "mode": "w"}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run with a metric that ships with a `_target_`; not to be changed."""
    make = lambda cwd: run_rank(cwd, (*SMALL, "metrics=per_class", "duration=2", "run=first"))  # noqa: E731
    return made_once(tmp_path_factory, "trusted", make)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def manipulated(trained, tmp_path):
    """`manipulated(**changes)`: a copy of the run whose stored configurations have other values at these root keys."""

    def change(**changes):
        copied = tmp_path / "outputs/copied"
        shutil.copytree(trained, copied)
        for path in copied.rglob("*.pt"):
            content = read(path, "load")
            content["config"] |= copy.deepcopy(changes)
            write_atomically(path, content)  # with a digest that fits
        return copied

    return change


def newest(run):
    return sorted(run.glob("checkpoints/step_*.pt"))[-1]


LOADING = ["task=eval", "task=export", pytest.param("task=audit", marks=pytest.mark.slow),
           pytest.param("task=recalibrate", marks=pytest.mark.slow)]  # fmt: skip


@pytest.mark.parametrize("task", LOADING)
def test_no_task_calls_what_a_checkpoint_names(job, manipulated, marker, task):
    run = manipulated(model=pickled(marker))
    for path in (run, newest(run)):
        with pytest.raises(ConfigError, match=r"^load: \S+ names code that neither this clone nor this command does"):
            job(task, f"load={path}", "run=other")
    assert not marker.exists()


@pytest.mark.parametrize("resume", ["resume=PATH", "resume=DIRECTORY", "run=copied"])
def test_no_resumed_run_calls_what_a_checkpoint_names(job, manipulated, marker, resume):
    run = manipulated(model=pickled(marker))
    places = {"resume=PATH": f"resume={newest(run)}", "resume=DIRECTORY": f"resume={run}", "run=copied": "run=copied"}
    own = [] if resume == "run=copied" else ["run=other"]
    with pytest.raises(ConfigError, match=r"^resume: \S+ names code that neither this clone nor this command does"):
        job(places[resume], *own, "duration=3", "tracker=none")
    assert not marker.exists()


def at_every_place(call):
    """Root keys of a configuration that names `call`, one place each, and the key of it."""
    inside = {"_target_": RECALL, "average": call}
    named = {"name": "resnet_small", "width": call, "depth": 1, "stages": 3, "norm": "batch"}
    return {
        "model": ({"model": call}, "model"),
        "data": ({"data": {**call, "workers": 0, "prefetch": 2}}, "data"),
        "loss": ({"loss": call}, "loss"),
        "metric": ({"metrics": {"mine": call}}, "metrics.mine"),
        "inside of a shipped node": ({"metrics": {"recall": inside}}, "metrics.recall.average"),
        "inside of a named choice": ({"model": named}, "model.width"),
        "in a list": ({"metrics": {"recall": {**inside, "average": [None, call]}}}, "metrics.recall.average.1"),
        "in a group that takes none": ({"tracker": {"mode": call}}, "tracker.mode"),
        "in a group that is not read": ({"init": {"head": {"path": call}}}, "init.head.path"),
    }


@pytest.mark.parametrize("place", at_every_place({}))
def test_no_key_of_a_checkpoint_names_what_is_called(job, manipulated, marker, place):
    changes, key = at_every_place(opened(marker))[place]
    run = manipulated(**changes)
    for words in (["task=eval", f"load={run}"], [f"resume={run}", "tracker=none", "duration=3"]):
        with pytest.raises(ConfigError, match=rf"this command does: .*\b{re.escape(key)}\._target_=builtins\.open;"):
            job(*words, "run=other")
    assert not marker.exists()


def test_an_interpolation_in_a_checkpoint_is_not_resolved(job, manipulated, monkeypatch):
    monkeypatch.setenv("SOME_VALUE", "of this machine")
    run = manipulated(best="${oc.env:SOME_VALUE}")
    for words in (["task=eval", f"load={run}"], [f"resume={run}", "duration=3"]):
        with pytest.raises(ConfigError, match=r"^\w+: \S+ holds what is never taken from a file: best=") as caught:
            job(*words, "run=other", "tracker=none")
        assert "of this machine" not in str(caught.value)
    job("task=eval", f"load={run}", "best=loss", "run=other", "tracker=none")  # the command's own


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_shipped_run_is_evaluated_and_goes_on_without_a_word(job, trained, tmp_path, num_ranks):
    shutil.copytree(trained, tmp_path / "outputs/first")
    job("task=eval", "load=outputs/first", "run=second", num_ranks=num_ranks)
    job("run=first", "duration=3", num_ranks=num_ranks)
    assert load_last(tmp_path / "outputs/first")["step"] == 3


def check_is_refused(cwd, load):
    with pytest.raises(ConfigError, match=r"^load: \S+ names code") as caught:
        run_rank(cwd, ("task=eval", f"load={load}", "run=other"))
    return str(caught.value)


def test_every_rank_refuses_with_the_same_words(ranks, manipulated, marker, tmp_path):
    run = manipulated(model=opened(marker))
    assert len(set(ranks(2, check_is_refused, tmp_path, run))) == 1
    assert not marker.exists()


def words_of(error):
    """What the message says to append, as a shell reads it."""
    return shlex.split(re.search(r"append ('trust=\[.*?\]'|trust=\S+?)[,; ]", str(error))[1])


def test_a_run_of_ones_own_package_is_evaluated_with_the_words_that_the_error_hands_out(job, tmp_path):
    small = [option for option in SMALL if option != "model.width=4"]
    own = [*small, "model=custom", f"model._target_={MINE}.Net", f"+model.scale={{_target_:{MINE}.Scale}}",
           "bn.sync=false", "loss=custom", f"loss._target_={MINE}.squared", "+loss._partial_=true"]  # fmt: skip
    run = job(*own, "metrics=per_class", "duration=2", "run=mine")
    evaluate = ["task=eval", f"load={run}", "run=other"]
    with pytest.raises(ConfigError) as caught:
        job(*evaluate)
    names = f"{MINE}.Net", f"{MINE}.Scale", f"{MINE}.squared"
    for key, name in zip(("model", "model.scale", "loss"), names, strict=True):
        assert f"{key}._target_={name}" in str(caught.value)
    assert "give it on the command line: loss._partial_=true" in str(caught.value)
    assert words_of(caught.value) == [f"trust=[{','.join(names)}]"]
    assert job(*evaluate, *words_of(caught.value), "loss._partial_=true")
    assert job(*evaluate[:2], f"trust=[{MINE}.*]", "loss._partial_=true", "run=third")
    job(*own, "metrics=per_class", "duration=3", "run=mine")  # the same command needs no words
    assert load_last(run)["step"] == 3
    with pytest.raises(ConfigError, match=r"^resume: "):
        job("run=mine", "duration=4")


def test_a_target_that_this_command_gives_takes_the_place_of_the_files(job, manipulated, marker):
    run = manipulated(model=opened(marker))
    with pytest.raises(ConfigError, match=r"^model\._target_="):  # not for its code: `open` had other arguments
        job("task=eval", f"load={run}", f"model._target_={MINE}.Scale", "run=other")
    assert not marker.exists()


def test_what_a_file_says_under_trust_counts_for_nothing_and_a_run_stores_none(job, manipulated, marker):
    run = manipulated(model=opened(marker), trust=["builtins.*", "builtins.open"])
    for words in (["task=eval", f"load={run}"], [f"resume={run}", "duration=3", "tracker=none"]):
        with pytest.raises(ConfigError, match="names code"):
            job(*words, "run=other")
    assert not marker.exists()
    stored = load_last(job(*SMALL, "trust=[mine.*]", "duration=2", "run=third"))["config"]
    assert "trust" not in stored
    job("run=third", "trust=[other.Net]", "duration=3")  # it may differ


def refusal(stored, *trust, composed=None, replaced=None):
    """The message about a stored configuration; None if it is accepted."""
    try:
        check_stored(stored, "load", Path("x.pt"), Command(composed or {}, trust, replaced or {}))
    except ConfigError as error:
        return str(error)
    return None


TIMM = {"_target_": "timm.create_model", "model_name": "resnet18", "pretrained": False,
        "in_chans": "data.num_channels", "num_classes": "data.num_classes"}  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "accepted"),
    [
        ({"metrics": {"recall": {"_target_": RECALL, "average": None}}}, True),
        ({"metrics": {"recall": {"_target_": RECALL, "average": "macro"}}}, True),
        ({"metrics": {"recall": {"_target_": RECALL}}}, True),
        ({"metrics": {"other": {"_target_": RECALL, "average": None}}}, False),
        ({"loss": {"_target_": RECALL, "average": None}}, False),
        ({"metrics": {"recall": {"_target_": RECALL, "average": None, "weights_only": False}}}, False),
        ({"metrics": {"recall": {"_target_": RECALL, "_convert_": "all"}}}, False),
        ({"metrics": {"recall": {"_target_": RECALL, "_partial_": True}}}, False),
        ({"metrics": {"recall": {"_target_": "torchmetrics.MeanMetric", "average": None}}}, False),
        ({"model": {**TIMM, "model_name": "resnet50.a1_in1k", "num_classes": 7}}, True),
        ({"model": {**TIMM, "model_name": "hf-hub:somebody/model"}}, False),
        ({"model": {**TIMM, "model_name": "local-dir:/tmp/model"}}, False),
        ({"model": {**TIMM, "model_name": {"path": "x"}}}, False),
        ({"hydra": {"callbacks": {"guard": {"_target_": "os.system"}}}}, False),
    ],
    ids=str,
)
def test_what_stands_in_configs_is_code_of_this_clone_with_its_own_keys_alone(stored, accepted):
    assert (refusal(stored) is None) is accepted


@pytest.mark.parametrize(
    ("name", "trust", "accepted"),
    [
        (f"{MINE}.Net", [f"{MINE}.Net"], True),
        (f"{MINE}.Net", ["tests.*"], True),
        (f"{MINE}.Net", [f"{MINE}.*"], True),
        (f"{MINE}.Net", [f"{MINE}.Ne"], False),
        (f"{MINE}.Net", ["test.*", "tests"], False),
        (f"{MINE}.torch.load", ["tests.*"], False),  # imported there, defined elsewhere
        (f"{MINE}.Path.touch", ["tests.*"], False),
        (f"{MINE}.nn.Linear", [f"{MINE}.nn.Linear"], True),
        (f"{MINE}.Net.load_state_dict", ["tests.*"], False),
        (f"{MINE}.Gone", ["tests.*"], True),  # `build_target` says what is wrong with it
        ("tests.nowhere.Net", [], False),
    ],
)
def test_trust_names_an_object_or_all_that_a_package_defines(name, trust, accepted):
    assert (refusal({"model": {"_target_": name}}, *trust) is None) is accepted


def test_a_node_is_this_commands_where_it_composes_the_same_at_the_same_key():
    stored = {"loss": {"_target_": "mine.f", "_partial_": True, "parts": [{"_target_": "mine.g", "_args_": [1, "a"]}]}}
    assert refusal(stored, composed=stored) is None
    assert "loss._partial_" in refusal(stored, "mine.f", "mine.g", composed={"loss": {"_partial_": False}})
    assert "loss._target_=mine.f" in refusal(stored, composed={"model": stored["loss"]})
    other = {"loss": {**stored["loss"], "parts": [{"_target_": "mine.g", "_args_": [1, "b"]}]}}
    assert "loss.parts.0._args_" in refusal(stored, composed=other)
    assert refusal({"a": {"_target_": "x.f", "_args_": ["***"]}},
                   composed={"a": {"_target_": "x.f", "_args_": ["https://ann:pa55@h"]}})  # fmt: skip
    assert refusal({"a": {"_target_": "x.f", "_args_": ["https://***@h"]}},
                   composed={"a": {"_target_": "x.f", "_args_": ["https://ann:pa55@h"]}}) is None  # fmt: skip


def test_an_override_replaces_a_value_and_nothing_beside_it():
    stored = {"model": {"_target_": "evil.f", "part": {"_target_": "evil.g", "_args_": [1]}}}
    assert refusal(stored, replaced={"model": {"_target_": "mine.f", "part": None}}) is None
    message = refusal(stored, replaced={"model": {"_target_": "mine.f", "part": {"_target_": "mine.g"}}})
    assert "model.part._args_" in message
    assert "evil" not in message
    assert "model=" in refusal({"model": "${oc.env:HOME}"}, replaced={"model": {"a": 1}})  # merging would resolve it


@pytest.mark.parametrize(
    "target", [None, 3, "a b", "${x}", "x.\x1b[2J", "", "a..b", ["os.system"], {"a": 1}, b"x", torch.ones(3)], ids=repr
)
def test_a_target_that_is_no_dotted_name_is_never_taken_from_a_file(target):
    message = refusal({"model": {"_target_": target}}, "a.*", composed={"model": {"_target_": [1]}})
    assert "holds what is never taken from a file: model._target_=" in message
    assert message.isprintable()


def test_one_message_lists_everything_and_a_shell_reads_its_words_as_they_are_meant():
    stored = {"model": {"_target_": "mine.Net"}, "data": {"_target_": "mine.Data", "x": {"_target_": "mine.Net"}}}
    message = refusal(stored, "other.*")
    assert len(message.splitlines()) == 1
    for found in ("model._target_=mine.Net", "data._target_=mine.Data", "data.x._target_=mine.Net"):
        assert found in message
    assert words_of(message) == ["trust=[other.*,mine.Net,mine.Data]"]
    assert compose_config(*words_of(message)).trust == ["other.*", "mine.Net", "mine.Data"]
    assert compose_config(*words_of(refusal({"model": {"_target_": "my-mod.Überall"}}))).trust == ["my-mod.Überall"]


def test_a_package_beside_the_start_is_offered_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored = {"model": {"_target_": "ours.Net"}, "loss": {"_target_": "ours.losses.f"}}
    assert "ours.*" not in refusal(stored)
    (tmp_path / "ours").mkdir()
    assert "append 'trust=[ours.Net,ours.losses.f]', or 'trust=[ours.*]' for all that it defines" in refusal(stored)
    assert "ours.*" not in refusal({**stored, "data": {"_target_": "torch.load"}})


def test_a_long_value_and_a_deep_one_are_no_obstacle():
    deep = {"_target_": "evil.f"}
    for _ in range(5000):
        deep = {"a": deep}
    assert "evil.f" in refusal(deep)
    assert len(refusal({"a": {"_args_": ["x" * 10**6]}})) < 300


@pytest.mark.parametrize("entry", ["*", "mine.**", ".*", "mine.", "a b", "mine.*.Net", ""])
def test_an_entry_that_is_no_name_is_an_error(entry):
    with pytest.raises(
        ConfigError, match=r"^trust: expected dotted names such as mine\.Net, or mine\.\* for a package"
    ):
        compose_config(f"trust=['{entry}']")


def test_trust_is_given_on_the_command_line_alone(tmp_path):
    check_origin(["mine.Net"], ["seed=1", "trust=[mine.Net]"])
    check_origin([], [])
    with pytest.raises(ConfigError, match=r"^trust: expected on the command line alone"):
        check_origin(["mine.Net"], ["seed=1", "experiment=mine"])
    config = compose_config()
    config.trust = ["mine.Net"]  # as a file of --config-dir could say
    with pytest.raises(ConfigError, match=r"^trust: expected on the command line alone"):
        tasks.run(config, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-dir", "RUN/.hydra", "-cn", "config"],
        ["--config-dir=RUN/.hydra"],
        ["--config-d", "RUN"],
        ["-cd", "RUN/checkpoints/.."],
        ["-c", "job", "-cp", "RUN/.hydra"],
        ["--config-path", "file://RUN"],
        ["-cd", "LINK"],
        ["-cd", "RUN/..", "-cn", "first/.hydra/config"],
        ["hydra.searchpath=[pkg://x,file://RUN/.hydra]"],
        ["--experimental-rerun", "RUN/.hydra/config.pickle"],
        ["--exp=config.pickle"],
    ],
    ids=" ".join,
)
def test_hydra_does_not_compose_from_what_a_run_has_written(arguments, trained, tmp_path):
    (tmp_path / "link").symlink_to(trained / ".hydra")
    given = [word.replace("RUN", str(trained)).replace("LINK", str(tmp_path / "link")) for word in arguments]
    with pytest.raises(ConfigError, match=r"^(--[a-z-]+|hydra\.searchpath): .*; use resume=... or load=... instead"):
        check_sources([*given, "seed=1"])


def test_other_sources_are_left_alone(tmp_path):
    check_sources(["--config-dir", str(tmp_path), "-cn", "train", "hydra.searchpath=[pkg://mine.conf]", "seed=1"])
    check_sources(["--config-dir", "conf", "experiment=mine", "-m", "seed=1,2"])
    check_sources(["--config-path"])  # Hydra says what is missing


def test_the_command_runs_nothing_of_a_pickle_or_of_a_run_directory(tmp_path, marker):
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Bomb(marker)))
    hydra = tmp_path / "outputs/a/.hydra"
    hydra.mkdir(parents=True)
    shutil.copyfile(ROOT / "configs/train.yaml", hydra / "config.yaml")
    with (hydra / "config.yaml").open("a") as config:
        config.write(f"  hydra_logging:\n    handlers: {{x: {{class: logging.FileHandler, filename: {marker}}}}}\n")
    for source in (["--experimental-rerun", "config.pickle"], ["-cd", "outputs/a/.hydra", "-cn", "config"]):
        done = start(tmp_path, *source)
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(r"error: --(experimental-rerun|config-dir): [^\n]*\n", done.stderr)
    assert not marker.exists()
