"""Wheel and source distribution: built from the tree, complete, and enough on their own beside torch."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.once import made_once
from tests.training.jobs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# In an environment that has torch and what torch itself requires, and nothing else.
PROGRAM = """
import importlib.util, sys
import syncbn
assert "torch" not in sys.modules, "importing the package imports torch"
for name in ("hydra", "omegaconf", "wandb", "torchmetrics", "sklearn", "rich", "safetensors", "bokeh", "PIL"):
    assert importlib.util.find_spec(name) is None, name
for name in syncbn.__all__:
    getattr(syncbn, name)
import torch
layer = syncbn.SyncBatchNorm(3)
layer(torch.randn(4, 3, 5)).sum().backward()
assert layer.num_batches_tracked == 1
assert syncbn.audit(torch.nn.Sequential(layer)) == []
print(syncbn.__file__)
"""


def run(*command, cwd):
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The directory that has both; the wheel is built from the source distribution, as an installer would."""

    def make(directory):
        tree = directory / "tree"  # a copy without what earlier builds left in the repository
        tree.mkdir()
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, tree)
        for name in ("syncbn", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, tree, cwd=directory)
        return directory

    return made_once(tmp_path_factory, "packages", make)


def required_by(name, found):
    """The distributions that `name` needs on this machine, itself included."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return found  # of another platform
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        found[key] = distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                required_by(requirement.name, found)
    return found


def empty_environment(path):
    """A virtual environment with links to torch and to what it requires; its interpreter."""
    venv.create(path, with_pip=False, symlinks=True)
    place = Path(sysconfig.get_path("purelib", "venv", {"base": str(path), "platbase": str(path)}))
    for distribution in required_by("torch", {}).values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (place / top).exists():
                (place / top).symlink_to(distribution.locate_file(top))
    return path / "bin" / "python"


def install_and_import(package, tmp_path, *options):
    """What `PROGRAM` prints, away from the repository."""
    python = empty_environment(tmp_path / "venv")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", *options, package, cwd=tmp_path)
    assert run(*pip, "show", "syncbn", cwd=tmp_path).splitlines()[1] == f"Version: {PROJECT['version']}"
    return run(python, "-I", "-c", PROGRAM, cwd=tmp_path).strip()


@pytest.mark.slow
def test_the_wheel_imports_beside_torch_alone(packages, tmp_path):
    [wheel] = packages.glob("*.whl")
    assert Path(install_and_import(wheel, tmp_path)).is_relative_to(tmp_path)


@pytest.mark.slow
def test_the_source_distribution_imports_beside_torch_alone(packages, tmp_path):
    [sdist] = packages.glob("*.tar.gz")
    # Its build needs setuptools, which torch requires and which is therefore there.
    assert Path(install_and_import(sdist, tmp_path, "--no-build-isolation")).is_relative_to(tmp_path)


@pytest.mark.slow
def test_the_wheel_has_every_module_the_types_and_the_licence_and_no_tests(packages):
    [wheel] = packages.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "syncbn").rglob("*.py")}
    information = f"syncbn-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(information)} == modules | {"syncbn/py.typed"}
    assert f"{information}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_source_distribution_has_no_tests(packages):
    [sdist] = packages.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "syncbn/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "configs", "outputs"))]


def test_the_version_is_in_one_place_and_has_a_heading_in_the_changelog():
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    files = [*(ROOT / "syncbn").rglob("*.py"), ROOT / "train.py", *(ROOT / "docs").glob("*.md")]
    assert not [path for path in files if f'"{PROJECT["version"]}"' in path.read_text()]


def test_a_pin_and_a_lower_bound_for_everything_that_is_asked_for():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), text
