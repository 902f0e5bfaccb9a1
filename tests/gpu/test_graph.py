"""On a GPU a run whose steps are replayed from a CUDA graph ends with the bits of the eager run."""

import os

import pytest
import torch

from syncbn.training.trainer.capture import CudaCapture
from tests.gpu.test_layer import TORCH_WARNS
from tests.training.jobs import read_metrics, run_job
from tests.training.trainer.test_graph import ADAMW, FREEZE, differ, skipping, state_of, stopping, trained, with_dropout

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product of matrices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    *TORCH_WARNS,
]
# A learning rate that float32 has, in which the fused optimizers read that of a graph.
EXACT = ("optimizer.lr=0.125", "schedule=constant", "schedule.warmup=0")


class Counting(CudaCapture):
    """Counts the replays of each graph, the one at its capture included."""

    def __init__(self, device):
        super().__init__(device)
        self.num_replays = []

    def __call__(self, step):
        captured = super().__call__(step)
        self.num_replays.append(1)
        number, replay = len(self.num_replays) - 1, captured.replay

        def counted():
            self.num_replays[number] += 1
            replay()

        captured.replay = counted
        return captured


@pytest.fixture
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(
    ("overrides", "edit", "replays"),
    [
        ((), None, [8]),
        (FREEZE, None, None),
        ((*ADAMW, "optimizer.lr=0.0009765625"), None, None),
        (("precision=bf16", "channels_last=true"), None, [8]),
        (("precision=fp16",), None, [8]),
        ((), with_dropout, [8]),
        ((), skipping, [8]),
        ((), stopping, None),
    ],
)
def test_replayed_steps_have_the_bits_of_eager_ones(tmp_path, overrides, edit, replays):
    capture = Counting(torch.device("cuda"))
    eager, graphed = (
        state_of(trained(tmp_path / name, one, *EXACT, *overrides, edit=edit, device="cuda"))
        for name, one in (("eager", None), ("graphed", capture))
    )
    assert differ(graphed, eager) == []
    assert sum(capture.num_replays) > 0
    assert replays is None or capture.num_replays == replays


def last(run):
    return torch.load(sorted((run / "checkpoints").glob("step_*.pt"))[-1], weights_only=True)


def check_run(tmp_path, num_ranks, *overrides):
    options = ["data=synthetic", "data.num_samples=500", "batch_size=28", "duration=50", "log_every=9", "eval_every=25",
               "ema=0.9", "clip_norm=1.0", "freeze.a.match=backbone.stem", "freeze.a.until=20", "save.every=25",
               "deterministic=true", "device=cuda", "tracker=none", *EXACT, *overrides]  # fmt: skip
    runs = [
        run_job(tmp_path, *options, f"graph={graph}", f"run=graph_{graph}", num_ranks=num_ranks, timeout=280)
        for graph in ("false", "true")
    ]
    eager, graphed = map(last, runs)
    for part in ("model", "average", "optimizer", "schedule", "totals"):
        assert differ({part: graphed[part]}, eager) == []
    losses = [[record["val/loss"] for record in read_metrics(run) if "val/loss" in record] for run in runs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run_of_one_process(tmp_path, precision):
    check_run(tmp_path, 0, f"precision={precision}")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run_of_two_ranks(tmp_path, precision):
    check_run(tmp_path, 2, f"precision={precision}")
