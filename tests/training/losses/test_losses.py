"""A loss is a sum and a count; the service divides by the count over all ranks, so that uneven counts are exact."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.losses import CrossEntropyConfig
from syncbn.training.data.dataset import Split
from syncbn.training.data.images import ImageData
from syncbn.training.losses.losses import CrossEntropy, build_loss, check_loss
from syncbn.training.models.unet import UnetSmall


def test_labels_to_ignore_count_for_nothing():
    logits, masks = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    masks[0, :2] = 255
    total, count = CrossEntropy(ignore_index=255)(logits, masks)
    kept = masks != 255
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[kept], masks[kept], reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == 2 * 4 * 5 - 10


def test_in_masks_what_is_to_be_ignored_needs_no_mention():
    config = CrossEntropyConfig("cross_entropy", label_smoothing=0.0, ignore_index=None)
    masks, labels = (
        ImageData(split, split, split, num_classes=2, shift=0, flip=False)
        for split in (Split(torch.zeros(1, 1, 2, 2), torch.zeros(shape)) for shape in ((1, 2, 2), (1,)))
    )
    assert build_loss(config, masks).ignore_index == 255
    assert build_loss(replace(config, ignore_index=7), masks).ignore_index == 7
    assert build_loss(config, labels).ignore_index is None
    with pytest.raises(ConfigError, match="loss: cross_entropy is for classes, which this data has not; choose loss="):
        build_loss(config, replace(labels, num_classes=None))


@pytest.mark.parametrize("ignore_index", [None, 255])
def test_no_rows_are_a_sum_of_zero_that_still_has_a_gradient(ignore_index):
    logits = torch.zeros(0, 3, 4, 5, requires_grad=True)
    total, count = CrossEntropy(ignore_index=ignore_index)(logits, torch.zeros(0, 4, 5, dtype=torch.int64))
    assert (total, count) == (0, 0)
    total.backward()
    assert logits.grad.shape == (0, 3, 4, 5)


@pytest.mark.parametrize("returned", [torch.ones(()), (torch.ones(2), torch.ones(())), (torch.ones(()), 3.0), None])
def test_what_is_no_sum_and_count_is_an_error(returned):
    with pytest.raises(ConfigError, match="loss: expected a sum and a count, two tensors without dimensions, got "):
        check_loss(lambda outputs, targets: returned, torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (3, 30)])
@pytest.mark.parametrize("num", [0, 2])
def test_the_unet_has_a_logit_per_class_and_pixel_at_any_size(size, num):
    model = UnetSmall(in_channels=2, num_classes=4, width=3, depth=3).eval()
    assert model(torch.randn(num, 2, *size)).shape == (num, 4, *size)


def test_the_unet_can_tell_where_a_pixel_is_lit():
    torch.manual_seed(0)
    model = UnetSmall(in_channels=1, num_classes=2, width=4, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    images = (torch.rand(8, 1, 12, 12) > 0.7).float()
    for _ in range(30):
        optimizer.zero_grad()
        total, count = CrossEntropy()(model(images), images[:, 0].long())
        (total / count).backward()
        optimizer.step()
    assert total / count < 0.05
