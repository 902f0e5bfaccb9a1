"""Messages about what was typed, and tables that show it as it was."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

from syncbn.training.config.errors import ConfigError
from syncbn.training.launch.flags import check_flags
from syncbn.training.launch.typed import as_typed
from syncbn.training.tracking import console
from syncbn.training.trainer.checks import warn_of_large_batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3"], "--epochs: no such option; keys are given without dashes, duration=3ep"),
        (["--lr=0.1"], "--lr: no such option; keys are given without dashes, optimizer.lr=0.1"),
        (["--batch-size", "32", "run=a"], "--batch-size: no such option; .* batch_size=32"),
        (["--nproc-per-node", "2"], "--nproc-per-node: is an option of torchrun, and stands before train.py: torchrun"),
        (["--local-rank=0"], "--local-rank: torch.distributed.launch hands this over; start train.py with torchrun"),
        (["-b", "32"], "-b: no such option; keys are given without dashes, KEY=VALUE; python train.py --cfg job lists"),
    ],
)
def test_an_option_of_other_trainers_is_answered_with_the_key(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_flags(arguments)


def test_hydra_s_options_pass_abbreviated_too():
    check_flags(
        ["--multirun", "-m", "--cfg", "job", "--config-dir=conf", "-cd", "conf", "--hel", "-", "optimizer.lr=-1"]
    )


def test_a_sweep_is_shown_as_it_was_typed():
    typed = ["-m", "optimizer.lr=1e-4,1e-3", "freeze.a.match=[x, y],'z, z'", "seed=range(2)", "+data.root='a b'", "a,b"]
    given = ["optimizer.lr=0.001", "freeze.a.match=[x,y]", "freeze.a.match='z, z'", "seed=1", "data.root='a b'"]
    shown = ["optimizer.lr=1e-3", "freeze.a.match=[x, y]", "freeze.a.match='z, z'", "seed=1", "+data.root='a b'"]
    assert as_typed(given, typed) == shown


def test_a_table_breaks_no_word_even_where_the_terminal_is_narrow(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=screen, width=40, soft_wrap=True, highlight=False))
    cells = (
        "0",
        "optimizer.weight_decay=0.0005 freeze.mine.match=[bold,backbone.stages.0]",
        "0.9944",
        "the loss of it",
    )
    console.print_rows("sweep", ("job", "overrides", "val/accuracy", "failed"), [cells])
    for word in ("val/accuracy", *" ".join(cells).split()):
        assert f" {word} " in screen.getvalue()


def test_brackets_in_a_path_are_no_markup(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=screen, width=80, soft_wrap=True, highlight=False))
    console.print_table("runs/[a]/[/b]", [("val/recall[x]", "outputs/[/b] [red]c")])
    console.print_rows("runs/[a]/[/b]", ("val/recall[x]",), [("outputs/[/b] [red]c",)])
    for text in ("runs/[a]/[/b]", "val/recall[x]", "outputs/[/b] [red]c"):
        assert screen.getvalue().count(text) == 2


def test_the_progress_bar_names_loss_rate_and_the_time_that_is_left_from_the_first_step(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=screen, force_terminal=True, width=120))
    times = iter([100.0, 102.0])  # a first step of two seconds
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with console.progress(60, 0, enabled=True, samples=64) as show:
        show(1, 2.5)
    text = screen.getvalue()
    assert "1/60" in text
    assert "loss 2.5000  32 samples/s  0:01:58 left" in text


@pytest.mark.parametrize(
    ("batch_size", "told"), [(104, ""), (105, "batch_size=105 is more than the 104 training sampl")]
)
def test_a_batch_larger_than_the_data_is_a_warning(batch_size, told, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_large_batch(batch_size, 104)
    assert told in caplog.text
    assert bool(told) == bool(caplog.records)
