"""Trains a network with synchronized batch normalization: `torchrun --nproc-per-node 2 train.py`, or `python train.py`.

Everything is configured from `configs/` and the command line; `python train.py --help` lists it.
"""

import sys

from syncbn.training.distributed import interrupts
from syncbn.training.launch.announce import announce_start

if __name__ == "__main__":
    interrupts.begin()  # before the imports below, which take long enough to be interrupted
    announce_start(sys.argv[1:])

from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from syncbn.training.config.parsing import parse
from syncbn.training.launch.explain import clear_errors, exit_code_of_jobs, failing_alone
from syncbn.training.launch.overrides import held_back, prepare, require_applied
from syncbn.training.launch.preflight import check_machine


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    """One job: checks the composed configuration, then runs its task."""
    job = HydraConfig.get()
    run_dir, number, overrides = Path(job.runtime.output_dir), job.job.get("num", 0), job.overrides.task
    alone = failing_alone(run_dir, number, overrides) if job.mode == RunMode.MULTIRUN else nullcontext()
    with clear_errors(), alone:
        config = parse(composed)
        require_applied(config.task, overrides)
        check_machine(config, held_back())
        from syncbn.training.tasks.run import run  # here, because it imports torch, which --help and --cfg do not need

        run(config, run_dir, job=str(number), overrides=overrides)


if __name__ == "__main__":
    with clear_errors():  # around Hydra's own errors too
        prepare()
        main()
        if code := exit_code_of_jobs():
            sys.exit(code)
