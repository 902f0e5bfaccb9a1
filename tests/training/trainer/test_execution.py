"""compile, channels_last, tf32, deterministic, clip_norm, label smoothing: each does what it says."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo import register_backend
from torch.optim.lr_scheduler import LambdaLR

from syncbn.nn.patterns import named_modules
from syncbn.training.config.errors import ConfigError
from syncbn.training.losses.losses import CrossEntropy
from syncbn.training.optim.update import Update
from syncbn.training.trainer import execution
from tests.training.jobs import compose_config, read_metrics, run_job, run_rank

# 1,437 digits: 287 a step leave 2 for the sixth, 479 a step leave nothing.
SHORT = ["precision=fp64", "duration=7", "batch_size=287", "log_every=1", "eval_every=100", "tracker=none",
         "model.width=4", "model.stages=2"]  # fmt: skip
CPU = torch.device("cpu")


def last_model(run_dir):
    state = torch.load(sorted((run_dir / "checkpoints").glob("step_*.pt"))[-1], weights_only=True)
    return state["model"]


def check_equal(one, other, tolerance=1e-9):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert (other[key].double() - value.double()).abs().max() <= tolerance, key


FREEZES = ["freeze.a.match=backbone.stem", "freeze.a.start=2", "freeze.a.until=4"]


# Of three ranks, one has no sample in the last step of the epoch.
@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_compiled_run_follows_the_same_trajectory(ranks, tmp_path, world_size):
    common = [*SHORT, *FREEZES, "accumulate=2", "model.stages=1", "log_every=4"]
    runs = [
        ranks(world_size, run_rank, tmp_path, (*common, f"compile={compile}", f"run={compile}{world_size}"))[0]
        for compile in ("false", "aot_eager")
    ]
    check_equal(*map(last_model, runs))


@pytest.mark.slow
def test_a_run_that_inductor_compiles_follows_the_same_trajectory(tmp_path):
    runs = [
        run_job(tmp_path, *SHORT, f"compile={compile}", f"run={compile}", num_ranks=2, timeout=280)
        for compile in ("false", "true")
    ]
    check_equal(*map(last_model, runs))


def test_names_do_not_show_that_a_model_is_compiled():
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = execution.executed(model, "eager")
    assert [name for name, _ in named_modules(compiled)] == ["", "0"]
    assert len(list(compiled.parameters())) == 2
    assert compiled(torch.randn(0, 2)).shape == (0, 2)
    assert execution.executed(model, False) is model


def test_compile_says_at_start_what_is_missing(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"compile: Inductor needs a compiler .* /no/such/compiler; install it"):
        execution.check(compose_config("compile=true"), CPU)
    with pytest.raises(ConfigError, match=r"compile: expected true, false, or a backend .* got 'fast'"):
        execution.check(compose_config("compile=fast"), CPU)
    execution.check(compose_config("compile=aot_eager"), CPU)


@register_backend
def broken(*_):
    raise RuntimeError("while compiling\ncc1plus: fatal error: omp.h: No such file")


def test_a_compiler_that_does_not_work_is_an_error_at_start():
    message = (
        r"compile: broken does not work here: cc1plus: fatal error: omp.h: No such file; repair it, or set compile"
    )
    with pytest.raises(ConfigError, match=message):
        execution.check(compose_config("compile=broken"), CPU)


def test_tf32_on_a_cpu_is_an_error_at_start():
    with pytest.raises(ConfigError, match=r"tf32: expected an NVIDIA GPU .* got a CPU; set tf32=false"):
        execution.check(compose_config("tf32=true"), CPU)


def test_switches_are_put_back_for_the_next_job():
    with pytest.raises(ZeroDivisionError), execution.applied(compose_config("deterministic=true")):  # noqa: PT012
        inside = torch.are_deterministic_algorithms_enabled()
        1 / 0  # noqa: B018
    assert inside
    assert not torch.are_deterministic_algorithms_enabled()


def test_channels_last_lays_out_weights_and_images_and_changes_no_result(ranks, tmp_path):
    runs = [ranks(2, run_rank, tmp_path, (*SHORT, f"channels_last={on}", f"run={on}"))[0] for on in ("false", "true")]
    check_equal(*map(last_model, runs))
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv3d(4, 8, 3), nn.Linear(4, 4), nn.Conv2d(4, 8, 1))
    execution.lay_out(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert model[3].weight.stride() == (4, 1, 4, 4)  # as its gradient's under autocast: else DDP warns


class Puts(nn.Module):
    """A model with an operator that has no deterministic implementation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images):
        flat = images.flatten(1).clone()
        flat.put_(torch.arange(len(flat)), torch.zeros(len(flat), dtype=flat.dtype))
        return self.layer(flat)


def test_deterministic_refuses_what_is_not():
    model = Puts()
    with execution.applied(compose_config("deterministic=true")), pytest.raises(RuntimeError, match="deterministic"):
        model(torch.randn(2, 64))
    with execution.applied(compose_config()):
        model(torch.randn(2, 64))


def one_update(clip_norm, *, half=False, factor=1.0):
    """The model before, its gradient (unclipped), and the model after a step of plain SGD with a rate of 1."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    update = Update(model, optimizer, LambdaLR(optimizer, lambda _: 1.0), CPU, half=half, clip_norm=clip_norm)
    update.begin()
    loss = factor * model(torch.ones(4, 3)).square().sum()
    update.scaler.scale(loss).backward()
    outcome = update.apply(loss.detach().double(), torch.tensor(1.0, dtype=torch.float64), halt=False)
    moved = torch.cat([(b - a).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    return moved.detach(), outcome


@pytest.mark.parametrize("half", [False, True])
def test_a_gradient_is_scaled_down_to_the_norm_and_a_shorter_one_left_alone(half):
    gradient, _ = one_update(None)
    length = gradient.norm()
    clipped, outcome = one_update(0.5, half=half)
    torch.testing.assert_close(clipped, gradient * (0.5 / length))
    torch.testing.assert_close(outcome.gradient_norm, length)  # before clipping, without the scaler's factor
    left_alone, _ = one_update(2 * length.item(), half=half)
    torch.testing.assert_close(left_alone, gradient)


def test_a_gradient_that_is_not_finite_is_left_out_also_where_it_would_be_clipped():
    moved, outcome = one_update(0.5, factor=float("inf"))
    assert outcome.left_out
    assert moved.abs().max() == 0


def test_the_norm_is_logged_and_clipping_is_the_same_at_any_world_size(ranks, tmp_path):
    runs = [ranks(world, run_rank, tmp_path, (*SHORT, "clip_norm=0.1", f"run=w{world}"))[0] for world in (1, 2)]
    check_equal(*map(last_model, runs))
    norms = [[record["train/grad_norm"] for record in read_metrics(run) if "train/loss" in record] for run in runs]
    assert len(norms[0]) == 7
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
    assert max(norms[0]) > 0.1


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    log_p = logits.log_softmax(1)
    expected = -(0.9 * log_p[torch.arange(5), labels] + 0.1 * log_p.mean(1)).sum()
    total, count = CrossEntropy(0.1)(logits, labels)
    torch.testing.assert_close(total, expected)
    assert count == 5
