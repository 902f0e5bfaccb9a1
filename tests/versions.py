"""The tests on other versions of torch: python -m tests.versions (make test-versions) makes an environment for each.

An environment is what `pip install` makes of the project's extras beside one version of torch. It is deleted when its
suites have run, unless --keep: with CUDA, torch takes 7 GB. Prints the rows of the table in docs/compatibility.md; the
exit code is 1 where a test failed. (`make test` runs everything, with the versions of constraints.txt.)
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT = 3600.0  # seconds for one suite
# Parts of train.py that call what differs: DDP and its hooks, checkpoints of a resumed run, freezing, compilation.
TRAINER = [
    "tests/training/trainer/test_train.py::test_the_default_job_learns_the_digits",
    "tests/training/trainer/test_train.py::test_a_single_process_evaluates_the_checkpoint_to_the_same_numbers",
    "tests/training/trainer/test_train.py::test_every_step_of_the_trajectory_is_the_same_at_any_world_size",
    "tests/training/trainer/test_train.py::test_freezing_and_unfreezing_in_the_middle_is_the_same_at_any_world_size",
    "tests/training/trainer/test_train.py::test_the_same_run_name_goes_on_where_it_stopped",
    "tests/training/trainer/test_train.py::test_wrapping_anew_leaves_what_groups_of_ranks_have_gathered",
    "tests/training/trainer/test_train.py::test_the_totals_of_a_step_travel_with_the_gradients_and_do_not_touch_them",
    "tests/test_docs.py::test_a_loop_prints_the_same_at_one_and_two_ranks",
]
SUITES = {
    "nn": ["tests/nn", "tests/test_torch_compat.py"],
    "kernels": ["tests/kernels"],
    "surgery": ["tests/surgery"],
    "stats": ["tests/stats"],
    "trainer": TRAINER,
    "vision": ["tests"],  # what is marked so, slow ones included
}
_QUICK, _VISION = "not slow and not gpu and not root", "vision"


class Version(NamedTuple):
    """One environment."""

    name: str
    torch: str
    """What pip is asked for."""
    numpy: str = ""
    """What is asked for instead of the version in constraints.txt."""
    beside: tuple[str, ...] = ()
    """Further packages."""


# The interpreter of Triton 3.5 and 3.6 (torch 2.9 and 2.11) turns arrays of one element into numbers, which NumPy has
# refused since 2.4.
_NUMPY = "numpy<2.4"
VERSIONS = [
    Version("2.9", "torch==2.9.*,!=2.9.1", _NUMPY),  # what pyproject.toml admits at least
    Version("2.11", "torch==2.11.*", _NUMPY),
    Version("2.13", "torch==2.13.*"),
    Version("newest", "torch", beside=("torchvision", "timm")),
]


def constraints_for(version: Version) -> str:
    """constraints.txt without what this version has instead. (torch 2.11 wants setuptools before 82.)"""
    left_out = {"torch", "triton", "setuptools"} | ({"numpy"} if version.numpy else set())
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.partition("==")[0] not in left_out) + "\n"


def install(version: Version, directory: Path) -> Path:
    """The interpreter of an environment with the project in it; one that is there already is used as it is."""
    python = directory / "bin/python"
    if (directory / "complete").exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    constraints = directory / "constraints.txt"
    constraints.write_text(constraints_for(version), encoding="utf-8")
    wanted = [version.torch, *filter(None, [version.numpy]), *version.beside]
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, *wanted,
         "-e", ".[train,test]"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    (directory / "complete").touch()
    return python


def describe(python: Path) -> dict[str, str]:
    """Versions in an environment, as they call themselves."""
    program = "; ".join([
        "import json, platform, torch, triton, numpy",
        "print(json.dumps({'torch': torch.__version__, 'triton': triton.__version__, 'numpy': numpy.__version__,"
        " 'python': platform.python_version()}))",
    ])  # fmt: skip
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True, timeout=TIMEOUT)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary_of(code: int, output: str) -> tuple[str, bool]:
    """The counts in pytest's last line, as "12 passed, 1 skipped", and whether nothing failed."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    counts = re.findall(r"(\d+) (failed|passed|skipped|errors?)\b", lines[-1]) if lines else []
    text = ", ".join(f"{number} {what}" for number, what in counts) or f"exit code {code}"
    return text, code == 0


def run_suite(python: Path, suite: str, jobs: int) -> tuple[str, bool]:
    """Runs the tests of a suite in an environment; see `summary_of`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    markers = _VISION if suite == "vision" else _QUICK
    command = [python, "-m", "pytest", "-q", "-m", markers, "-n", str(jobs), "--dist", "worksteal"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *SUITES[suite]],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    text, passed = summary_of(done.returncode, done.stdout)
    if not passed:
        print(done.stdout, flush=True)
    return text, passed


def measure(version: Version, directory: Path, suites: list[str], jobs: int) -> tuple[str, bool]:
    """A row of the table, and whether nothing failed."""
    python = install(version, directory)
    found = describe(python)
    cells, succeeded = [], True
    for suite in SUITES:
        text, passed = "", True
        if suite in suites and (suite != "vision" or version.beside):
            start = time.monotonic()
            text, passed = run_suite(python, suite, jobs)
            print(f"{found['torch']:<14}{suite:<9}{text} ({time.monotonic() - start:.0f} s)", flush=True)
        cells.append(text)
        succeeded = succeeded and passed
    name = f"{found['torch']} (newest)" if version.name == "newest" else found["torch"]
    return "| " + " | ".join([name, found["triton"], found["python"], found["numpy"], *cells]) + " |", succeeded


def main() -> int:
    """The exit code: 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [version.name for version in VERSIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VERSION", help=", ".join(names))
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES), metavar="SUITE",
                        help=", ".join(SUITES))  # fmt: skip
    parser.add_argument("--directory", type=Path, default=ROOT / "build/versions", help="where environments are made")
    parser.add_argument("--keep", action="store_true", help="leave the environments there, for the next call")
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    options = parser.parse_args()
    rows, succeeded = [], True
    for version in VERSIONS:
        if version.name not in options.only:
            continue
        directory = options.directory.resolve() / version.name
        try:
            row, passed = measure(version, directory, options.suites, options.jobs)
        finally:
            if not options.keep:
                shutil.rmtree(directory, ignore_errors=True)
        rows.append(row)
        succeeded = succeeded and passed
    head = ["torch", "Triton", "Python", "NumPy", *SUITES]
    print("\n" + "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]))
    return int(not succeeded)


if __name__ == "__main__":
    sys.exit(main())
