"""The structure: no import circle, few arrows between the folders of training/, and a table that leads to files."""

import graphlib
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MOST_ARROWS = 40  # between the folders of syncbn/training; 212 between its files before it had folders


@pytest.fixture(scope="module")
def imports():
    """For each module of the package those that it imports, be it inside of a function or for types alone."""
    graph = grimp.build_graph("syncbn", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def folder_of(module):
    """The folder of syncbn/training that a module lies in."""
    parts = module.split(".")
    return parts[2] if parts[1:2] == ["training"] and len(parts) > 3 else None


def test_no_file_imports_itself_by_a_way_round(imports):
    graphlib.TopologicalSorter(imports).prepare()  # a CycleError names the files


def test_few_arrows_run_between_the_folders_of_training(imports):
    arrows = {(folder_of(module), folder_of(imported)) for module, below in imports.items() for imported in below}
    arrows = {(one, other) for one, other in arrows if one and other and one != other}
    assert len(arrows) <= MOST_ARROWS, sorted(arrows)
    graphlib.TopologicalSorter({one: {b for a, b in arrows if a == one} for one, _ in arrows}).prepare()


def test_every_row_of_where_do_i_leads_to_a_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.search(r"^## Where do I \.\.\.\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    rows = [line for line in section[1].splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 20
    for row in rows:
        targets = re.findall(r"\]\(([^)#]+)\)", row)
        assert targets, row
        assert all((ROOT / target).is_file() for target in targets), row


def test_every_package_says_what_it_is():
    packages = {path.parent for path in (ROOT / "syncbn").rglob("*.py")}
    assert len(packages) > 10
    for package in packages:
        text = (package / "__init__.py").read_text(encoding="utf-8")
        assert text.startswith('"""'), package
