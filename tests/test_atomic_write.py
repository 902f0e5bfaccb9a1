"""A file is the old one or the new one, never a part of one."""

import os
from pathlib import Path

import pytest

from syncbn.atomic_write import replacing, replacing_directory, write_text


@pytest.mark.parametrize("durable", [False, True])
def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path, durable):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path, durable=durable) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_exception_the_old_file_is_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails():
        with replacing(path) as temporary:
            temporary.write_text("half of it")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_durable_file_and_its_directory_are_flushed_the_file_first(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.path.realpath(f"/proc/self/fd/{descriptor}")))
    with replacing(tmp_path / "a.txt", durable=True) as temporary:
        temporary.write_text("new")
        name = str(temporary)
    assert flushed == [name, str(tmp_path)]


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    write_text(tmp_path / "a.txt", "größer")
    assert (tmp_path / "a.txt").read_bytes() == "größer".encode()


@pytest.fixture
def masks(tmp_path):
    """A directory with a file in it."""
    directory = tmp_path / "masks"
    directory.mkdir()
    (directory / "a").write_text("old")
    return directory


def test_a_new_directory_takes_the_place_of_the_old_one_with_all_that_is_in_it(masks):
    with replacing_directory(masks) as new:
        (new / "b").write_text("new")
        assert (masks / "a").read_text() == "old"
    assert [path.name for path in masks.iterdir()] == ["b"]
    assert [path.name for path in masks.parent.iterdir()] == ["masks"]


def test_a_directory_is_there_after_an_exception_and_after_a_failed_rename(masks, monkeypatch):
    with pytest.raises(ZeroDivisionError), replacing_directory(masks) as new:
        (new / "b").write_text(str(1 / 0))
    rename = Path.rename

    def refuses(path, target):
        if path.name.endswith(".tmp"):
            raise OSError("no")
        rename(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match="no"), replacing_directory(masks):
        pass
    assert (masks / "a").read_text() == "old"
    assert [path.name for path in masks.parent.iterdir()] == ["masks"]


def test_a_directory_that_a_killed_process_had_put_aside_comes_back(masks):
    masks.rename(masks.with_name(".masks.old"))
    with pytest.raises(ZeroDivisionError), replacing_directory(masks):
        1 / 0  # noqa: B018
    assert (masks / "a").read_text() == "old"
