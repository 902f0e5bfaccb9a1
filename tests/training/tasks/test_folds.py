"""Folds of a table from end to end: a multirun over them, its table, and predictions of all models together."""

import csv
import re
import shutil

import pytest
import torch

from syncbn.training.checkpoint import files
from syncbn.training.config.errors import ConfigError
from syncbn.training.tasks.ensemble import open_members
from syncbn.training.tasks.sweeps import jobs_of
from syncbn.training.tracking.summary import read_summary, write_summary
from tests.once import made_once
from tests.training.data.tables.test_load import rows_of, write_table
from tests.training.images import save_image
from tests.training.jobs import compose_config, run_rank, start

STUDY = ("data=table", "data.path=study.csv", "data.group=patient", "data.folds=3", "data.size=6", "data.workers=0",
         "model.width=2", "model.stages=1", "batch_size=8", "duration=3", "tracker=none")  # fmt: skip


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """A working directory with a multirun `folds` over three folds, and what it printed."""

    def make(cwd):
        write_table(cwd, rows_of())
        done = start(cwd, "-m", *STUDY, "data.fold=0,1,2", "run=folds")
        assert done.returncode == 0, done.stdout + done.stderr
        (cwd / "printed.txt").write_text(done.stdout)
        return cwd

    return made_once(tmp_path_factory, "folds", make)


@pytest.fixture
def new(tmp_path):
    """Three images, one of them damaged."""
    for number in range(3):
        save_image(tmp_path / f"new/{number}.png", 50 + number, size=(9, 7))
    return tmp_path / "new"


def predictions(cwd, load, new, *more):
    run = run_rank(cwd, ("task=predict", f"load={load}", f"predict.path={new}", "run=p", *more))
    return list(csv.DictReader((run / "predictions.csv").read_text().splitlines()))


def test_a_sweep_over_folds_ends_with_mean_and_spread(sweep):
    accuracies = [read_summary(sweep / f"outputs/folds/{fold}")["metrics"]["test/accuracy"] for fold in range(3)]
    printed = (sweep / "printed.txt").read_text()
    values = torch.tensor(accuracies, dtype=torch.float64)
    for name, value in (("mean", values.mean()), ("spread", values.std())):
        assert re.search(rf"│ {name} .*│ {float(value):.4g} ", printed), printed


@pytest.mark.parametrize("flip", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_probabilities_of_a_sweep_are_the_average_of_its_models(sweep, tmp_path, new, flip):
    folds, flipped = sweep / "outputs/folds", f"predict.flip={flip}"
    alone = [predictions(tmp_path, folds / str(fold), new, flipped) for fold in range(3)]
    found = predictions(tmp_path, folds, new, flipped)
    assert [row["file"] for row in found] == ["0.png", "1.png", "2.png"]
    for position, row in enumerate(found):
        given = {row[f"class_{k}"]: float(row[f"probability_{k}"]) for k in (1, 2, 3)}
        for name, probability in given.items():
            single = [
                float(one[position][f"probability_{k}"]) for one in alone for k in (1, 2, 3)
                if one[position][f"class_{k}"] == name
            ]  # fmt: skip
            assert probability == pytest.approx(sum(single) / 3, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_predictions_of_a_sweep_have_the_same_bytes_at_any_world_size(ranks, sweep, tmp_path, new, num_ranks):
    expected = predictions(tmp_path, sweep / "outputs/folds", new, "predict.batch_size=1")
    command = ("task=predict", f"load={sweep / 'outputs/folds'}", f"predict.path={new}", "run=several")
    ranks(num_ranks, run_rank, tmp_path, (*command, "predict.batch_size=1"))
    text = (tmp_path / "outputs/several/predictions.csv").read_text()
    assert list(csv.DictReader(text.splitlines())) == expected


def test_another_task_wants_one_job_of_the_sweep(sweep, tmp_path):
    with pytest.raises(ConfigError, match=r"^load: .* is a multirun of 3 jobs, which task=predict alone takes;"):
        run_rank(tmp_path, ("task=eval", f"load={sweep / 'outputs/folds'}", "run=e"))


def test_a_sweep_with_a_job_that_failed_is_not_averaged(sweep, tmp_path):
    shutil.copytree(sweep / "outputs/folds", tmp_path / "folds")
    assert [job.name for job in jobs_of(tmp_path / "folds", "load")] == ["0", "1", "2"]
    assert jobs_of(tmp_path / "folds/1", "load") == []
    shutil.rmtree(tmp_path / "folds/1/checkpoints")
    write_summary(tmp_path / "folds/1", -1, {}, [], failed="no disk")
    with pytest.raises(ConfigError, match=r"^load: job 1 of the multirun .* has failed \(no disk\); repeat it"):
        jobs_of(tmp_path / "folds", "load")


def test_jobs_that_predict_other_classes_are_not_averaged(sweep, tmp_path):
    shutil.copytree(sweep / "outputs/folds", tmp_path / "folds")
    path = tmp_path / "folds/2/checkpoints/best.pt"
    content = files.read(path, "load")
    content["data"]["classes"][0] = "yak"
    files.write_atomically(path, content)
    config = compose_config("task=predict", f"load={tmp_path / 'folds'}", "predict.path=x")
    with pytest.raises(ConfigError, match=r"^load: the jobs of a multirun have to predict the same; .* other classes"):
        open_members(config, tmp_path / "p")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (["data.label=[left,right]", "loss=bce"], ["left", "right"]),
        (["data.label=age", "data.target=numbers", "loss=mse"], ["age"]),
    ],
)
def test_labels_and_numbers_have_a_column_each(tmp_path, new, options, columns):
    write_table(tmp_path, rows_of())
    run = run_rank(tmp_path, (*STUDY, *options, "run=a"))
    found = predictions(tmp_path, run, new)
    assert [*found[0]] == ["file", *columns, "error"]
    opened = open_members(compose_config("task=predict", f"load={run}", "predict.path=x"), tmp_path / "p")[0]
    assert opened.kind == ("labels" if columns[1:] else "numbers")
    assert all(0 < float(row[name]) < 1 for row in found for name in columns) or columns == ["age"]
