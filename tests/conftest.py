"""Fixtures that every test may use."""

import gc
import os
import signal

os.environ["WANDB_MODE"] = "offline"  # no test may reach for a server
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be there before Triton is imported

from hypothesis import settings

from tests.ranks import Pool
from tests.warm import GC_THRESHOLD

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests in the background of a shell: jobs would ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("syncbn", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("syncbn")


def pytest_collection_finish():
    """Cyclic garbage is looked for more rarely, and not among what the imports have left: it takes a sixth of the time.

    The same is done for ranks (tests/ranks.py) and for programs (tests/warm.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


@pytest.fixture(scope="session")
def _pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(_pool):
    """`ranks(world_size, function, *args)`: the function on gloo ranks; see tests/ranks.py."""
    return _pool.run


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
