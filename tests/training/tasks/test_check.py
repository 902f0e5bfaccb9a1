"""task=check finds every fault in a data set, invents none, and says the same at any number of ranks and workers."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data import registry
from syncbn.training.data.custom import CustomData
from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded, Files
from syncbn.training.data.images import ImageData
from syncbn.training.data.inspection.parts import RowsPart
from syncbn.training.data.preparation import Preparation
from tests.training.images import save_classes, save_image, save_masks
from tests.training.jobs import compose_config, run_rank, start


def check(cwd, overrides, *more):
    """The content of check.json, and the error if there are findings."""
    error = error_of_check(cwd, overrides, *more)
    return json.loads((cwd / "outputs/c/check.json").read_text()), error


def error_of_check(cwd, overrides, *more):
    try:
        run_rank(cwd, ("task=check", *overrides, "run=c", *more))
    except TrainingError as raised:
        return str(raised)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:100])


def classes_with_faults(root):
    """Images by class with ten faults; returns their overrides, and rule and part of the line of each."""
    for number, split in enumerate(("train", "val", "test")):
        for label, name in enumerate(("cat", "dog")):
            for sample in range(12):
                save_image(root / split / name / f"{sample:02}.png", 1000 * number + 100 * label + sample)
    for split in ("train", "val"):
        (root / split / "bird").mkdir()  # 1: in training a class without images; 2: in test not even a directory
    save_image(root / "val/fish/0.png", 5001)  # 3
    (root / "train/dog/02.png").write_bytes(b"")  # 4
    cut_short(root / "train/cat/03.png")  # 5
    (root / "test/dog/05.png").write_text("no image")  # 6
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(root / "val/cat/real.tif")  # 7
    with Image.open(root / "train/dog/07.png") as image:
        image.save(root / "test/dog/copy.bmp")  # 8: other bytes, the same pixels
    shutil.copy(root / "train/cat/00.png", root / "train/dog/cat.png")  # 9
    save_image(root / "train/overview.png", 5002)  # 10
    (root / "val/dog/notes.txt").write_text("left out, and no fault")
    shutil.copy(root / "val/dog/00.png", root / "val/dog/again.png")  # once more in one split: no fault
    return ("data=image_folder", f"data.path={root}", "data.size=8", "data.workers=0"), {
        "class absent": ["no bird"],
        "layout": ["a directory for fish", "no directory for bird"],
        "unreadable": ["train/dog/02.png", "train/cat/03.png", "test/dog/05.png", "val/cat/real.tif"],
        "duplicate": ["test/dog/copy.bmp"],
        "two labels": ["train/dog/cat.png"],
        "stray image": ["train/overview.png"],
    }


def masks_with_faults(root):
    """Images and masks with ten faults."""
    save_masks(root, num=6, values=(0, 1, 2, 255))
    for number, split in enumerate(("train", "val", "test")):
        for sample in range(6):
            save_image(root / split / f"images/{sample}.jpg", 100 * number + sample)
    cut_short(root / "train/images/0.jpg")
    (root / "train/masks/1.png").write_text("no image")
    (root / "val/masks/2.png").unlink()
    Image.new("L", (20, 16)).save(root / "val/masks/alone.png")
    save_image(root / "test/images/3.png", 900)
    Image.new("L", (16, 20)).save(root / "train/masks/4.png")
    Image.new("L", (20, 16), 7).save(root / "test/masks/0.png")
    Image.new("RGB", (20, 16)).save(root / "test/masks/1.png")
    shutil.copy(root / "train/images/5.jpg", root / "val/images/5.jpg")
    return ("data=mask_folder", f"data.path={root}", "data.num_classes=4", "data.size=8", "data.workers=0"), {
        "unreadable": ["train/images/0.jpg", "train/masks/1.png"],
        "no mask": ["val/images/2.jpg"],
        "no image": ["val/masks/alone.png"],
        "same name": ["test/images/3.png"],
        "mask size": ["train/masks/4.png: 16x20 pixels for an image of 20x16"],
        "mask values": ["test/masks/0.png: the values [7] in 100.0% of its pixels"],
        "mask": ["test/masks/1.png"],
        "duplicate": ["val/images/5.jpg: the same image as "],
        "class absent": ["no 3"],
    }


@pytest.mark.parametrize("plant", [classes_with_faults, masks_with_faults])
def test_it_finds_ten_planted_faults_and_invents_none(tmp_path, plant):
    overrides, planted = plant(tmp_path / "data")
    content, error = check(tmp_path, overrides)
    assert "(10 findings); see outputs/c/check.json" in error
    lines = [(f["rule"], f"{f['item']}: {f['text']}") for f in content["findings"]]
    assert len(lines) == 10 == sum(map(len, planted.values()))
    for rule, parts in planted.items():
        for part in parts:
            assert [part in line for found, line in lines if found == rule].count(True) == 1, (part, lines)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [classes_with_faults, masks_with_faults])
def test_it_says_the_same_at_any_number_of_ranks_and_workers_and_fails_on_every_rank(ranks, tmp_path, plant):
    overrides, _ = plant(tmp_path / "data")
    expected = check(tmp_path, overrides)
    assert check(tmp_path, overrides, "data.workers=2") == expected
    assert ranks(3, error_of_check, tmp_path, overrides) == [expected[1]] * 3
    assert json.loads((tmp_path / "outputs/c/check.json").read_text()) == expected[0]


def test_what_is_in_order_is_counted(tmp_path, capsys):
    save_classes(tmp_path / "data", {"a": 10, "b": 20})
    overrides = ("data=image_folder", f"data.path={tmp_path / 'data'}", "data.size=8", "data.workers=0")
    content, error = check(tmp_path, overrides)
    assert error is None
    assert content["findings"] == content["notes"] == []
    assert [split["classes"] for split in content["splits"].values()] == [
        {"a": {"samples": num}, "b": {"samples": 2 * num}} for num in (8, 1, 1)
    ]
    train = content["splits"]["train"]
    assert train["sizes"] == {"distinct": 1, "most": [[20, 16, 24]], "smallest": [20, 16], "largest": [20, 16]}
    assert train["kinds"] == {"RGB": 24}
    mean, std = registry.load_data(compose_config(*overrides).data).pixel_stats
    torch.testing.assert_close(torch.tensor(train["mean"]).double(), mean.flatten(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(train["std"]).double(), std.flatten(), rtol=1e-6, atol=0)
    assert "20x16" in capsys.readouterr().out


def test_statistics_are_of_the_pixels_that_a_run_sees_also_of_files_that_it_reads_reduced(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    rows = Decoded(Files([str(tmp_path / "noise.jpg")]), Preparation((8, 8), 3, decode="reduced"))
    found = RowsPart("train", rows, None, None).look(0).pixel_sums
    assert found.sums == rows[torch.tensor([0])].long().sum((0, 2, 3)).tolist()


@pytest.mark.parametrize("data", ["synthetic", "shapes"])
def test_data_that_are_not_files_are_looked_at_too(tmp_path, data):
    content, error = check(tmp_path, (f"data={data}", "data.num_samples=40"))
    assert error is None
    assert all(split["samples"] for split in content["splits"].values())


class Faulty(torch.utils.data.Dataset):
    """Items of which 2 raises, 3 is a number, 4 has another shape, 5 is not finite, and 6 has the label -1."""

    def __init__(self, fill, faults):
        self.fill, self.faults = fill, faults

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = torch.full((3, 4, 4), self.fill + index)
        if self.faults and index == 2:
            raise KeyError("row 2")
        if self.faults and index == 3:
            return 3
        if self.faults and index == 4:
            image = image[:, :2]
        if self.faults and index == 5:
            image[0, 0, 0] = torch.nan
        return image, -1 if self.faults and index == 6 else index % 2


def faulty():
    return CustomData(Faulty(0.0, True), Faulty(20.0, False), Faulty(29.0, False), num_classes=2)


def in_memory():
    train, val, test = (Split(torch.rand(5, 1, 4, 4), torch.arange(5)) for _ in range(3))
    val.labels[3], test.images[1] = 10, train.images[0]
    return ImageData(train, val, test, 5, 0, False)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (
            "faulty",
            [
                ("item", "train[2]", "raises KeyError: 'row 2'; repair or leave out that sample"),
                ("item", "train[3]", "expected an item (image tensor, target), got a int"),
                ("shape", "train[4]", "image of shape (3, 2, 4), the first has (3, 4, 4)"),
                ("not finite", "train[5]", "NaN or infinite values in the image"),
                ("label", "train[6]", "label -1, expected 0 to 1"),
                ("duplicate", "test[0]", "the same image as val[9] of val"),
            ],
        ),
        (
            "in_memory",
            [
                ("label", "val[3]", "label 10, expected 0 to 4"),
                ("duplicate", "test[1]", "the same image as train[0] of train"),
            ],
        ),
    ],
)
def test_of_own_data_every_item_is_looked_at(tmp_path, made, expected):
    content, _ = check(tmp_path, ("data=custom", f"data._target_={__name__}.{made}"))
    assert [(f["rule"], f["item"], f["text"]) for f in content["findings"]] == expected


def test_a_folder_that_cannot_be_divided_is_a_finding_and_is_looked_at(tmp_path):
    save_classes(tmp_path / "data", {"a": 3, "b": 12})
    cut_short(tmp_path / "data/a/001.png")
    content, error = check(tmp_path, ("data=image_folder", f"data.path={tmp_path / 'data'}", "data.workers=0"))
    assert [finding["rule"] for finding in content["findings"]] == ["layout", "unreadable"]
    assert content["splits"]["train"]["samples"] == 15
    assert error.startswith("check: layout: splitting 80/10/10 needs 10 images of every class, got fewer of a (3)")


def test_masks_of_black_and_white_are_a_finding_that_shows_the_key(tmp_path):
    save_masks(tmp_path / "data", values=(0, 255))
    for number, path in enumerate(sorted((tmp_path / "data").glob("*/images/*"))):
        save_image(path, number)
    data = ("data=mask_folder", f"data.path={tmp_path / 'data'}", "data.num_classes=2", "data.workers=0")
    [finding] = check(tmp_path, data)[0]["findings"]
    assert finding["text"].endswith("255 does not count; data.values={0:0,255:1} makes it class 1")
    assert check(tmp_path, (*data, "data.values={0:0,255:1}"))[1] is None


def test_a_directory_that_is_not_there_is_a_mistake_in_the_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.path: expected a directory, found none"):
        run_rank(tmp_path, ("task=check", "data=image_folder", f"data.path={tmp_path / 'nowhere'}"))


@pytest.mark.slow
def test_it_exits_with_1_if_there_is_a_finding_as_a_user_types_it(tmp_path):
    overrides, _ = classes_with_faults(tmp_path / "data")
    for num_ranks in (0, 2):
        done = start(tmp_path, "task=check", *overrides, f"run=c{num_ranks}", num_ranks=num_ranks)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.count("error: check: ") == 1
        assert "unreadable (4): a file that cannot be read" in done.stdout
