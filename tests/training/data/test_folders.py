"""Images of your own: what is found, how it is decoded, and every mistake as one message that names key and file."""

import builtins
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.loading import parse_bytes
from syncbn.training.data import decoding, images, registry
from syncbn.training.data.dataset import IGNORE
from syncbn.training.data.decoding import Decoded, Files
from syncbn.training.data.preparation import Preparation
from tests.training.checkpoint.test_resume import SMALL
from tests.training.images import save_classes, save_image, save_masks
from tests.training.jobs import compose_config

SPLITS = ("train", "val", "test")


def load(*overrides):
    return registry.load_data(compose_config(*overrides).data)


def folder(root, *overrides):
    return load("data=image_folder", f"data.path={root}", "data.size=8", *overrides)


def masks(root, *overrides):
    return load("data=mask_folder", f"data.path={root}", "data.size=8", "data.num_classes=3", *overrides)


def decode(path, size=8, channels=3):
    return Decoded(Files([str(path)]), Preparation((size, size), channels))[torch.tensor([0])][0]


def everything(rows):
    return rows[torch.arange(len(rows))]


# A directory per class


def test_one_directory_of_classes_is_cut_80_10_10_and_every_image_is_in_one_part(tmp_path):
    save_classes(tmp_path, {"b": 30, "a": 20, "c": 10})
    data = folder(tmp_path)
    assert data.class_names == ("a", "b", "c")
    assert [torch.bincount(split.labels).tolist() for split in (data.train, data.val, data.test)] == [
        [16, 24, 8], [2, 3, 1], [2, 3, 1]
    ]  # fmt: skip
    paths = [path for split in (data.train, data.val, data.test) for path in split.images.source.paths]
    assert len(set(paths)) == len(paths) == 60
    for split in (data.train, data.val, data.test):
        assert [Path(path).parent.name for path in split.images.source.paths] == [
            data.class_names[label] for label in split.labels.tolist()
        ]
    assert folder(tmp_path).val.images.source.paths == data.val.images.source.paths


def test_parts_that_are_divided_already_stay_so(tmp_path):
    for split, num in zip(SPLITS, (5, 2, 3), strict=True):
        save_classes(tmp_path / split, {"x": num, "y": 1})
    data = folder(tmp_path)
    assert [torch.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [[5, 1], [2, 1], [3, 1]]
    assert data.train.images.shape == (6, 3, 8, 8)


def test_without_val_a_tenth_of_train_validates_and_test_stays_as_it_is(tmp_path):
    save_classes(tmp_path / "train", {"x": 20, "y": 10})
    save_classes(tmp_path / "test", {"x": 2, "y": 1})
    data = folder(tmp_path)
    assert [torch.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [[18, 9], [2, 1], [2, 1]]
    paths = [path for split in (data.train, data.val, data.test) for path in split.images.source.paths]
    assert len(set(paths)) == 33


def test_without_test_as_in_imagenet_s_layout_nothing_is_tested_and_no_result_of_a_test_is_claimed(job, tmp_path):
    save_classes(tmp_path / "photos", {"train/x": 9, "train/y": 8, "val/x": 3, "val/y": 2})
    data = folder(tmp_path / "photos")
    assert (len(data.train), len(data.val), data.test) == (17, 5, None)
    small = [override for override in SMALL if not override.startswith(("data", "tracker"))]
    overrides = [*small, "data=image_folder", f"data.path={tmp_path / 'photos'}", "data.size=8", "data.workers=0"]
    run = job(*overrides, "tracker.mode=disabled", "duration=2", "run=a")
    again = job("duration=2", "tracker.report=false", "run=a")  # is finished
    evaluated = job("task=eval", f"load={again}", "run=b")
    for file in (run / "metrics.jsonl", run / "summary.json", run / "report.html", evaluated / "metrics.jsonl"):
        text = file.read_text()
        assert "val/accuracy" in text
        assert "test/accuracy" not in text
        assert "test/loss" not in text
    # What is shown as wrong are validation images, in training as in evaluation.
    shown = (run / "mistakes.json").read_text()
    assert "photos/val/" in shown
    assert (evaluated / "mistakes.json").read_text() == shown


def test_masks_need_no_test_split_either(tmp_path):
    shutil.rmtree(save_masks(tmp_path) / "test")
    data = masks(tmp_path)
    assert (len(data.train), len(data.val), data.test) == (4, 4, None)


def test_a_class_may_be_called_train(tmp_path):
    save_classes(tmp_path, {"plane": 10, "train": 10})
    assert folder(tmp_path).class_names == ("plane", "train")


def test_links_are_followed_and_other_files_are_counted(tmp_path, caplog):
    save_classes(tmp_path / "real", {"a": 10})
    save_classes(tmp_path / "photos", {"b": 10})
    (tmp_path / "photos/a").symlink_to(tmp_path / "real/a")
    (tmp_path / "photos/b/again").symlink_to(tmp_path / "photos/b")  # a circle
    for name in ("notes.txt", "more.TXT", "._000.png", ".DS_Store"):
        (tmp_path / "photos/b" / name).write_text("")
    (tmp_path / "photos/.cache").mkdir()
    caplog.set_level("INFO")
    data = folder(tmp_path / "photos")
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 20
    assert "4 files that are no images are left out (1 .DS_Store, 1 .png, 2 .txt)" in caplog.text


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, r"data.path: expected a directory per class in .*, two or more, found none"),
        ({"a": 12}, r"data.path: expected a directory per class in .*, two or more, found a"),
        ({"a": 12, "b": 3}, r"data.path: splitting 80/10/10 needs 10 images of every class, got fewer of b \(3\);"),
        (
            {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1, "test/a": 1, "test/c": 1},
            r"data.path: expected in '.*/test' the same classes as in .*/train, found no b and also c",
        ),
    ],
)
def test_a_mistake_in_the_directories_names_them(tmp_path, made, message):
    save_classes(tmp_path, made)
    with pytest.raises(ConfigError, match=f"^{message}"):
        folder(tmp_path)


def test_a_split_without_images_is_an_error(tmp_path):
    for split in SPLITS:
        save_classes(tmp_path / split, {"x": split != "val", "y": split != "val"})
        (tmp_path / split / "x").mkdir(parents=True, exist_ok=True)
        (tmp_path / split / "y").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match=r"^data.path: no image for val in"):
        folder(tmp_path)


def test_a_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.path: expected a directory, found none at"):
        folder(tmp_path / "nowhere")


# Decoding


def test_the_shorter_side_is_resized_and_the_centre_cut_out(tmp_path):
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, 4:12] = 200  # the centre
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert torch.equal(decode(tmp_path / "wide.png"), torch.full((3, 8, 8), 200, dtype=torch.uint8))
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "high.png")
    assert torch.equal(decode(tmp_path / "high.png"), torch.full((3, 8, 8), 200, dtype=torch.uint8))


def test_an_image_is_turned_as_its_exif_data_says(tmp_path):
    path = save_image(tmp_path / "upright.png", 0, size=(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    with Image.open(path) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(decode(tmp_path / "turned.png"), decode(path).rot90(-1, (1, 2)))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_usual_mode_becomes_the_channels_that_are_asked_for(tmp_path, mode, channels):
    path = save_image(tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}", 0, mode=mode)
    assert decode(path, channels=channels).shape == (channels, 8, 8)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    # Pillow's own conversion cuts everything above 255 off.
    pixels = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert torch.equal(decode(tmp_path / "deep.png", channels=1)[0], torch.from_numpy((pixels >> 8).astype(np.uint8)))


def test_pixels_without_a_fixed_range_are_an_error(tmp_path):
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"a.tif' \(pixels of mode F, which have no fixed range; save it with 8"):
        decode(tmp_path / "a.tif")


@pytest.mark.parametrize("kept", [0, 30, 400])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_file_that_is_cut_short_is_an_error_and_never_half_an_image(tmp_path, kept, suffix):
    path = save_image(tmp_path / f"a{suffix}", 0, size=(60, 60))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=rf"^data.path: cannot read the image '.*a{suffix}' \(.*\); repair it"):
        decode(path)


# The cache


def test_cached_and_decoded_anew_are_the_same_and_each_file_is_read_once(tmp_path):
    save_classes(tmp_path, {"a": 10, "b": 10})
    cached, anew = folder(tmp_path), folder(tmp_path, "data.cache=0")
    assert anew.train.images.cache is None
    first = everything(cached.train.images)
    assert torch.equal(first, everything(anew.train.images))
    for path in cached.train.images.source.paths:
        os.unlink(path)
    assert torch.equal(first, everything(cached.train.images))


@pytest.mark.parametrize(("limit", "fits"), [("3839B", False), ("3840B", True), ("1GB", True), ("auto", True)])
def test_it_is_everything_or_nothing_within_the_limit(tmp_path, caplog, limit, fits):
    save_classes(tmp_path, {"a": 10, "b": 10})  # 20 images of 3 x 8 x 8 bytes
    caplog.set_level("INFO")
    data = folder(tmp_path, f"data.cache={limit}")
    assert [split.images.cache is not None for split in (data.train, data.val, data.test)] == [fits] * 3
    assert ("decoded anew each time" in caplog.text) != fits


def test_ranks_of_a_machine_share_the_limit(tmp_path, monkeypatch):
    save_classes(tmp_path, {"a": 10, "b": 10})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert folder(tmp_path, "data.cache=7679B").train.images.cache is None
    assert folder(tmp_path, "data.cache=7680B").train.images.cache is not None


def test_a_limit_above_what_is_free_is_what_is_free(tmp_path, monkeypatch):
    save_classes(tmp_path, {"a": 10, "b": 10})
    monkeypatch.setattr(decoding, "_free_bytes", lambda shared: 3839)
    assert folder(tmp_path, "data.cache=1GB").train.images.cache is None


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("500", 500), ("1.5KB", 1500), ("2gb", 2 * 10**9), ("2 G", 2 * 10**9), ("much", None)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


# Normalization


def test_the_statistics_are_those_of_the_training_pixels(tmp_path):
    save_classes(tmp_path, {"a": 10, "b": 20})
    data = folder(tmp_path)
    pixels = everything(data.train.images).to(torch.float64) / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3))
    torch.testing.assert_close(data.pixel_stats[0].flatten(), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(data.pixel_stats[1].flatten(), std, rtol=0, atol=1e-12)


def test_of_many_images_they_are_those_of_a_fixed_evenly_spaced_part(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "STATS_SAMPLES", 4)
    save_classes(tmp_path, {"a": 10, "b": 10})
    data = folder(tmp_path)
    pixels = data.train.images[torch.tensor([0, 4, 8, 12])].to(torch.float64) / 255
    torch.testing.assert_close(data.pixel_stats[0].flatten(), pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
    assert int(data.train.images.cache.filled.sum()) == 4


# The classes of a run, and its pixels


def test_after_training_pixels_are_normalized_as_they_were_and_other_classes_refused(job, tmp_path):
    save_classes(tmp_path / "photos", {"a": 10, "b": 10})
    small = [override for override in SMALL if not override.startswith("data")]
    overrides = [*small, "data=image_folder", f"data.path={tmp_path / 'photos'}", "data.size=8", "data.workers=0"]
    run = job(*overrides, "duration=2", "run=a")
    mean, std = load("data=image_folder", f"data.path={tmp_path / 'photos'}", "data.size=8").pixel_stats
    for path in (tmp_path / "photos").glob("*/*.png"):  # darker ones, to be told apart by the same model
        Image.open(path).point(lambda value: value // 2).save(path)
    precise = job("task=recalibrate", f"load={run}", "run=b")
    for loaded, number in ((run, "c"), (precise, "d")):
        exported = job("task=export", f"load={loaded}", "export.formats=[safetensors]", f"run={number}")
        description = json.loads((exported / "export/export.json").read_text())
        assert description["input"]["mean"] == mean.flatten().tolist()
        assert description["input"]["std"] == std.flatten().tolist()
        assert description["input"]["image"] == {"size": [8, 8], "channels": 3, "fit": "crop", "range": None}
        assert description["output"]["labels"] == ["a", "b"]
    (tmp_path / "photos/b").rename(tmp_path / "photos/c")
    with pytest.raises(ConfigError, match=r"^data.path: the model was trained on the classes a, b, the data has a, c"):
        job("task=eval", f"load={run}", "run=e")


def test_a_run_records_its_classes_and_does_not_go_on_with_others(job, tmp_path):
    save_classes(tmp_path / "photos", {"a": 10, "b": 10})
    small = [override for override in SMALL if not override.startswith("data")]
    overrides = [*small, "data=image_folder", f"data.path={tmp_path / 'photos'}", "data.size=8", "data.workers=0"]
    run = job(*overrides, "duration=2", "run=a")
    assert json.loads((run / "classes.json").read_text()) == ["a", "b"]
    (tmp_path / "photos/b").rename(tmp_path / "photos/c")
    with pytest.raises(ConfigError, match=r"^data.path: this run began with the classes a, b, the data has a, c"):
        job(*overrides, "duration=4", "run=a")


# Masks


def test_masks_are_class_numbers_and_their_ignored_value_is_255(tmp_path):
    save_masks(tmp_path, values=(0, 1, 2, 9))
    data = masks(tmp_path, "data.ignore=9", "data.shift=0", "data.flip=false")
    assert data.has_masks
    assert data.num_classes == 3
    _, labels = data.train_batch(torch.arange(4), 0, 0, torch.float32)
    assert labels.dtype == torch.int64
    assert labels.shape == (4, 8, 8)
    assert labels.unique().tolist() == [0, 1, 2, IGNORE]


def test_of_a_palette_the_indices_count_and_not_the_colours(tmp_path):
    save_masks(tmp_path, values=(0, 1, 2))
    plain = everything(masks(tmp_path).val.labels)
    for path in tmp_path.glob("*/masks/*.png"):
        with Image.open(path) as gray:
            coloured = Image.new("P", gray.size)
            coloured.frombytes(gray.tobytes())
        coloured.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
        coloured.save(path)
    assert torch.equal(everything(masks(tmp_path).val.labels), plain)


def test_image_and_mask_are_cut_alike_and_move_together(tmp_path):
    # A picture whose red says the class: wherever augmentation moves a pixel, its label has to come along.
    for split in SPLITS:
        for number in range(3):
            picture = save_masks_like(tmp_path / split, number)
        assert picture.shape == (16, 20)
    data = masks(tmp_path, "data.size=16", "data.shift=3", "data.flip=true")
    data.__dict__["pixel_stats"] = (torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    changed = False
    for epoch in range(6):
        images, labels = data.train_batch(torch.arange(3), 0, epoch, torch.float32)
        red = (images[:, 0] * 255).round().to(torch.int64)
        came_in = labels == IGNORE
        assert torch.equal(red[~came_in], labels[~came_in] * 100 + 10)
        assert (red[came_in] == 0).all()
        changed |= bool(came_in.any())
    assert changed


def save_masks_like(directory, seed):
    classes = np.random.default_rng(seed).integers(0, 3, (16, 20), dtype=np.uint8)
    red = np.stack([classes * 100 + 10, classes * 0, classes * 0], axis=2).astype(np.uint8)
    for kind, pixels in (("images", red), ("masks", classes)):
        (directory / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(directory / kind / f"{seed}.png")
    return classes


def test_a_value_that_is_no_class_is_an_error_that_names_file_and_value(tmp_path):
    save_masks(tmp_path, values=(0, 1, 2, 7))
    with pytest.raises(ConfigError, match=r"masks/0.png' \(a mask with the values \[7\], which data.num_classes and"):
        everything(masks(tmp_path).train.labels)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: os.unlink(root / "val/masks/2.png"), r"data.path: expected in '.*val/masks' the same masks for"),
        (lambda root: os.rename(root / "test/masks", root / "test/labels"), r"data.path: expected the directory '.*te"),
        (lambda root: save_image(root / "train/images/1.png", 9), r"data.path: '.*1.*' and '.*1.*' have the same name"),
        (lambda root: os.rename(root / "val", root / "valid"), r"data.path: expected the directories train, val, test"),
    ],
)
def test_pairs_that_do_not_fit_are_an_error(tmp_path, break_it, message):
    save_masks(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ConfigError, match=f"^{message}"):
        masks(tmp_path)


def test_an_image_and_a_mask_of_different_sizes_are_an_error(tmp_path):
    save_masks(tmp_path)
    save_image(tmp_path / "train/masks/1.png", 0, size=(16, 18), mode="1")
    with pytest.raises(ConfigError, match=r"masks/1.png' \(a mask of 16x18 pixels for an image of 20x16\)"):
        masks(tmp_path).train_batch(torch.arange(4), 0, 0, torch.float32)


# Shapes


def test_shapes_are_the_same_at_every_call_and_others_for_another_seed():
    first, second, other = (load("data=shapes", "data.num_samples=20", f"data.seed={seed}") for seed in (0, 0, 1))
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.train.labels, second.train.labels)
    assert not torch.equal(first.train.images, other.train.images)
    more = load("data=shapes", "data.num_samples=40")
    assert torch.equal(more.train.images[:16], first.train.images)  # a sample does not depend on how many there are


def test_shapes_hold_every_class_and_ragged_masks():
    data = load("data=shapes", "data.num_samples=100")
    assert data.train.labels.unique().tolist() == [0, 1, 2, 3, IGNORE]
    counted = (data.train.labels != IGNORE).flatten(1).sum(1)
    assert len(counted.unique()) > 8
    assert counted.min() >= 32 * 32 // 2
    assert (load("data=shapes", "data.ragged=0").train.labels != IGNORE).all()


def test_few_kinds_of_shapes_are_background_and_squares():
    assert load("data=shapes", "data.num_classes=2", "data.ragged=0").train.labels.unique().tolist() == [0, 1]


# Hugging Face


@pytest.fixture
def hf():
    return pytest.importorskip("datasets")


def save_hf(hf, path, splits, *, encoded=True, names=("cat", "dog")):
    def rows(num, seed):
        pixels = [np.random.default_rng(seed + i).integers(0, 256, (16, 20, 3), dtype=np.uint8) for i in range(num)]
        images = [Image.fromarray(p) for p in pixels] if encoded else [p.tolist() for p in pixels]
        features = {"image": hf.Image() if encoded else hf.Array3D((16, 20, 3), "uint8"),
                    "label": hf.ClassLabel(names=list(names))}  # fmt: skip
        columns = {"image": images, "label": [i % len(names) for i in range(num)]}
        return hf.Dataset.from_dict(columns, features=hf.Features(features))

    if isinstance(splits, int):
        rows(splits, 0).save_to_disk(path)
    else:
        hf.DatasetDict({name: rows(num, 100 * i) for i, (name, num) in enumerate(splits.items())}).save_to_disk(path)
    return path


def load_hf(path, *overrides):
    return load("data=hf", f"data.path={path}", "data.size=8", *overrides)


@pytest.mark.parametrize("encoded", [True, False])
def test_a_saved_data_set_is_read_with_its_names(hf, tmp_path, encoded):
    data = load_hf(save_hf(hf, tmp_path / "saved", {"train": 5, "validation": 2, "test": 3}, encoded=encoded))
    assert data.class_names == ("cat", "dog")
    assert [len(split) for split in (data.train, data.val, data.test)] == [5, 2, 3]
    expected = np.random.default_rng(4).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(expected).save(tmp_path / "expected.png")
    assert torch.equal(data.train.images[torch.tensor([4])][0], decode(tmp_path / "expected.png"))
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0]


def test_a_single_split_is_cut_80_10_10(hf, tmp_path):
    data = load_hf(save_hf(hf, tmp_path / "saved", 40))
    assert [torch.bincount(s.labels).tolist() for s in (data.train, data.val, data.test)] == [[16, 16], [2, 2], [2, 2]]


def test_without_validation_a_tenth_of_train_is_held_out(hf, tmp_path):
    data = load_hf(save_hf(hf, tmp_path / "saved", {"train": 40, "test": 3}))
    assert [len(part) for part in (data.train, data.val, data.test)] == [36, 4, 3]
    assert data.val.labels.bincount().tolist() == [2, 2]


def test_without_test_there_is_none(hf, tmp_path):
    data = load_hf(save_hf(hf, tmp_path / "saved", {"train": 5, "validation": 4}))
    assert (len(data.train), len(data.val), data.test) == (5, 4, None)


def test_arrays_that_are_no_bytes_are_an_error(hf, tmp_path):
    features = hf.Features({"image": hf.Array2D((4, 4), "float32"), "label": hf.Value("int64")})
    rows = {"image": [[[0.5] * 4] * 4] * 20, "label": [0, 1] * 10}
    hf.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    data = load_hf(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"'row \d of val' \(an array of float\d+; expected integers from 0 to 255\)"):
        data.val.images[torch.tensor([0])]


def test_labels_that_are_names_are_an_error_that_says_how_to_number_them(hf, tmp_path):
    hf.Dataset.from_dict({"image": [[[0]]] * 20, "label": ["a", "b"] * 10}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"^data.label: expected labels 0, 1, .*class_encode_column"):
        load_hf(tmp_path / "saved")


def test_mistakes_about_a_saved_data_set_name_the_key(hf, tmp_path):
    path = save_hf(hf, tmp_path / "saved", {"train": 4})
    with pytest.raises(ConfigError, match=r"^data.path: expected a split test, found train;"):
        load_hf(path)
    path = save_hf(hf, tmp_path / "single", 40)
    with pytest.raises(ConfigError, match=r"^data.image: no column 'img'; found image, label"):
        load_hf(path, "data.image=img")
    with pytest.raises(ConfigError, match=r"^data.path: '.*' is not a data set that save_to_disk wrote"):
        load_hf(tmp_path)


def test_without_the_library_the_error_names_the_extra(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"^data=hf: needs .* pip install 'syncbn\[hf\]'"):
        load_hf(tmp_path)
