"""What the pages report was measured, by programs that do what they say: benchmarks/freezing.py, benchmarks/gap.py."""

import csv
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn.training.data.dataset import Split
from syncbn.training.data.images import ImageData
from syncbn.training.models.resnet import ResnetSmall
from tests.training.data.test_data import fashion_files
from tests.training.jobs import ROOT

DATA = ROOT / "docs/data"


@pytest.fixture
def gap(monkeypatch):
    """The module, and a handful of images in place of Fashion-MNIST."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gap

    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(96, 1, 12, 12, generator=generator), torch.arange(96) % 10
    data = ImageData(Split(images, labels), Split(images, labels), Split(images, labels), 10, 0, False)
    return gap, data


def test_moving_averages_are_those_that_layers_of_that_momentum_have(gap):
    gap, data = gap
    last = {}
    for momentum in (0.1, 0.5, None):
        torch.manual_seed(0)
        model = convert_sync_batchnorm(ResnetSmall(1, 10, width=2, depth=1, stages=2))
        for layer in model.modules():
            if isinstance(layer, SyncBatchNorm):
                layer.momentum = momentum
        for _ in gap.train(model, data, 16, 0, (4, 3)):
            pass
        last[momentum] = gap.statistics_of(model)
    torch.manual_seed(0)
    model = convert_sync_batchnorm(ResnetSmall(1, 10, width=2, depth=1, stages=2))
    for step, averages in gap.moving_averages(model, gap.train(model, data, 16, 0, (4, 3))):  # noqa: B007
        pass
    assert step == 7
    for name, momentum in gap.MOMENTA.items():
        if momentum in last:
            torch.testing.assert_close(averages[name], last[momentum], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(gap.statistics_of(gap.with_statistics(model, averages[name])), averages[name])


def test_population_statistics_leave_no_shift_of_variance_and_dropout_does(gap):
    gap, data = gap
    torch.manual_seed(0)
    plain, dropped = gap.network("nowhere", 0.0), gap.network("in front of each BN", 0.5)
    assert gap.variance_shift(gap.with_population(plain, data, 96), data) == pytest.approx([1, 1, 1], abs=0.01)
    for layer in dropped:
        if isinstance(layer, SyncBatchNorm):
            layer.momentum = 1.0
    images, _ = data.eval_batch(data.train, torch.arange(96), torch.float32)
    dropped.train()(images)  # the running variance is that of a batch with dropout
    shifts = gap.variance_shift(dropped, data)
    assert shifts[0] == pytest.approx(0.5, abs=0.1)  # 1 - p, where the mean is small
    assert all(after < before for before, after in pairwise(shifts))  # too little goes into the next, too


def lines_of(page):
    return (ROOT / page).read_text().splitlines()


def rows_of(name):
    with (DATA / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("module", "table", "name", "page"),
    [
        ("freezing", "table", "freezing.csv", "docs/freezing.md"),
        ("gap", "momentum_tables", "gap.csv", "docs/train-eval-gap.md"),
        ("gap", "dropout_table", "dropout.csv", "docs/train-eval-gap.md"),
    ],
)
def test_the_tables_of_a_page_are_made_of_the_numbers_that_are_kept(monkeypatch, module, table, name, page):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    lines = [line for line in getattr(__import__(module), table)(rows_of(name)) if line.startswith("| ")]
    assert len(lines) > 6
    assert set(lines) <= set(lines_of(page))


@pytest.mark.slow
@pytest.mark.parametrize("program", ["freezing", "gap momentum", "gap dropout"])
def test_the_programs_run_on_files_of_the_format(tmp_path, program):
    files = tmp_path / "files"
    files.mkdir()
    fashion_files(files, num_train=5600)
    name, *words = program.split()
    options = (
        ["--scale", "0.001", "--path", str(files)]
        if name == "gap"
        else ["--out", str(tmp_path), "--overrides", f"data.path={files}", "model.width=2", "duration=2"]
    )
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *words, "--seeds", "0", "--csv", "numbers.csv"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "numbers.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == {"freezing": 6, "gap momentum": 42, "gap dropout": 7}[program]


def test_the_plot_is_drawn_of_the_numbers_that_are_kept(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "docs")
    import freezing_plot

    freezing_plot.draw(DATA / "freezing.csv", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
