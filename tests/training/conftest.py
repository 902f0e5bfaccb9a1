"""Jobs without the start-up of a process: most of what a test of the trainer would wait for."""

import pytest

from tests.once import made_once
from tests.training.data.test_data import fashion_files
from tests.training.downloaded import SMALL_NETWORK, save_download
from tests.training.jobs import EXPERIMENTS, ROOT, run_rank


@pytest.fixture(scope="session")
def pretrained(_pool, tmp_path_factory):
    """A working directory with the run that `experiment=pretrain` makes; other runs in it have names of their own."""

    def make(cwd):
        _pool.run(2, run_rank, cwd, ("experiment=pretrain", "duration=3ep", "tracker=none"))
        return cwd

    return made_once(tmp_path_factory, "pretrained", make)


@pytest.fixture(scope="session", params=EXPERIMENTS)
def experiment(request, tmp_path_factory):
    """The overrides for an experiment as it ships; where it wants files, on such as a test can write."""
    name = request.param
    if name == "fine_tuning":
        files = tmp_path_factory.mktemp(name)
        return (f"experiment={name}", *SMALL_NETWORK, *save_download(files))
    if "/data: fashion_mnist" not in (ROOT / f"configs/experiment/{name}.yaml").read_text():
        return (f"experiment={name}",)
    files = tmp_path_factory.mktemp(name)
    fashion_files(files, num_train=5200)
    return (f"experiment={name}", f"data.path={files}", "model.width=2")


@pytest.fixture
def job(ranks, tmp_path):
    """`job(*overrides, num_ranks=1, cwd=tmp_path)`: trains or evaluates as train.py does; returns the run directory.

    One rank runs in this process, several on the pool of workers. What has to go through the command line, torchrun or
    Hydra's run directories uses `start` and `run_job` instead.
    """

    def run(*overrides, num_ranks=1, cwd=tmp_path):
        if num_ranks == 1:
            return run_rank(cwd, overrides)
        return ranks(num_ranks, run_rank, cwd, overrides)[0]

    return run
