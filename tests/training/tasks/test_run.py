"""One job of several in one process: what it switches on ends with it."""

import pytest

from syncbn.nn import groups, rank_checks
from syncbn.training.tasks.run import run
from syncbn.training.trainer.trainer import Trainer
from tests.training.checkpoint.test_resume import SMALL
from tests.training.jobs import compose_config


@pytest.fixture
def was_checking(monkeypatch):
    """Whether the ranks compared their places in each step that was trained."""
    seen = []
    train_step = Trainer._train_step

    def look(self, step):
        seen.append(rank_checks.enabled)
        train_step(self, step)

    monkeypatch.setattr(Trainer, "_train_step", look)
    return seen


@pytest.mark.slow
def test_a_job_without_debug_after_one_with_debug_runs_without(tmp_path, monkeypatch, was_checking):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rank_checks, "enabled", False)
    for number, debug in enumerate(["true", "false"]):
        run_dir = tmp_path / f"outputs/{number}"
        run_dir.mkdir(parents=True)
        run(compose_config(*SMALL, "duration=1", f"bn.debug={debug}", "tracker=none"), run_dir, job=str(number))
    assert was_checking == [True, False]
    assert rank_checks.enabled is False
    assert not groups._world_of_one


def test_the_environment_s_word_holds_for_every_job(monkeypatch):
    monkeypatch.setattr(rank_checks, "enabled", True)
    with rank_checks.enabling(False):
        assert rank_checks.enabled
    assert rank_checks.enabled
