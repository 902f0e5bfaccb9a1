"""What a step of the trainer costs beyond the model, counted: collectives, and waits for the device."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.training.data.randomness import seed_generators
from syncbn.training.trainer.trainer import Trainer
from tests.counting import collectives
from tests.training.jobs import run_rank

JOB = ["data=synthetic", "data.num_samples=60", "data.size=8", "model.width=4", "tracker=none", "batch_size=8"]
STEPS = ["duration=6", "eval_every=6", "save.every=6"]
BN_LAYERS = 9  # of resnet_small with three stages


def count_sent(cwd, overrides):
    """For each step of a run, the collectives of this rank but for DDP's own: how many numbers of which type."""
    sent_in, train_step = [], Trainer._train_step

    def counting(trainer, step):
        with collectives() as sent:
            train_step(trainer, step)
        sent_in.append(sent)

    with mock.patch.object(Trainer, "_train_step", counting):
        run_rank(cwd, overrides)
    return sent_in


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_step_sends_twice_per_layer_and_no_more_whatever_is_logged(ranks, tmp_path, log_every):
    [here, there] = ranks(2, count_sent, tmp_path, (*JOB, *STEPS, f"log_every={log_every}"))
    assert [len(step) for step in here] == [2 * BN_LAYERS] * 6
    assert here == there


def test_without_synchronization_a_step_sends_what_ddp_sends(ranks, tmp_path):
    for rank in ranks(2, count_sent, tmp_path, (*JOB, *STEPS, "bn.sync=false")):
        assert rank == [[]] * 6


class Reads(TorchDispatchMode):
    """Counts what a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [[], ["accumulate=2"], ["clip_norm=1", "ema=0.9"], ["on_nonfinite=skip"]], ids=str)
def test_a_step_reads_nothing_back_from_the_device(job, options):
    reads, train_step = [], Trainer._train_step

    def counting(trainer, step):
        batches = list(trainer.loader.micro_batches(trainer.sampler, trainer.config.seed, step))  # made on the host
        with mock.patch.object(trainer.loader, "micro_batches", return_value=iter(batches)), Reads() as mode:
            train_step(trainer, step)
        reads.append(mode.count)

    with mock.patch.object(Trainer, "_train_step", counting):
        job(*JOB, *STEPS, "log_every=2", *options)
    assert reads == [0] * 6


def test_what_models_draw_is_seeded_as_torch_does():
    seed_generators(12345, torch.device("cpu"))
    drawn = torch.rand(3)
    torch.manual_seed(12345)
    assert torch.equal(drawn, torch.rand(3))
