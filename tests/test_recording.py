"""The recorder of operators does on the CPU what a CUDA graph does on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import SyncBatchNorm
from tests.recording import OperatorRecorder, Recording, RecordingCapture


def recorded(function):
    return RecordingCapture()(function)


def test_a_replay_takes_new_values_from_the_same_memory_and_writes_to_the_same_memory():
    input, total = torch.ones(3), torch.zeros(3)
    recording = recorded(lambda: total.add_(input * 2).view(1, 3))
    input.fill_(5.0)
    recording.replay()
    assert total.tolist() == [12.0, 12.0, 12.0]
    assert recording.output.tolist() == [[12.0, 12.0, 12.0]]


def test_numbers_of_the_host_and_exchanged_tensors_stay_as_they_were_recorded():
    rate, held, result = [2.0], [torch.ones(2)], torch.zeros(2)
    recording = recorded(lambda: result.copy_(held[0] * rate[0]))
    rate[0], held[0] = 3.0, torch.full((2,), 7.0)
    recording.replay()
    assert result.tolist() == [2.0, 2.0]


def test_an_operator_that_changes_an_argument_and_returns_something_new_gives_both_again():
    layer, input = SyncBatchNorm(2, momentum=None), torch.randn(4, 2)
    recording = recorded(lambda: layer(input))
    other = torch.randn(4, 2)
    input.copy_(other)
    recording.replay()
    torch.testing.assert_close(recording.output, F.batch_norm(other, None, None, training=True))
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize(
    "waits",
    [lambda x: x.item(), lambda x: bool(x.any()), lambda x: x.view(1)[x.view(1) > 0], lambda x: x.view(1).nonzero()],
    ids=["item", "bool", "mask", "nonzero"],
)
def test_what_waits_for_the_device_cannot_be_recorded(waits):
    with pytest.raises(RuntimeError, match="waits for the device"), OperatorRecorder(Recording()):
        waits(torch.tensor(1.0))


def test_an_index_of_numbers_waits_for_nothing():
    index, values = torch.tensor([1, 0]), torch.tensor([5.0, 6.0])
    recording = recorded(lambda: values[index])
    index.zero_()
    recording.replay()
    assert recording.output.tolist() == [5.0, 5.0]


def test_a_replay_draws_by_the_seed_of_the_moment():
    input, masks = torch.ones(64), []
    for again in (lambda: F.dropout(input), recorded(lambda: F.dropout(input))):
        torch.manual_seed(5)
        masks.append(again().clone() if callable(again) else (again.replay(), again.output)[1])
    assert torch.equal(*masks)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), SyncBatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))


def check_steps(wrap):
    """Trains a network whose steps are replayed, and one whose steps are not; both end with the same bits."""
    models = [network() for _ in range(2)]
    wrapped = [wrap(model) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True) for model in models]
    memory = torch.zeros(5, 3, 8, 8)

    def step(number, input):
        optimizers[number].zero_grad()
        loss = wrapped[number](input).square().mean()
        loss.backward()
        optimizers[number].step()
        return loss.detach()

    recording = None
    for _ in range(6):
        batch = torch.randn(5, 3, 8, 8)
        memory.copy_(batch)
        loss = step(0, batch)
        if len(optimizers[1].state) == 0:
            step(1, memory)
        elif recording is None:
            recording = recorded(lambda: step(1, memory))
        else:
            recording.replay()
            assert torch.equal(recording.output, loss)
    assert recording.num_replays == 4
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


def test_training_steps_are_replayed_with_the_same_bits():
    check_steps(lambda model: model)


def check_steps_of_ranks():
    torch.manual_seed(torch.distributed.get_rank())
    check_steps(lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True))


def test_collectives_are_replayed_and_waited_for(ranks):
    ranks(2, check_steps_of_ranks)
