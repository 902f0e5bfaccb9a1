"""Trains a network with synchronized batch normalization: `torchrun --nproc-per-node 2 train.py`, or `python train.py`.

Everything is configured from `configs/` and the command line; `python train.py --help` lists it.
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from syncbn.training import launch
from syncbn.training.parsing import parse


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    """One job: checks the composed configuration, then runs its task."""
    with launch.clear_errors():
        config = parse(composed)
        from syncbn.training import tasks  # imports torch, which composing a config should not wait for

        job = HydraConfig.get()
        tasks.run(config, Path(job.runtime.output_dir), job=str(job.job.get("num", 0)), overrides=job.overrides.task)


if __name__ == "__main__":
    with launch.clear_errors():  # around Hydra's own errors too
        launch.prepare()
        main()
