"""The mutations of `mutants` fit the code as it is."""

import re

import pytest

from tests.mutants import MUTATIONS, ROOT, label


@pytest.mark.parametrize("mutation", MUTATIONS, ids=label)
def test_what_is_changed_stands_there_once_and_the_tests_exist(mutation):
    text = (ROOT / "syncbn" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.new not in ("", mutation.old)
    for name in mutation.tests.split():
        file, _, function = name.partition("::")
        assert re.search(
            rf"def {function}\b" if function else "def test_", (ROOT / "tests" / file).read_text(encoding="utf-8")
        ), name
