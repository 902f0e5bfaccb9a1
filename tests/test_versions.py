"""The environments of `make test-versions` fit the project as it is."""

import re
import tomllib

import pytest

from tests.versions import ROOT, SUITES, VERSIONS, constraints_for, summary_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_version_is_the_one_that_the_project_admits_at_least():
    assert PROJECT["dependencies"] == [f"torch>={VERSIONS[0].name}"]


def test_every_version_has_a_row_in_the_table():
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    table = page.split("## Versions of torch")[1].split("##")[0]
    rows = re.findall(r"^\| (2\.\d+)[ .][^|]*\|", table, re.MULTILINE)
    assert {version.name for version in VERSIONS if version.name != "newest"} < {*rows}


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_an_environment_has_the_pinned_versions_of_all_that_it_does_not_choose_itself(version):
    pinned = [line.partition("==")[0] for line in constraints_for(version).splitlines()]
    assert "torch" not in pinned
    assert "torchmetrics" in pinned
    assert ("numpy" in pinned) == (not version.numpy)


def test_every_test_of_a_suite_exists():
    for name in (name for names in SUITES.values() for name in names):
        path, _, function = name.partition("::")
        assert (ROOT / path).exists()
        assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "1432 passed, 2 skipped, 4 warnings in 295.32s (0:04:55)\n", ("1432 passed, 2 skipped", True)),
        (1, "FAILED tests/a.py::b - 3 passed\n1 failed, 7 passed in 2.00s\n", ("1 failed, 7 passed", False)),
        (2, "1 error in 0.50s\n", ("1 error", False)),
        (4, "ERROR: usage\n", ("exit code 4", False)),
    ],
)
def test_the_counts_are_those_of_the_last_line(code, output, expected):
    assert summary_of(code, output) == expected
