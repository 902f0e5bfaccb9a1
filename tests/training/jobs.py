"""Starting train.py as a user does, and composing its configuration in this process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from syncbn.training.config.data import DataConfig
from syncbn.training.config.parsing import parse
from syncbn.training.config.schema import Config
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.launch import overrides as command_line
from syncbn.training.launch.explain import explain
from syncbn.training.launch.overrides import open_overrides, require_applied
from syncbn.training.launch.resolvers import register_resolvers
from syncbn.training.tasks import check
from syncbn.training.tasks.run import WITH_LOAD
from syncbn.training.tasks.train import train
from syncbn.training.trainer.build import context_for
from tests import composing, warm

composing.remember_files()

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
# What a run trains with; the custom one draws in every step, and waits for the host to skip one.
OPTIMIZERS = {
    "sgd": [],
    "adamw": ["optimizer=adamw", "schedule=step", "schedule.milestones=[2,0.5ep]", "schedule.warmup=4"],
    "custom": ["optimizer=custom", "optimizer._target_=tests.training.optim.test_optimizers.Noisy", "optimizer.lr=0.05",
               "optimizer.momentum=0.9", "optimizer.on_unfreeze=keep", "schedule=constant"],
}  # fmt: skip
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def compose_config(*overrides: str) -> Config:
    """The checked configuration, as train.py would see it with these overrides."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return parse(compose("train", open_overrides(overrides)))


def outcome(overrides: Sequence[str]) -> Config | str:
    """The configuration, or the message that a user would read; any other exception is the test's failure."""
    try:
        config = compose_config(*overrides)
        require_applied(config.task, list(overrides))
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        return message
    return config


def without_report(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides; a training with `tracker=none` that does not ask for report.html goes without, to save time."""
    asks = any(override.startswith(("tracker.report=", "task=")) for override in overrides)
    return (*overrides, "tracker.report=false") if "tracker=none" in overrides and not asks else tuple(overrides)


@cache
def _composed_data(name: str) -> DataConfig:
    required = {"image_folder": ["data.path=x"], "mask_folder": ["data.path=x", "data.num_classes=3"],
                "table": ["data.path=x"]}  # fmt: skip
    return compose_config(f"data={name}", *required.get(name, [])).data


def data_config(name: str, **settings: object) -> DataConfig:
    """The configuration of a data set, composed once for all tests of a process and then changed; checked anew."""
    return replace(_composed_data(name), **settings)


def torchrun(num_ranks: int) -> list[str]:
    """What starts a program on ranks of this machine."""
    # Where a machine's own name leads nowhere torchrun waits for minutes, unless told where to listen.
    return [TORCHRUN, "--local-addr", "localhost", "--nproc-per-node", str(num_ranks)]


def warm_command(*program: str, num_ranks: int = 0) -> list[str]:
    """What runs a script in warm interpreters (see `tests.warm`): by plain python for 0 ranks, else by torchrun."""
    if num_ranks:
        program = ("torchrun", *torchrun(num_ranks)[1:], "--no-python", *warm.command_of(*program))
    return warm.command_of(*program)


def start(cwd: Path, *overrides: str, num_ranks: int = 0, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs train.py in `cwd`, its interpreters warm (see `tests.warm`): plain python for 0 ranks, else torchrun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    return subprocess.run(
        warm_command(str(ROOT / "train.py"), *without_report(overrides), num_ranks=num_ranks),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


class LiveJob:
    """A train.py under torchrun that a test may hurt; always ended when the test is over.

    Waiting is reading: `wait_for` blocks on the job's output, up to a timeout that ends the job.

    Args:
        options: of torchrun.
        prefix: what the command line has in front: to run it on another host, say.
        launcher: what takes the place of torchrun and train.py.
        warm_ranks: the ranks' interpreters are warm (see `tests.warm`), torchrun's is not. What a test kills is then
            the client of a rank, and the rank with it; the parent of a rank is not torchrun.
        variables: further environment variables.
    """

    def __init__(
        self,
        cwd: Path,
        *overrides: str,
        num_ranks: int,
        options: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
        launcher: Sequence[str] = (),
        warm_ranks: bool = False,
        timeout: float = 120.0,
        **variables: str,
    ) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONUNBUFFERED": "1", **variables}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        # A host of its own has an address of its own.
        on_host = [TORCHRUN, "--nproc-per-node", str(num_ranks)] if prefix else torchrun(num_ranks)
        script = str(ROOT / "train.py")
        rank = ["--no-python", *warm.command_of(script)] if warm_ranks else [script]
        command = [*prefix, *(launcher or [*on_host, *options, *rank]), *without_report(overrides)]
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self._timer = threading.Timer(timeout, self.end)

    def __enter__(self) -> LiveJob:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.end()
        self.process.stdout.close()

    def wait_for(self, text: str) -> None:
        """Until the job prints a line with this text."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"the job ended without printing {text!r}:\n{self.output}")

    def finish(self) -> int:
        """Until the job ends by itself; its exit code."""
        self.output += self.process.stdout.read()
        return self.process.wait()

    def workers(self) -> list[int]:
        """The process ids of the ranks, in the order of their start."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def end(self) -> None:
        """Kills whatever is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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


def run_rank(cwd: Path, overrides: tuple[str, ...]) -> Path:
    """What train.py does, on this rank of a process group that exists (or in this process, without one)."""
    before, stdout, overrides = Path.cwd(), sys.stdout, without_report(overrides)
    os.chdir(cwd)
    sys.path.append(str(cwd))  # modules of its own; their names differ between tests, as a process imports them once
    try:
        kept = command_line._hold_back(open_overrides(overrides))
        config = compose_config(*kept)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        run_dir = Path("outputs", config.run or "unnamed").resolve()
        run_dir.mkdir(parents=True, exist_ok=True)
        context = context_for(config, RankContext(rank, world_size, torch.device("cpu"), torch.float32))
        if config.task in WITH_LOAD:
            WITH_LOAD[config.task](config, run_dir, context)
        elif config.task == "check":
            check.run(config, run_dir, context)
        else:
            with ExitStack() as tracking:
                train(config, run_dir, context, overrides, tracking)
        return run_dir
    finally:
        command_line._held_back.clear()
        sys.path.remove(str(cwd))
        sys.stdout = stdout
        os.chdir(before)
