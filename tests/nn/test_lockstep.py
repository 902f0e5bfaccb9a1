"""Batches of several sizes in one forward pass: what batch normalizations compute is that of one batch."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from syncbn import SyncBatchNorm, convert_sync_batchnorm, disable_running_stats
from syncbn.nn.lockstep import LockstepError, forward_together
from tests.counting import collectives


def close(actual, wanted, tolerance):
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


SIZES = [(2, 7, 9), (1, 12, 5), (3, 8, 8), (1, 3, 4)]  # samples, height, width


class Network(nn.Module):
    """Strided, padded and enlarged by interpolation: at borders and for odd sizes no padding would be exact."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down, self.deep = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pooled, self.head = nn.BatchNorm2d(8), nn.Conv2d(14, 4, 1)

    def forward(self, images):
        fine = F.relu(self.norm(self.first(images)))
        coarse = F.silu(self.deep(self.down(fine)))
        coarse = coarse * torch.sigmoid(self.pooled(coarse.mean((2, 3), keepdim=True)))
        large = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=True)
        return self.head(torch.cat([fine, large], 1))

    def by_layer(self, batches):
        """The same for all batches: image by image, and each normalization one of all pixels, by torch."""
        fine = [F.relu(x) for x in self.normalized("norm", [self.first(x) for x in batches])]
        coarse = [F.silu(x) for x in self.normalized("deep", [self.down(x) for x in fine])]
        gates = self.normalized("pooled", [x.mean((2, 3), keepdim=True) for x in coarse])
        large = [
            F.interpolate(x * torch.sigmoid(gate), like.shape[2:], mode="bilinear", align_corners=True)
            for x, gate, like in zip(coarse, gates, fine, strict=True)
        ]
        return [self.head(torch.cat(pair, 1)) for pair in zip(fine, large, strict=True)]

    def normalized(self, name, batches):
        layer = getattr(self, name)
        pixels = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in batches])
        layer.num_batches_tracked += 1
        output = F.batch_norm(pixels, layer.running_mean, layer.running_var, layer.weight, layer.bias, True,
                              layer.momentum, layer.eps)  # fmt: skip
        parts = output.split([x.numel() // x.size(1) for x in batches])
        return [part.view(len(x), *x.shape[2:], -1).movedim(-1, 1) for part, x in zip(parts, batches, strict=True)]


def make_network():
    torch.manual_seed(0)
    network = Network().double()
    for layer in (network.norm, network.deep, network.pooled):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return network


def make_batches(sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num, 3, *size, dtype=torch.float64, generator=generator) for num, *size in sizes]


def step(network, outputs):
    """Gradients of a loss over all of a pass, with those of the inputs' sizes apart."""
    sum((output * output.detach().cos()).sum() for output in outputs).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def expected():
    network = make_network()
    outputs = network.by_layer(make_batches())
    return outputs, step(network, outputs), network.state_dict()


@pytest.mark.parametrize("layer", ["plain", "synchronized"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_outputs_gradients_and_statistics_are_those_of_one_batch(layer, format):
    network = make_network() if layer == "plain" else convert_sync_batchnorm(make_network())
    outputs = forward_together(network, [batch.to(memory_format=format) for batch in make_batches()])
    wanted = expected()
    close(outputs, wanted[0], 1e-9)
    close(step(network, outputs), wanted[1], 1e-9)
    close(dict(network.state_dict()), dict(wanted[2]), 1e-9)


def check_over_ranks(shares):
    network, wanted = convert_sync_batchnorm(make_network()), expected()
    mine = shares[dist.get_rank()]
    batches = [make_batches()[number] for number in mine] or [torch.zeros(0, 3, 4, 4, dtype=torch.float64)]
    with collectives() as sent:
        outputs = forward_together(network, batches)
    assert len(sent) == 3  # one for each layer, whatever the number of sizes
    close(outputs[: len(mine)], [wanted[0][number] for number in mine], 1e-9)
    gradients = step(network, outputs)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    close(gradients, wanted[1], 1e-9)
    close(dict(network.state_dict()), dict(wanted[2]), 1e-9)


@pytest.mark.parametrize(
    "shares", [([0, 2, 3], [1], []), pytest.param(([3], [0, 1, 2]), marks=pytest.mark.slow)], ids=["3 ranks", "2 ranks"]
)
def test_ranks_may_have_other_sizes_and_other_numbers_of_them(ranks, shares):
    ranks(len(shares), check_over_ranks, shares)


def test_gradients_have_the_same_bits_whatever_autograd_has_counted_before():
    def gradients():
        network = convert_sync_batchnorm(make_network()).float()
        return step(network, forward_together(network, [batch.float() for batch in make_batches()]))

    first, weight = gradients(), torch.ones(1, requires_grad=True)
    for _ in range(500):
        weight = weight * 1.0
    close(gradients(), first, 0)


def test_masks_residuals_and_activations_are_parts_of_the_call():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = SyncBatchNorm(3, activation="silu").double()

        def forward(self, x):
            return self.norm(x, mask=x[:, :1] > -1.0, residual=x.flip(1))

    model = Masked()
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    batch = make_batches([(5, 4, 6)])[0]
    close(torch.cat(forward_together(parts, batch.split([2, 1, 2]))), whole(batch), 1e-12)
    close(dict(parts.state_dict()), dict(whole.state_dict()), 1e-12)
    assert [one.shape for one in forward_together(parts, make_batches())] == [x.shape for x in make_batches()]


def test_frozen_layers_evaluation_and_open_contexts_are_what_they_are_for_one_batch():
    network = convert_sync_batchnorm(make_network())
    network.norm.freeze()
    before = copy.deepcopy(network.state_dict())
    with disable_running_stats(network), torch.no_grad():
        outputs = forward_together(network, make_batches())
    assert not any(output.requires_grad for output in outputs)
    close(dict(network.state_dict()), dict(before), 0)
    network.eval()
    close(forward_together(network, make_batches()), [network(batch) for batch in make_batches()], 0)


def test_autocast_reaches_the_network():
    network = convert_sync_batchnorm(make_network()).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = forward_together(network, [batch.float() for batch in make_batches()])
    assert {output.dtype for output in outputs} == {torch.bfloat16}


class Failing(nn.Module):
    """Goes another way, or fails, for wide images."""

    def __init__(self, error=None):
        super().__init__()
        self.one, self.two, self.error = SyncBatchNorm(3), SyncBatchNorm(3), error

    def forward(self, x):
        if x.size(-1) <= 8:
            return self.two(self.one(x))
        if self.error:
            raise self.error
        return self.two(x)


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_comes_out_as_it_is_and_leaves_nothing_behind(number):
    model, batches = Failing(RuntimeError("too wide")), [torch.randn(2, 3, 4, width) for width in (4, 5, 6)]
    batches[number] = torch.randn(2, 3, 4, 9)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^too wide$"):
            forward_together(model, batches)
    assert "forward" not in model.one.__dict__
    assert not any(thread.name == "lockstep" for thread in threading.enumerate())
    assert model.one.num_batches_tracked == 0


def test_a_network_that_goes_another_way_for_another_size_is_an_error_that_says_where():
    with pytest.raises(LockstepError, match=r"other batch normalizations .* one has come to one, another to two"):
        forward_together(Failing(), [torch.randn(2, 3, 4, width) for width in (4, 9)])
