"""What a command says before the imports that take long, and what it looks at first."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.model import InitConfig
from syncbn.training.distributed import world
from syncbn.training.launch import announce, explain, loopback
from syncbn.training.launch.preflight import check_machine
from tests.training.jobs import ROOT, compose_config, data_config

BLOCKED = """
import runpy, sys
sys.modules["torch"] = None  # whoever imports it fails
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_wrong_path_is_told_without_torch_and_after_the_first_line(tmp_path):
    program = [sys.executable, "-c", BLOCKED.format(script=str(ROOT / "train.py"))]
    command = [*program, "data=image_folder", "data.path=nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert re.fullmatch(r"\[..:..:..\] train.py, 1 rank\(s\): reading the configuration\n", done.stdout)
    assert done.stderr == "error: data.path: expected a directory, found none at 'nowhere'\n"
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_make_train_tells_it_while_torchrun_is_being_imported(tmp_path):
    command = [sys.executable, "-m", "syncbn.training.launch.loopback", "--nproc-per-node", "2", ROOT / "train.py"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([*command, "epochs=3"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "train.py, 2 rank(s): reading the configuration" in done.stdout
    assert done.stderr == "error: epochs: no such key; write duration=3ep\n"


def folders(root, *names):
    for name in names:
        (root / name).mkdir(parents=True)


@cache
def composed():
    return compose_config()


def check(*, held_back=(), **settings):
    """Checks the default configuration with these settings in the place of its own."""
    check_machine(replace(composed(), **settings), held_back)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["image_folder", "one"], "data.path: expected a directory per class in 'one', two or more, found alone"),
        (["mask_folder", "one"], "data.path: expected the directories train, val, test in 'one', found alone"),
        (["image_folder", "nowhere"], "data.path: expected a directory, found none at 'nowhere'"),
        (["table", "nowhere.csv"], "data.path: expected a table, a CSV or Parquet file, found no file 'nowhere.csv'"),
        ({"task": "eval", "load": "first"}, "load: expected a checkpoint, found no file 'first'; did you mean outputs"),
        ({"task": "eval", "load": "outputs/frist"}, "load: .* found no file 'outputs/frist'; did you mean outputs"),
        ({"task": "eval", "load": "outputs"}, "load: 'outputs' has no checkpoint under checkpoints/; the runs in it"),
        ({"task": "eval", "load": "outputs/first", "eval": "x"}, "eval.path: expected a directory or a table, foun"),
        ({"task": "predict", "load": "outputs/first", "predict": "x"}, "predict.path: expected a directory or a"),
        ({"resume": "outputs/none"}, "resume: expected a checkpoint, found no file 'outputs/none'"),
        ({"resume": "outputs/first"}, "resume: 'outputs/first' has no checkpoint under checkpoints/"),
        ({"init": {"backbone": InitConfig("x.pt")}}, "init.backbone.path: expected a checkpoint, found no file 'x.pt'"),
        ({"model": {"_target_": "mien.Net"}}, "model._target_=mien.Net: found no module 'mien', in .* did you mean mi"),
        ({"metrics": {"f1": {"_target_": "no_such.F1"}}}, "metrics.f1._target_=no_such.F1: found no module 'no_such'"),
        ({"model": {"_target_": "mine-own.Net"}}, "model._target_=mine-own.Net: expected the dotted name of a class"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_job_names_has_to_be_on_this_machine(tmp_path, settings, message):
    folders(tmp_path, "one/alone", "outputs/first/checkpoints")
    (tmp_path / "outputs/first/checkpoints/best.pt").touch()
    (tmp_path / "mine.py").touch()
    if isinstance(settings, list):
        settings = {"data": data_config(settings[0], path=settings[1])}
    nested = {
        key: replace(getattr(composed(), key), path=settings[key]) for key in ("eval", "predict") if key in settings
    }
    with pytest.raises(ConfigError, match=f"^{re.escape(message).replace(re.escape('.*'), '.*')}"):
        check(**{**settings, **nested})


def test_an_override_for_the_stored_configuration_is_looked_at_too(tmp_path):
    folders(tmp_path, "outputs/first/checkpoints", "here")
    (tmp_path / "outputs/first/recalibrated.pt").touch()
    check(task="eval", load="outputs/first", held_back=["data.path=here"])
    with pytest.raises(ConfigError, match=r"^data\.path: expected a directory or a table, found none at 'nowhere'"):
        check(task="eval", load="outputs/first", held_back=["data.path=nowhere"])


def test_a_run_that_goes_on_needs_nothing_but_its_checkpoint(tmp_path):
    folders(tmp_path, "outputs/first/checkpoints")
    gone = {"init": {"backbone": InitConfig("gone.pt")}, "data": data_config("image_folder", path="moved")}
    with pytest.raises(ConfigError, match="gone"):
        check(run="first", **gone)
    (tmp_path / "outputs/first/checkpoints/step_00000001.pt").touch()
    check(run="first", **gone)


def test_task_check_finds_itself_what_is_wrong_below_the_directory(tmp_path):
    folders(tmp_path, "one/alone")
    check(task="check", data=data_config("image_folder", path="one"))


def test_before_the_ranks_have_met_one_of_each_machine_tells_the_mistake_at_once(monkeypatch, capsys):
    """The others wait to be ended, and have a word only where they are not."""
    waited = []
    monkeypatch.setattr(world.store, "cache_info", lambda: SimpleNamespace(currsize=0), raising=False)
    monkeypatch.setattr(explain, "wait_for_rank_0", waited.append)
    monkeypatch.setattr(explain, "_is_first_to_report", lambda: False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for local_rank, told, waits in (("0", "error: a key: wrong\n", []), ("1", "", ["discarded", "discarded"])):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        monkeypatch.setenv("RANK", local_rank)
        with pytest.raises(SystemExit) as left, explain.clear_errors():
            raise ConfigError("a key: wrong")
        assert (left.value.code, capsys.readouterr().err, waited) == (2, told, waits)


def test_the_second_line_says_what_is_about_to_be_done_and_ranks_of_make_train_do_not_repeat_it(monkeypatch, capsys):
    monkeypatch.delenv(announce.CHECKED, raising=False)
    announce.announce_start(["run=a"])
    announce.announce_job({"data": "digits", "model": "custom"}, "train")
    announce.announce_job({"data": "digits", "model": "custom"}, "eval", load="outputs/a")  # has data of its own
    assert [line[11:] for line in capsys.readouterr().out.splitlines()] == [
        "train.py, 1 rank(s): reading the configuration",
        "task=train  data=digits  model=custom: importing torch",
        "task=eval  load=outputs/a: importing torch",
    ]
    announce.announce_start(["--cfg", "job"])  # whose output may go into a file
    monkeypatch.setenv(announce.CHECKED, "told")
    announce.announce_start([])
    announce.announce_job({}, "train")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("code", "expected", "told"),
    [
        (2, 2, ""),
        (-signal.SIGKILL, 137, "error: rank 1 (process 7) was ended by SIGKILL; the machine may have run out"),
    ],
)
def test_a_rank_that_fails_has_the_last_word_unless_it_could_not_speak(code, expected, told, capsys):
    error = SimpleNamespace(get_first_failure=lambda: (1, SimpleNamespace(exitcode=code, pid=7)))
    assert loopback._exit_code(error) == expected
    assert (said := capsys.readouterr().err).startswith(told)
    assert bool(told) == bool(said)


@pytest.mark.slow
def test_an_error_of_a_rank_ends_make_train_without_the_traceback_of_torchrun(tmp_path):
    command = [sys.executable, "-m", "syncbn.training.launch.loopback", "--nproc-per-node", "2", ROOT / "train.py"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "best=f1", "tracker=none"], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: best: expected auto or one of accuracy, loss, got 'f1'\n"
