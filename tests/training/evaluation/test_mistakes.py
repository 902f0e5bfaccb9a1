"""What a model gets wrong: counted over all ranks, the most wrong first, and shown as it was before normalization."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.evaluation import mistakes as module
from syncbn.training.evaluation.mistakes import EvaluatedBatch, Mistakes, write_mistakes
from syncbn.training.evaluation.thumbnails import LARGEST, colors_of, draw_image, draw_mask
from syncbn.training.losses.elementwise import MeanSquaredError
from syncbn.training.losses.losses import CrossEntropy

STATS = torch.full((1, 1, 1, 1), 0.25, dtype=torch.float64), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)


def data(num_classes=3, names=("a", "b", "c")):
    return SimpleNamespace(num_classes=num_classes, class_names=names, pixel_stats=STATS, val=None)


def logits(*rows):
    return torch.tensor(rows).log()


def classified():
    """Six samples of three classes: the second and the last two are wrong, those two equally; the third is ignored."""
    outputs = logits(*[[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8], *[[0.1, 0.8, 0.1]] * 2])
    images = torch.arange(6.0).view(6, 1, 1, 1) / 10
    return EvaluatedBatch(torch.arange(6), images, outputs, torch.tensor([0, 1, 255, 2, 0, 2]))


def part(batch, index):
    return EvaluatedBatch(batch.index[index], batch.images[index], batch.outputs[index], batch.targets[index])


def found(batch, num_examples=12, **options):
    mistakes = Mistakes(data(**options), CrossEntropy(ignore_index=255), num_examples)
    mistakes.see(batch)
    return mistakes.content()


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def test_the_most_wrong_come_first_and_equals_by_their_position():
    content = found(classified())
    assert [(one["index"], one["truth"], one["prediction"]) for one in content["examples"]] == [
        (4, 0, 1),
        (5, 2, 1),
        (1, 1, 0),
    ]
    assert content["examples"][0]["probability_of_truth"] == pytest.approx(0.1)
    assert content["examples"][2]["probability"] == pytest.approx(0.7)
    assert (content["num_samples"], content["num_wrong"]) == (6, 3)
    assert content["confusion"] == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [2, 1, 1], [2, 2, 1]]
    assert [one["index"] for one in found(classified(), 2)["examples"]] == [4, 5]
    assert found(classified(), 0)["examples"] == []


def test_of_masks_the_worst_by_dice_over_their_foreground_come_first():
    truth = torch.tensor([[[1, 1], [0, 0]], [[2, 2], [0, 255]], [[0, 0], [0, 0]]])
    predicted = torch.tensor([[[1, 0], [0, 0]], [[1, 1], [0, 1]], [[0, 0], [0, 0]]])
    outputs = torch.nn.functional.one_hot(predicted, 3).movedim(3, 1).float()
    content = found(EvaluatedBatch(torch.tensor([7, 8, 9]), torch.zeros(3, 1, 2, 2), outputs, truth))
    assert [(one["index"], one["dice"]) for one in content["examples"]] == [(8, 0.0), (7, round(2 / 3, 4))]
    assert content["num_wrong"] == 2
    assert sum(count for *_, count in content["confusion"]) == 11
    shown = pixels(content["examples"][0]["truth"])
    assert ["#{:02x}{:02x}{:02x}".format(*shown[place]) for place in ((0, 0), (1, 0))] == [colors_of(3)[2], "#000000"]
    assert shown[1, 1].tolist() == [128, 128, 128]  # ignored


def check_content(expected):
    batch = classified()
    mistakes = Mistakes(data(), CrossEntropy(ignore_index=255), 2)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for micro in torch.arange(6).split(4):
        mine = micro.tensor_split(size)[rank]
        if len(mine):  # a rank without samples sees nothing
            mistakes.see(part(batch, mine))
    assert mistakes.content() == expected


def test_it_is_the_same_at_any_world_size(ranks):
    ranks(3, check_content, found(classified(), 2))


def test_targets_and_outputs_that_are_no_classes_are_passed_over(tmp_path):
    assert not Mistakes(data(), MeanSquaredError(), 3).applies
    assert not Mistakes(data(num_classes=None), CrossEntropy(), 3).applies
    batch = classified()
    assert found(EvaluatedBatch(batch.index, batch.images, batch.outputs[:, :2], batch.targets)) is None
    assert found(EvaluatedBatch(batch.index, batch.images, {"out": batch.outputs}, batch.targets)) is None
    write_mistakes(tmp_path, 1, Mistakes(data(), MeanSquaredError(), 3), writes=True)
    assert not any(tmp_path.iterdir())


def test_of_very_many_classes_there_is_no_matrix(monkeypatch):
    monkeypatch.setattr(module, "MOST_CLASSES", 2)
    content = found(classified())
    assert content["confusion"] is None
    assert len(content["examples"]) == 3


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    mistakes = Mistakes(data(), CrossEntropy(ignore_index=255), 1)
    mistakes.see(classified())
    write_mistakes(tmp_path, 5, mistakes, writes=False)
    write_mistakes(tmp_path / "gone", 5, mistakes, writes=True)
    assert "the report lacks it" in caplog.text
    write_mistakes(tmp_path, 5, mistakes, writes=True)
    assert json.loads((tmp_path / "mistakes.json").read_text())["step"] == 5


def test_pictures_are_as_before_normalization_small_and_scaled_if_they_have_another_range():
    gray = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    normalized = ((gray - STATS[0][0]) / STATS[1][0]).float()
    assert pixels(draw_image(normalized, *STATS))[0, :, 0].tolist() == [0, 255]
    assert pixels(draw_image(torch.tensor([[[-8.0, 8.0]]]), *STATS))[0, :, 0].tolist() == [0, 255]
    assert pixels(draw_image(torch.zeros(5, 300, 20), *STATS)).shape == (LARGEST, 6, 3)
    assert pixels(draw_mask(torch.ones(20, 300, dtype=torch.int64))).shape == (6, LARGEST, 3)
    assert draw_image(torch.zeros(1, 2, 2, 2), *STATS) is draw_image(torch.full((1, 2, 2), np.nan), *STATS) is None
