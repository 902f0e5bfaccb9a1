"""How an image in a file becomes what a model takes: its size, the bits that are kept, mean and std."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from syncbn.training.config.errors import ConfigError
from syncbn.training.data import registry
from syncbn.training.data.dataset import IGNORE
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.trained_input import TrainedInput
from tests.training.checkpoint.test_resume import SMALL
from tests.training.images import save_classes, save_image, save_masks
from tests.training.jobs import data_config
from tests.training.trainer.test_train import load_last


def load(kind, root, **settings):
    return registry.load_data(data_config(kind, path=str(root), workers=0, cache="0", **settings))


def first_image(data):
    return data.train.images[torch.tensor([0])][0]


@pytest.mark.parametrize("size", [(20, 16), (16, 20), (31, 77), (12, 12), (5, 200)])
def test_a_crop_is_what_pillow_s_fit_makes(tmp_path, size):
    with Image.open(save_image(tmp_path / "a.png", 0, size=size)) as image:
        for height, width in ((12, 12), (7, 15)):
            expected = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            found = Preparation((height, width), 3).fitted(image)
            assert found.numpy().transpose(1, 2, 0).tobytes() == expected.tobytes()


def save_photograph(path, size=(401, 300), orientation=1):
    """A JPEG file of soft shapes, about as a photograph has them, turned by its EXIF data."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95, exif=exif)
    return path


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_reduced_jpeg_is_the_same_picture_to_a_few_gray_levels(tmp_path, fit, orientation):
    path = save_photograph(tmp_path / "a.jpg", orientation=orientation)
    full, reduced = (Preparation((36, 48), 3, fit, decode=decode) for decode in ("full", "reduced"))
    with Image.open(path) as one, Image.open(path) as other:
        expected, found = full.fitted_file(one).int(), reduced.fitted_file(other).int()
        assert {*one.size} == {401, 300}
        assert {*other.size} in ({101, 75}, {201, 150})
    # A pixel out of place would be seen at once: neighbours differ by far more.
    assert (found - expected).abs().float().mean() < 1
    assert (expected[:, :, 1:] - expected[:, :, :-1]).abs().float().mean() > 5


@pytest.mark.parametrize(("size", "width"), [(38, 401), (37, 201), (18, 101), (9, 51), (4, 51)])
def test_a_jpeg_is_reduced_only_as_far_as_twice_the_result_is_left(tmp_path, size, width):
    with Image.open(save_photograph(tmp_path / "a.jpg")) as image:
        Preparation((2 * size, 2 * size), 1, decode="reduced").fitted_file(image)
        assert image.width == width


def test_other_formats_are_decoded_in_full_and_a_checkpoint_says_how_its_images_were(tmp_path):
    reduced = Preparation((6, 6), 3, decode="reduced")
    with Image.open(save_image(tmp_path / "a.png", 0, size=(80, 60))) as image:
        assert torch.equal(reduced.fitted_file(image), Preparation((6, 6), 3).fitted(image))
    mean = torch.zeros(1, 3, 1, 1)
    stored = {"data": {"image": reduced.description(), "mean": mean, "std": mean + 1, "classes": []}, "config": {}}
    described = TrainedInput.of(stored)
    assert described.preparation == reduced
    with Image.open(save_photograph(tmp_path / "b.jpg")) as one, Image.open(tmp_path / "b.jpg") as other:
        assert torch.equal(described.prepare(one) * 255, reduced.fitted_file(other).float())


def test_a_padded_image_is_whole_and_its_padding_is_ignored_in_the_mask(tmp_path):
    save_masks(tmp_path, values=(0, 1, 2))  # 16 rows, 20 columns
    data = load("mask_folder", tmp_path, num_classes=3, size=[20, 40], fit="pad")
    image, mask = first_image(data), data.train.labels[torch.tensor([0])][0]
    assert image.shape == (3, 20, 40)
    padding = torch.ones(20, 40, dtype=torch.bool)
    padding[:, 7:32] = False  # 16 x 20 becomes 20 x 25
    assert (image[:, padding] == 0).all()
    assert (mask[padding] == IGNORE).all()
    assert (mask[~padding] != IGNORE).all()
    whole = Image.open(tmp_path / "train/images/0.jpg").resize((25, 20), Image.Resampling.BILINEAR)
    assert torch.equal(image[:, :, 7:32], torch.from_numpy(np.array(whole)).permute(2, 0, 1))


def test_a_stretched_image_is_whole_too(tmp_path):
    path = save_image(tmp_path / "a.png", 0)
    with Image.open(path) as image:
        found = Preparation((9, 31), 3, "stretch").fitted(image)
        expected = image.resize((31, 9), Image.Resampling.BILINEAR)
    assert found.permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixels_in_memory_are_fitted_as_those_of_a_file_are(tmp_path, fit, dtype):
    with Image.open(save_image(tmp_path / "a.png", 0)) as image:
        preparation = Preparation((11, 13), 3, fit)
        expected = preparation.fitted(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = preparation.fitted_pixels(pixels.to(dtype))
    assert found.dtype == dtype
    assert (found.to(torch.float64) - expected).abs().max() <= (0 if dtype == torch.uint8 else 1)


def save_deep(root, values):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(values).save(root / split / name / "0.png")
    return root


def test_a_range_spreads_the_values_of_deep_images_over_all_levels(tmp_path, caplog):
    values = np.arange(0, 4096, dtype=np.uint16).reshape(64, 64)
    save_deep(tmp_path, values)
    same = {"size": 64, "channels": 1}
    found = first_image(load("image_folder", tmp_path, **same, range=[100, 4000])).numpy()[0]
    assert np.array_equal(found, np.rint((values.astype(float) - 100).clip(0, 3900) / 3900 * 255))
    assert len(np.unique(found)) == 256
    assert "data.range" not in caplog.text
    assert len(first_image(load("image_folder", tmp_path, **same)).unique()) == 16
    expected = "values from 0 to 4095, as in 2 of them, become 16 gray levels; data.range=[0,4095] maps them to 256"
    assert expected in caplog.text


def test_a_range_gives_pixels_of_any_number_type_one(tmp_path):
    save_image(tmp_path / "x/a.png", 0)
    values = np.array([[-3.0, 0.0], [np.nan, 0.5]], dtype=np.float32)
    assert Preparation((2, 2), 1, range=(0, 1)).fitted(Image.fromarray(values)).flatten().tolist() == [0, 0, 0, 128]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", [8], r"^data.size: expected 1 pixel or more, or \[height, width\], got \[8\]"),
        ("size", 0, r"^data.size: "),
        ("size", "big", r"^data.size: "),
        ("fit", "cover", r"^data.fit: expected one of crop, pad, stretch, got 'cover'"),
        ("range", [5, 5], r"^data.range: expected null or \[low, high\]"),
        ("mean", "some", r"^data.mean: expected auto, imagenet, init.<name>, or numbers"),
        (
            "mean",
            [0.5, 0.5],
            r"^data.mean: expected a number, or 3 for the channels of .*, got \[0.5, 0.5\]",
        ),
        ("std", 0, r"^data.std: .* above 0, got 0"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_that_names_the_key(tmp_path, key, value, message):
    save_classes(tmp_path, {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    with pytest.raises(ConfigError, match=message):
        load("image_folder", tmp_path, **{key: value})


def test_mean_and_std_are_the_numbers_that_are_given_each_by_itself(tmp_path):
    save_classes(tmp_path, {"train/a": 3, "train/b": 1, "val/a": 1, "val/b": 1})
    own = load("image_folder", tmp_path, size=8)
    known = load("image_folder", tmp_path, size=8, mean="imagenet", std=[0.1, 0.2, 0.3])
    assert known.pixel_stats[0].flatten().tolist() == [0.485, 0.456, 0.406]
    assert known.pixel_stats[1].flatten().tolist() == [0.1, 0.2, 0.3]
    one = load("image_folder", tmp_path, size=8, mean=0.5)
    assert one.pixel_stats[0].flatten().tolist() == [0.5] * 3
    assert torch.equal(one.pixel_stats[1], own.pixel_stats[1])


def test_a_checkpoint_has_the_numbers_and_all_that_prepares_an_image_as_validation_does(job, tmp_path):
    save_classes(tmp_path / "photos", {"train/a": 9, "train/b": 8, "val/a": 1, "val/b": 1})
    small = [override for override in SMALL if not override.startswith("data")]
    photos = [*small, "data=image_folder", f"data.path={tmp_path / 'photos'}", "data.workers=0", "duration=1"]
    base = job("data=synthetic", "data.num_samples=40", "data.size=8", *small, "duration=1", "run=base")
    run = job(*photos, "data.size=[8,12]", "data.fit=pad", "data.mean=init.backbone", "data.std=0.25",
              f"init.backbone.path={base}", "run=a")  # fmt: skip
    stored = load_last(run)
    trained = TrainedInput.of(stored)
    assert torch.equal(trained.mean, load_last(base)["data"]["mean"])
    assert trained.std.flatten().tolist() == [0.25] * 3
    assert trained.class_names == ("a", "b")
    data = load("image_folder", tmp_path / "photos", size=[8, 12], fit="pad")
    images, _ = data.normalized_by(trained.mean, trained.std).eval_batch(data.val, torch.tensor([1]), torch.float32)
    with Image.open(tmp_path / "photos/val/b/000.png") as image:
        assert torch.equal(trained.prepare(image), images[0])
    (tmp_path / "outputs/base").rename(tmp_path / "outputs/gone")
    assert torch.equal(load_last(job("duration=2", "run=a"))["data"]["mean"], trained.mean)
    with pytest.raises(ConfigError, match=r"^data.mean=init.head: init loads no head, only nothing; give init.head.pa"):
        job(*photos, "data.mean=init.head", "run=c")


def test_a_checkpoint_of_0_1_0_says_it_in_its_configuration():
    data = {"classes": ["a", "b"], "mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}
    trained = TrainedInput.of({"data": data, "config": {"data": {"size": 32, "channels": 3}}})
    assert trained.preparation == Preparation((32, 32), 3)
    with pytest.raises(ConfigError, match=r"^load: the checkpoint does not say how image files become the model's"):
        TrainedInput.of({"data": {**data, "image": None}, "config": {"data": {"_target_": "mine.Scans"}}})
