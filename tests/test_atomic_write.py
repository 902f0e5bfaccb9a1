"""A file is the old one or the new one, never a part of one."""

import os

import pytest

from syncbn.atomic_write import replacing, write_text


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
