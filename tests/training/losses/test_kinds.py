"""Losses beside cross entropy, and class weights: sums and counts that add up however a batch is cut."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from syncbn.training.config import losses as schema
from syncbn.training.config.errors import ConfigError
from syncbn.training.data.custom import CustomData
from syncbn.training.data.dataset import Split
from syncbn.training.data.images import ImageData
from syncbn.training.losses.class_weights import class_weights
from syncbn.training.losses.dice import CrossEntropyAndDice, Dice, Weights
from syncbn.training.losses.elementwise import BinaryCrossEntropy, MeanSquaredError
from syncbn.training.losses.losses import CrossEntropy, build_loss

WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def masks(seed=0):
    """Logits and masks; one image is ignored as a whole, one has no foreground, one is half ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 3, 4, 6, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 3, (5, 4, 6), generator=generator)
    targets[0], targets[1], targets[2, :2] = 255, 0, 255
    return logits, targets


def labels():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 3, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2, 1, 1, 0, 1])


def several_labels():
    logits, _ = labels()
    targets = (logits.flip(0) > 0).float()
    targets[2, 1] = -1
    return logits, targets


LOSSES = {
    "weighted": (CrossEntropy(0.1, weights=WEIGHTS), labels),
    "weighted masks": (CrossEntropy(ignore_index=255, weights=WEIGHTS), masks),
    "dice": (Dice(255), masks),
    "smooth dice": (Dice(255, smooth=1.0), masks),
    "ce_dice": (CrossEntropyAndDice(Weights(None), 0.1, 255), masks),
    "weighted ce_dice": (CrossEntropyAndDice(Weights(WEIGHTS), ignore_index=255), masks),
    "bce": (BinaryCrossEntropy(-1), several_labels),
    "mse": (MeanSquaredError(), several_labels),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_sums_and_counts_of_uneven_parts_are_those_of_the_whole(name):
    loss, batch = LOSSES[name]
    logits, targets = batch()
    whole = torch.stack(loss(logits, targets))
    for cut in ([1], [0, 4], [1, 2, 3]):
        parts = zip(logits.tensor_split(cut), targets.tensor_split(cut), strict=True)
        torch.testing.assert_close(sum(torch.stack(loss(*part)) for part in parts), whole, rtol=1e-12, atol=1e-12)
    none = logits[:0].clone().requires_grad_()
    total, count = loss(none, targets[:0])
    assert (total.item(), count.item()) == (0, 0)
    total.backward()
    assert none.grad.shape == none.shape


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_formula(name):
    loss, batch = LOSSES[name]
    logits, targets = batch()
    assert torch.autograd.gradcheck(lambda outputs: loss(outputs, targets)[0], logits.requires_grad_())


@pytest.mark.parametrize("batch", [labels, masks])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy_is_torchs_weighted_mean(batch, smoothing):
    logits, targets = batch()
    total, count = CrossEntropy(smoothing, 255, WEIGHTS)(logits, targets)
    expected = F.cross_entropy(logits, targets, WEIGHTS, label_smoothing=smoothing, ignore_index=255)
    torch.testing.assert_close(total / count, expected)


def by_hand(logits, target, smooth):
    """The definition, for one image."""
    probabilities, guessed = logits.softmax(0), logits.argmax(0)
    valid, losses = target != 255, []
    for label in range(1, len(logits)):
        p, t = probabilities[label][valid], (target == label)[valid].double()
        if t.any() or (guessed == label)[valid].any():
            losses.append(1 - (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth))
    return sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_is_the_mean_over_the_foreground_classes_of_an_image_then_over_images(smooth):
    logits, targets = masks()
    logits[3, 0] += 99  # only background is predicted: what the target has is missed
    logits[1, 0] += 99  # nothing to find, and nothing found
    total, count = Dice(255, smooth)(logits, targets)
    torch.testing.assert_close(total, sum(by_hand(*pair, smooth) for pair in zip(logits, targets, strict=True)))
    assert count == 4  # the image that is ignored as a whole does not count
    assert by_hand(logits[1], targets[1], smooth) == 0


def test_the_right_masks_have_no_dice_loss_and_wrong_ones_all_of_it():
    _, targets = masks()
    right = 60.0 * F.one_hot(targets % 255, 3).movedim(-1, 1).double()
    assert Dice(255)(right, targets)[0] < 1e-12
    total, count = Dice(255)(right.roll(1, 1), targets)
    assert total / count == pytest.approx(1.0)


def test_ce_dice_averages_each_image_first():
    logits, targets = masks()
    loss = CrossEntropyAndDice(Weights(WEIGHTS), 0.1, 255)
    expected = Dice(255)(logits, targets)[0] + sum(
        F.cross_entropy(logits[n : n + 1], targets[n : n + 1], WEIGHTS, ignore_index=255, label_smoothing=0.1)
        for n in range(1, 5)
    )
    torch.testing.assert_close(loss(logits, targets), (expected, torch.tensor(4.0, dtype=torch.float64)))


def test_unknown_labels_do_not_count():
    logits, targets = several_labels()
    known = targets >= 0
    total, count = BinaryCrossEntropy(-1)(logits, targets)
    torch.testing.assert_close(
        total / count, F.binary_cross_entropy_with_logits(logits[known], targets[known].double())
    )
    assert count == 20


def data_with(targets, num_classes=3, own=False, names=()):
    if own:
        split = TensorDataset(torch.zeros(len(targets), 1, 2, 2), targets)
        return CustomData(split, split, split, num_classes)
    split = Split(torch.zeros(len(targets), 1, 2, 2), targets)
    return ImageData(split, split, split, num_classes, shift=0, flip=False, class_names=names)


def check_balanced(own):
    targets = torch.tensor([0, 0, 0, 1, 2, 2, 255])
    weights = class_weights("balanced", data_with(targets, own=own), 255)
    assert weights.tolist() == [6 / 9, 6 / 3, 6 / 6]
    absent = data_with(torch.tensor([0, 2]), own=own) if dist.get_rank() == 0 else data_with(torch.tensor([0, 2]))
    with pytest.raises(ConfigError, match=r"loss.class_weights=balanced: the training data has nothing of class 1; "):
        class_weights("balanced", absent, None)


@pytest.mark.parametrize("own", [False, True])
def test_balanced_weights_are_the_same_on_every_rank(ranks, own):
    ranks(3, check_balanced, own)


def test_balanced_weights_of_masks_count_valid_pixels():
    targets = torch.tensor([[[0, 0], [0, 255]], [[1, 255], [2, 2]]], dtype=torch.uint8)
    assert class_weights("balanced", data_with(targets), 255).tolist() == [6 / 9, 6 / 3, 6 / 6]


def test_class_weights_that_do_not_fit_are_one_line():
    data = data_with(torch.tensor([0, 1, 9]), names=("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"loss.class_weights: expected a number for each of 3 classes, got"):
        class_weights([1.0, 2.0], data, None)
    with pytest.raises(ConfigError, match="expected labels between 0 and 2, got 9"):
        class_weights("balanced", data, None)
    with pytest.raises(ConfigError, match="nothing of class c; give numbers"):
        class_weights("balanced", data, 9)
    assert class_weights("balanced", data, 9, stored=WEIGHTS) is WEIGHTS
    with pytest.raises(ConfigError, match=r"loss.class_weights: the checkpoint has 2, expected 3"):
        class_weights("balanced", data, None, stored=WEIGHTS[:2])


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (schema.DiceConfig("dice", None, 0.0), {}, "loss: dice is for masks, this data has one label an image"),
        (schema.BinaryCrossEntropyConfig("bce", None), {}, "bce is for targets of a 0 or 1 for each label, which only"),
        (
            schema.MeanSquaredErrorConfig("mse"),
            {},
            "mse is for targets of numbers, which only data=table with data.target=n",
        ),
        (schema.DiceConfig("dice", None, 0.0), {"own": True, "num_classes": None}, "loss: dice is for classes, which"),
    ],
)
def test_a_loss_for_other_targets_is_one_line(config, data, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(config, data_with(torch.tensor([0, 1]), **data))


def test_targets_that_are_no_labels_of_0_and_1_are_one_line():
    loss = BinaryCrossEntropy()
    for targets in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 2]])):
        with pytest.raises(ConfigError, match="loss=bce: expected targets of 0 and 1, one for each label"):
            loss.output_shape(targets, 3)
    assert SimpleNamespace(shape=MeanSquaredError().output_shape(torch.ones(2, 4), None)).shape == (2, 4)
