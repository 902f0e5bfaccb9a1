"""What the values in masks stand for, and what a run says of classes that never occur."""

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.config.errors import ConfigError
from syncbn.training.data import counting, registry
from syncbn.training.data.counting import check_training_classes, count_classes
from syncbn.training.data.dataset import IGNORE
from tests.training.images import save_classes, save_masks
from tests.training.jobs import compose_config, data_config


def masks(root, **settings):
    small = {"path": str(root), "size": 16, "workers": 0, "num_classes": 2}
    return registry.load_data(data_config("mask_folder", **(small | settings)))


def stored_values(root):
    return np.stack([np.array(Image.open(path)) for path in sorted((root / "train/masks").iterdir())])


def test_values_become_the_classes_that_are_listed_and_null_does_not_count(tmp_path):
    save_masks(tmp_path, values=(0, 40, 200, 255))
    data = masks(tmp_path, values={0: 0, 40: 1, 255: 0, 200: None})
    labels, values = data.train.labels[torch.arange(4)], stored_values(tmp_path)[:, :, 2:18]  # the centre of 16 x 20
    for value, label in ((0, 0), (40, 1), (255, 0), (200, IGNORE)):
        assert (labels[torch.from_numpy(values == value)] == label).all()


def test_a_value_that_is_not_listed_is_an_error_that_names_file_and_value(tmp_path):
    save_masks(tmp_path, values=(0, 7, 255))
    with pytest.raises(ConfigError, match=r"masks/0.png' \(a mask with the values \[7\], which data.values does not"):
        masks(tmp_path, values={0: 0, 255: 1}).train.labels[torch.tensor([0])]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({0: 0, 256: 1}, r"^data.values: expected values between 0 and 255 .* got 256"),
        ({"a": 0}, r"^data.values: .* got 'a'"),
        ({0: 0, 255: 2}, r"^data.values.255: expected null or a class, 0 to 1, got 2"),
        ({0: None}, r"^data.values: expected a class or more"),
        ([0, 255], r"^data.values: expected values with a class each"),
    ],
)
def test_a_map_that_cannot_be_is_an_error_that_names_the_key(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        masks(tmp_path, values=given)


def test_an_ignored_value_has_no_effect_beside_a_map_and_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.ignore: expected its default with data.values"):
        masks(tmp_path, values={0: 0, 9: 1}, ignore=7)


def test_masks_of_0_and_255_with_two_classes_are_an_error_that_shows_the_map(tmp_path):
    save_masks(tmp_path, values=(0, 255))
    with pytest.raises(ConfigError, match=r"^data.values: .* hold 0 and 255 alone, .*data.values={0:0,255:1} makes"):
        check_training_classes(masks(tmp_path))
    composed = compose_config("data=mask_folder", "data.path=x", "data.num_classes=2", "data.values={0:0,255:1}").data
    data = masks(tmp_path, values=composed.values)
    check_training_classes(data)
    assert data.train.labels[torch.arange(4)].unique().tolist() == [0, 1]


def test_a_run_meets_them_before_it_trains(job, tmp_path):
    save_masks(tmp_path / "scans", values=(0, 255))
    with pytest.raises(ConfigError, match=r"^data.values: "):
        job("data=mask_folder", f"data.path={tmp_path / 'scans'}", "data.num_classes=2", "model=unet_small", "run=a")
    assert not (tmp_path / "outputs/a/checkpoints").exists()


@pytest.mark.parametrize(("looked_at", "part"), [(1000, "4"), (2, "2 of the 4")])
def test_a_class_that_never_occurs_is_a_warning_by_name(tmp_path, caplog, monkeypatch, looked_at, part):
    monkeypatch.setattr(counting, "COUNTED_MASKS", looked_at)
    save_masks(tmp_path, values=(0, 2, 255))
    check_training_classes(masks(tmp_path, num_classes=5))
    expected = f"no class 1, class 3, class 4 of the {part} training masks: the model cannot learn them"
    assert [record.message for record in caplog.records] == [expected]


def test_of_a_directory_per_class_it_is_the_directory_s_name(tmp_path, caplog):
    save_classes(tmp_path, {f"{split}/{name}": 2 for split in ("train", "val", "test") for name in ("cat", "dog")})
    (tmp_path / "train/emu").mkdir()
    for split in ("val", "test"):
        save_classes(tmp_path / split, {"emu": 1})
    check_training_classes(registry.load_data(data_config("image_folder", path=str(tmp_path))))
    assert [record.message for record in caplog.records] == [
        "no emu of the 4 training images: the model cannot learn it"
    ]


def test_counts_are_those_of_labels_or_of_pixels_with_those_that_do_not_count():
    labels = torch.tensor([0, 2, 2, 0, 2])
    assert count_classes(labels, 4).counts.tolist() == [2, 0, 3, 0]
    assert count_classes(labels, 4, torch.tensor([1, 2])).absent("abcd") == ["a", "b", "d"]
    pixels = torch.tensor([[[0, 1], [IGNORE, 1]], [[1, 1], [IGNORE, IGNORE]]], dtype=torch.uint8)
    counted = count_classes(pixels, 3)
    assert (counted.counts.tolist(), counted.num_ignored) == ([1, 4, 0], 3)
    for wrong in (labels, torch.tensor([[[2]]], dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected classes below 2, got 2"):
            count_classes(wrong, 2)
