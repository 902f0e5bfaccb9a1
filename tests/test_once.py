"""What is made once is made by whoever comes first, and again after a failure."""

import pytest

from tests.once import made_once


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """In place of `tmp_path_factory`: that of the only process of an empty test run."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    class Factory:
        def getbasetemp(self):
            return tmp_path

    return Factory()


def test_the_second_gets_what_the_first_has_made(factory):
    first = made_once(factory, "a", lambda directory: (directory, 1))
    assert made_once(factory, "a", lambda directory: (directory, 2)) == first
    assert made_once(factory, "b", lambda directory: (directory, 2)) != first
    assert first[0].is_dir()


def test_after_a_failure_the_next_tries_again_in_an_empty_directory(factory):
    def fail(directory):
        (directory / "left").touch()
        raise OSError

    with pytest.raises(OSError):
        made_once(factory, "a", fail)
    assert made_once(factory, "a", lambda directory: list(directory.iterdir())) == []
