"""Whatever file is given instead of a checkpoint: one message that names it, or a job that does what it should.

Each family of the corpus goes through each entry point, in this process; the message is what `clear_errors` prints.
"""

import copy
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from syncbn.__main__ import main
from syncbn.training.checkpoint import contents, files
from syncbn.training.checkpoint.resume import checkpoint_to_resume
from syncbn.training.config.errors import ConfigError
from syncbn.training.config.model import InitConfig
from syncbn.training.config.run import ExportConfig
from syncbn.training.data import registry
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.models.pretrained import load_subnet
from syncbn.training.tasks import audit, evaluate, export, recalibrate
from syncbn.training.tasks.train import train
from syncbn.training.trainer.build import build_model
from tests.once import made_once
from tests.training.checkpoint.corpus import FAMILIES
from tests.training.jobs import compose_config, run_rank, start

RUN = ("data=synthetic", "data.num_samples=30", "data.size=6", "data.channels=1", "model.width=2", "model.stages=1",
       "batch_size=12", "tracker=none", "tracker.report=false", "duration=2", "eval_every=1", "save.every=1",
       "save.keep=2", "ema=0.5")  # fmt: skip
CONTEXT = RankContext(0, 1, torch.device("cpu"), torch.float32)

pytestmark = pytest.mark.timeout(200)  # a file that is waited for, or walked without end, is a failure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a small real run."""

    def make(directory):
        return run_rank(directory, (*RUN, "run=real"))

    return made_once(tmp_path_factory, "corpus", make)


@pytest.fixture(scope="module")
def configs():
    """The configurations of the entry points, composed once; what a test changes it changes in a copy."""
    return {task: compose_config(*RUN[-1:], f"task={task}", "load=x", "run=x") for task in ("train", "eval")}


class Entry:
    """An entry point for a file: called in an empty working directory, with the path to give the file to."""

    def __init__(self, run, configs):
        self.run, self.configs = run, configs
        self.run_dir = Path("outputs/x")
        self.run_dir.mkdir(parents=True)


class Resume(Entry):
    """`resume=PATH`."""

    path = Path("given/file.pt")

    def __call__(self):
        self.train(resume=str(self.path))

    def train(self, **keys):
        with ExitStack() as tracking:
            train(replace(copy.deepcopy(self.configs["train"]), **keys), self.run_dir, CONTEXT, ("run=x",), tracking)


class ResumeAuto(Resume):
    """`run=NAME` of a run whose newest checkpoint is the file."""

    path = Path("outputs/x/checkpoints/step_00000002.pt")

    def __init__(self, run, configs):
        super().__init__(run, configs)
        self.path.parent.mkdir()
        self.older = self.path.with_name("step_00000001.pt")
        self.older.symlink_to(run / "checkpoints/step_00000001.pt")

    def __call__(self):
        found = checkpoint_to_resume(self.configs["train"], self.run_dir)
        if found.path == self.path:
            self.train(resume="auto")
        assert found.path in (self.path, self.older)


class Load(Entry):
    """`task=eval load=PATH`, which reads the file as all tasks with `load` do."""

    path = Path("given/file.pt")

    def __call__(self):
        evaluate.run(replace(self.configs["eval"], load=str(self.path)), self.run_dir, CONTEXT)


class LoadRun(Load):
    """`task=eval load=DIRECTORY` of a run whose best checkpoint is the file."""

    path = Path("given/checkpoints/best.pt")

    def __call__(self):
        evaluate.run(replace(self.configs["eval"], load="given"), self.run_dir, CONTEXT)


class Init(Entry):
    """`init.backbone.path=PATH`."""

    path = Path("given/file.pt")
    model = None

    def __call__(self):
        if Init.model is None:
            config = compose_config(*RUN)
            Init.model = build_model(config, registry.load_data(config.data), CONTEXT)
        load_subnet(copy.deepcopy(Init.model), "backbone", InitConfig(str(self.path), strict=False))


class Audit(Entry):
    """`python -m syncbn audit PATH`, whose message is raised here as train.py's are."""

    path = Path("given/file.pt")
    given = path

    def __init__(self, run, configs, capsys):
        super().__init__(run, configs)
        self.capsys = capsys

    def __call__(self):
        self.capsys.readouterr()
        code = main(["audit", str(self.given)])
        told = self.capsys.readouterr()
        if code == 2:
            assert told.out == ""
            raise ConfigError(told.err.removesuffix("\n"))
        assert told.err == ""
        assert " 0 batch normalization layers" not in told.out


class AuditRun(Audit):
    """`python -m syncbn audit DIRECTORY` of a run whose best checkpoint is the file."""

    path = Path("given/checkpoints/best.pt")
    given = Path("given")


class OtherTasks(Load):
    """`task=... load=PATH` of the other tasks."""

    def __call__(self):
        for number, task in enumerate((audit, recalibrate, export)):
            keys = {"load": str(self.path), "export": ExportConfig(["safetensors"])}
            directory = self.run_dir / str(number)
            directory.mkdir()
            task.run(replace(self.configs["eval"], **keys), directory, CONTEXT)


ENTRIES = (Resume, ResumeAuto, Load, LoadRun, Init, Audit, AuditRun, OtherTasks)
# Entry points that look at what makes a family; the others read these files as they read those of other families.
QUICK = {
    "parts gone": (Load, Audit),
    "parts changed": (Resume,),
    "inside of parts": (),
    "config": (Load,),
    "statistics": (Audit,),
    "foreign": (Resume, Init, Audit),
    "bytes": (Resume, ResumeAuto, LoadRun, Init, Audit),
    "places": ENTRIES,
    "pickles": ENTRIES,
    "targets": (Resume, Load),
}
DIGESTED = ("parts gone", "parts changed", "inside of parts", "config", "targets")
PAIRS = [
    pytest.param(family, entry, id=f"{family}-{entry.__name__}", marks=() if entry in quick else pytest.mark.slow)
    for family, quick in QUICK.items()
    for entry in ENTRIES
]


def made(entry, make, content, run, configs, capsys):
    """The entry point, with the file in its place; in the working directory."""
    call = entry(run, configs, *([capsys] if issubclass(entry, Audit) else ()))
    call.path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of kinds of tensors that it calls beta, a prototype or deprecated
        make(call.path, copy.deepcopy(content))
    return call


def problem_of(call, cwd, *, digested):
    """What is wrong with how the entry point takes the file; None if it is right.

    Args:
        digested: it has the right digest, so that this is no reason to refuse it.
    """
    try:
        call()
    except ConfigError as error:
        names = (call.path.name, "given", "outputs/x/checkpoints")
        if len(str(error).splitlines()) != 1 or not any(name in str(error) for name in names):
            return str(error)
        if digested and "digest" in str(error):
            return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    left = {path.name for path in (*cwd.iterdir(), *(cwd / "outputs").iterdir())} - {"outputs", "given", "x"}
    return f"has left {left}" if left else None


@pytest.mark.parametrize(("family", "entry"), PAIRS)
def test_a_file_that_is_no_good_checkpoint_is_one_message_that_names_it(
    run, configs, family, entry, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(contents, "MAX_ITEMS", 20_000)  # so that the endless ones end soon
    content = files.read(run / "checkpoints/step_00000001.pt", "resume")
    wrong = {}
    for number, (name, make) in enumerate(FAMILIES[family].items()):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        monkeypatch.chdir(cwd)
        with monkeypatch.context() as patched:
            if name.endswith(".safetensors") and entry.path.name == "file.pt":
                patched.setattr(entry, "path", Path(f"given/{name}"))
                patched.setattr(entry, "given", Path(f"given/{name}"), raising=False)
            problem = problem_of(made(entry, make, content, run, configs, capsys), cwd, digested=family in DIGESTED)
        if problem is not None:
            wrong[name] = problem
    assert not wrong, "\n".join(f"{name}: {problem}" for name, problem in wrong.items())


def test_the_corpus_is_large():
    assert FAMILIES.keys() == QUICK.keys()
    assert sum(map(len, FAMILIES.values())) > 400


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_real_checkpoint_is_taken_by_every_entry_point(run, configs, entry, tmp_path, monkeypatch, capsys):
    content = files.read(run / "checkpoints/step_00000001.pt", "resume")
    monkeypatch.chdir(tmp_path)
    made(entry, lambda path, content: files.write_atomically(path, content), content, run, configs, capsys)()


@pytest.mark.parametrize(
    "given",
    [
        (*RUN, "resume=file.pt", "run=x"),
        pytest.param(("task=eval", "load=file.pt"), marks=pytest.mark.slow),
        pytest.param((*RUN, "init.backbone.path=file.pt", "run=x"), marks=pytest.mark.slow),
    ],
)
def test_on_the_command_line_it_is_one_line_too(run, tmp_path, given):
    content = files.read(run / "checkpoints/step_00000001.pt", "resume")
    FAMILIES["inside of parts"]["weights by number"](tmp_path / "file.pt", content)
    done = start(tmp_path, *given)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.endswith("'file.pt' is malformed: model has the key 0, expected a string")
