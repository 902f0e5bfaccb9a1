"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import syncbn

MODULES = [
    info.name for info in pkgutil.walk_packages(syncbn.__path__, "syncbn.") if not info.name.endswith("__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.startswith("syncbn.kernels.triton."):
        pytest.importorskip("triton", reason="Triton is there on Linux only")
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0


def test_every_public_name_resolves():
    assert all(getattr(syncbn, name).__module__.startswith("syncbn.") for name in syncbn.__all__)


def test_the_layer_and_its_maths_are_importable_from_nn():
    from syncbn.nn import Moments, SyncBatchNorm, sync_batch_norm

    assert (SyncBatchNorm, sync_batch_norm) == (syncbn.SyncBatchNorm, syncbn.sync_batch_norm)
    assert Moments.of(torch.zeros(2, 3)).count == 2


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        syncbn.nope  # noqa: B018
