"""Starting train.py as a user does, and composing its configuration in this process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from syncbn.training import launch
from syncbn.training.config import Config
from syncbn.training.parsing import parse

ROOT = Path(__file__).parents[2]
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def compose_config(*overrides: str) -> Config:
    """The checked configuration, as train.py would see it with these overrides."""
    launch.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse(compose("train", [launch.open_override(override) for override in overrides]))


def start(cwd: Path, *overrides: str, num_ranks: int = 0, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs train.py in `cwd`: plain python for 0 ranks, else torchrun."""
    launcher = [TORCHRUN, "--nproc-per-node", str(num_ranks)] if num_ranks else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    return subprocess.run(
        [*launcher, str(ROOT / "train.py"), *overrides],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_job(cwd: Path, *overrides: str, num_ranks: int = 0, timeout: float = 120.0) -> Path:
    """Runs train.py, expects success; returns the run directory."""
    done = start(cwd, *overrides, num_ranks=num_ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"run directory\s*│\s*(\S+)", done.stdout)
    assert found, done.stdout
    return cwd / found.group(1)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
