"""Where a run's directory is made, who can read it, and what is refused before anything is written there."""

import os
import re
import stat

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed import world
from syncbn.training.launch import overrides, resolvers
from syncbn.training.launch.callbacks import Guard
from syncbn.training.launch.explain import clear_errors
from tests.training.jobs import ROOT


@pytest.fixture(scope="module", autouse=True)
def _configs():
    resolvers.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "agreed", {})
    before = os.umask(0o022)
    yield
    os.umask(before)


def begin(*given, multirun=False):
    """What happens before Hydra writes to the directory of a run, or of a multirun."""
    kept = overrides._hold_back([overrides.open_override(override) for override in given])
    try:
        config = compose("train", kept, return_hydra_config=True)
        (Guard().on_multirun_start if multirun else Guard().on_run_start)(config)
    finally:
        overrides._held_back.clear()
    return config


def refusal(capsys, *given, multirun=False):
    """The one line with which it is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        begin(*given, multirun=multirun)
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_debug_does_not_open_a_directory_that_holds_a_run(tmp_path, capsys, mark):
    (tmp_path / "outputs/first").mkdir(parents=True)
    path = tmp_path / "outputs/first" / mark
    path.mkdir() if mark == "checkpoints" else path.touch()
    line = refusal(capsys, "debug=one_batch", "run=first")
    assert line.startswith("error: run: outputs/first holds a run already, which debug=one_batch would ")
    assert [path.name for path in (tmp_path / "outputs/first").iterdir()] == [mark]
    begin("run=first")  # which resumes it


def test_a_rank_that_comes_later_takes_what_rank_0_has_begun_for_no_other_run(tmp_path, monkeypatch):
    (tmp_path / "outputs/first/checkpoints").mkdir(parents=True)  # made by rank 0, which has looked before
    monkeypatch.setitem(world.agreed, "outputs/first holds a run", "False")
    begin("debug=one_batch", "run=first")


def test_nor_that_of_a_multirun(tmp_path, capsys):
    (tmp_path / "outputs/sweep/1/checkpoints").mkdir(parents=True)
    assert "outputs/sweep holds a run" in refusal(capsys, "debug=one_batch", "run=sweep", multirun=True)


def test_a_debugging_run_that_torchrun_restarts_opens_its_own(tmp_path, monkeypatch):
    (tmp_path / "outputs/first/checkpoints").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    begin("debug=one_batch", "run=first")


def test_a_key_without_effect_is_refused_before_anything_is_made(tmp_path, capsys):
    assert "load: task=train does not read it" in refusal(capsys, "load=outputs/a", "run=b")
    assert "optimizer.lr: task=eval does not" in refusal(capsys, "task=eval", "load=a", "optimizer.lr=1", "run=b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["elsewhere", "deep/er", "{}/absolute", "~/runs"])
@pytest.mark.parametrize("multirun", [False, True])
def test_runs_are_made_where_output_dir_says(tmp_path, monkeypatch, where, multirun):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    where = where.format(tmp_path / "far")
    config = begin(f"output_dir={where}", "run=a/b", multirun=multirun)
    expected = tmp_path / where.replace("~", "home") / "a/b"
    assert expected.is_dir()
    assert (tmp_path / config.hydra.run.dir).resolve() == (tmp_path / config.hydra.sweep.dir).resolve() == expected


def test_runs_stay_below_it(tmp_path, capsys):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path)
    for elsewhere in ("run=link", "hydra.run.dir=outputs/a", "hydra.run.dir=here"):
        line = refusal(capsys, "output_dir=here", elsewhere)
        assert line.startswith("error: hydra.run.dir: expected a directory below here/"), line


def test_a_time_stamp_names_a_directory_there_which_goes_if_the_run_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "agreed", {})
    monkeypatch.setattr(resolvers, "_stamped", [])
    begin("output_dir=here")
    [made] = (tmp_path / "here").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", made.name)
    with pytest.raises(SystemExit), clear_errors():
        raise ConfigError("a key: a mistake")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "begins"),
    [
        (("run=" + "a" * 300,), r"run: outputs/a+: cannot be written \(File name too long\); choose a shorter name"),
        (("run=file",), r"run: outputs/file: cannot be written \(File exists\); a file has this name"),
        (("run=file/b",), r"run: outputs/file/b: cannot be written \(Not a directory\); a file has the name of a"),
        (("output_dir=outputs/file",), r"output_dir: outputs/file: cannot be written \(File exists\); a file has"),
        (("output_dir=/proc/nowhere",), r"output_dir: /proc/nowhere: cannot be written \(.*\); "),
        (("output_dir=''",), r"output_dir: expected a directory for runs, such as outputs or ~/runs, got ''"),
        (("output_dir=null",), r"output_dir: expected .*, got None"),
        (("output_dir='a\tb'",), r"output_dir: expected a directory for runs, .* got 'a\\tb'"),
        (("output_dir=~nobody-at-all/x",), r"output_dir: expected .* got '~nobody-at-all/x', of an unknown user"),
        (("~output_dir",), r"output_dir: expected a directory for runs"),
        (("run=-x",), r"run: expected a directory name of letters, digits and .\+-_ under outputs/, got '-x'"),
        (("run='a\tb'",), r"run: expected a directory name of .* got 'a\\tb'"),
        (("run=loop",), r"hydra.run.dir: expected a directory below outputs/"),
        (("share=nobody",), r"share: expected one of private, group, all, got 'nobody'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_directory_that_cannot_be_made_is_one_line_with_the_path_and_the_remedy(tmp_path, capsys, given, begins):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/file").touch()
    (tmp_path / "outputs/loop").symlink_to("loop")
    assert re.match(f"error: {begins}", line := refusal(capsys, *given)), line


@pytest.mark.parametrize(
    ("refuses", "key"), [("mkdir", "output_dir: outputs: "), ("access", "output_dir: outputs: ")]
)  # fmt: skip
def test_a_read_only_directory_is_one_too(tmp_path, capsys, monkeypatch, refuses, key):
    def read_only(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    # Tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, refuses, read_only if refuses == "mkdir" else lambda *_: False)
    line = refusal(capsys, "run=a")
    assert line.startswith(f"error: {key}cannot be written (")
    assert line.endswith("choose another place with output_dir=...")


def test_a_service_of_wandb_that_a_parent_has_started_does_not_write_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-elsewhere")  # its umask would be the parent's
    begin("run=a")
    assert "WANDB_SERVICE" not in os.environ


@pytest.mark.parametrize(("share", "others"), [("private", 0o000), ("group", 0o050), ("all", 0o055)])
def test_a_run_directory_is_for_those_that_share_says(tmp_path, share, others):
    begin("run=a", *([f"share={share}"] if share != "private" else []))
    (tmp_path / "outputs/a/file").touch()
    assert mode(tmp_path / "outputs/a") == 0o700 | others
    assert mode(tmp_path / "outputs/a/file") == 0o600 | others & 0o044
    assert mode(tmp_path / "outputs") == 0o755  # a place, in which others may have runs too


def test_directories_that_exist_stay_as_they_are(tmp_path):
    (tmp_path / "outputs/a").mkdir(parents=True)
    begin("run=a")
    assert mode(tmp_path / "outputs/a") == 0o755


@pytest.mark.parametrize(
    "name",
    [
        ".hydra", "checkpoints", "wandb", "tensorboard", "profile", "export",
        "metrics.jsonl", "parity.json", "train.log", "run.lock",
    ],
)  # fmt: skip
def test_a_link_in_a_run_directory_is_refused_and_what_it_leads_to_is_untouched(tmp_path, capsys, name):
    victim = tmp_path / "victim"
    victim.write_text("mine") if "." in name[1:] else victim.mkdir()
    run = tmp_path / "outputs/first"
    run.mkdir(parents=True)
    (run / name).symlink_to(victim)
    assert f"outputs/first/{name} is no " in refusal(capsys, "run=first")
    assert victim.read_text() == "mine" if victim.is_file() else not list(victim.iterdir())


def test_a_pipe_in_the_place_of_a_log_is_refused(tmp_path, capsys):
    (tmp_path / "outputs/first").mkdir(parents=True)
    os.mkfifo(tmp_path / "outputs/first/train.log")
    assert "train.log is no regular file" in refusal(capsys, "run=first")


def test_a_link_in_the_place_of_a_job_of_a_multirun_is_refused(tmp_path, capsys):
    (tmp_path / "outputs/sweep").mkdir(parents=True)
    (tmp_path / "outputs/sweep/0").symlink_to(tmp_path)
    assert "outputs/sweep/0 is a link" in refusal(capsys, "run=sweep", multirun=True)


@pytest.mark.parametrize("task", ["'train'", '"train"', " train"])
def test_a_task_in_quotes_keeps_its_overrides(task):
    assert begin(f"task={task}", "optimizer.lr=0.5", "run=a").optimizer.lr == 0.5


def test_overrides_that_were_held_back_for_a_task_with_load_are_not_lost_in_another(monkeypatch):
    monkeypatch.setattr(overrides, "_held_back", ["optimizer.lr=9"])  # as after -m task=train,eval
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: goes to the configuration that load holds, "):
        overrides.require_applied("train", [])
