"""What the documentation says is true: its programs run, its links lead somewhere."""

import re
import subprocess
import sys

import pytest

from tests.training.jobs import ROOT, TORCHRUN

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def run(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", ["own_loop", "lightning_loop", "accelerate_loop"])
def test_a_loop_prints_the_same_at_one_and_two_ranks(program):
    pytest.importorskip(program.removesuffix("_loop") if program != "own_loop" else "torch")
    alone, pair = (
        run([sys.executable, f"docs/{program}.py"]),
        run([TORCHRUN, "--nproc-per-node", "2", f"docs/{program}.py"]),
    )
    numbers = [[float(number) for number in re.findall(r"-?\d+\.\d+", text)] for text in (alone, pair)]
    assert len(numbers[0]) == 4
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    assert numbers[0][0] > 0.9


def test_every_test_that_the_documentation_names_exists():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined = {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named
    assert named <= defined
