"""data=table: what a table may hold, how it is divided, and every mistake as one message with row and column."""

import csv
from collections import defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.losses import BinaryCrossEntropyConfig, CrossEntropyConfig, MeanSquaredErrorConfig
from syncbn.training.data import registry
from syncbn.training.data.counting import check_training_classes
from syncbn.training.data.dataset import IGNORE, as_trained, describe_data, normalized_as_trained
from syncbn.training.data.inspection.inventory import take_inventory
from syncbn.training.data.tables import table
from syncbn.training.data.whole_folder import load_whole
from syncbn.training.losses.losses import build_loss, with_known_labels
from tests.training.images import save_image
from tests.training.jobs import compose_config

HEADER = ["image", "label", "patient", "fold", "split", "age", "left", "right"]
NAMES = ("cat", "dog", "owl")
BCE = BinaryCrossEntropyConfig("bce", None)


def rows_of(num=30, of_patient=3):
    """Rows below HEADER: ten images of each class, three of each patient."""
    splits = ["train", "train", "train", "validation", "Test"]
    return [
        [f"files/{n}.png", NAMES[n // of_patient % 3], f"p{n // of_patient}", str(n // of_patient % 4),
         splits[n // of_patient % 5], str(20 + 0.5 * n), str(n % 2), str(int(n % 3 == 0))] for n in range(num)
    ]  # fmt: skip


def write_table(root, rows, header=HEADER, files=None, delimiter=","):
    """The table study.csv, and an image for each of `files`; by default for every row."""
    for name in [row[0] for row in rows] if files is None else files:
        path = root / name
        if not path.exists():
            save_image(path, len(name) + int("".join(filter(str.isdigit, path.stem)) or 0), size=(6, 6))
    with (root / "study.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return root / "study.csv"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A table of 30 rows with their images."""
    return write_table(tmp_path_factory.mktemp("study"), rows_of())


@cache
def _composed():
    return compose_config("data=table", "data.path=x", "data.size=6", "data.workers=0").data


def config(path, **settings):
    return replace(_composed(), path=str(path), **settings)


def load(path, **settings):
    return registry.load_data(config(path, **settings))


def rows_in(data):
    """The row numbers of each split."""
    parts = {"train": data.train, "val": data.val, "test": data.test}
    return {name: [*split.images.source.rows] for name, split in parts.items() if split is not None}


def patients(data):
    """The patients of each split, by the rows of `rows_of`."""
    return {name: {(row - 2) // 3 for row in rows} for name, rows in rows_in(data).items()}


def error_of(path, **settings):
    with pytest.raises(ConfigError) as caught:
        load(path, **settings)
    return str(caught.value)


# What is in it


def test_every_row_is_in_one_split_with_its_image_and_its_class(study):
    data = load(study)
    assert sorted(row for rows in rows_in(data).values() for row in rows) == [*range(2, 32)]
    assert (data.class_names, data.num_classes) == (NAMES, 3)
    for split in (data.train, data.val, data.test):
        for position, row in enumerate(split.images.source.rows):
            path, name, *_ = rows_of()[row - 2]
            with Image.open(study.parent / path) as image:
                assert (split.images[torch.tensor([position])][0].permute(1, 2, 0).numpy() == np.asarray(image)).all()
            assert NAMES[split.labels[position]] == name


def test_classes_that_are_numbers_are_in_the_order_of_the_numbers(tmp_path):
    path = write_table(tmp_path, [[f"{n}.png", str(n % 3 * 5)] for n in range(12)], ["image", "label"])
    assert load(path).class_names == ("0", "5", "10")
    path.write_text(path.read_text().replace(",0", ",0.0"))
    assert load(path).class_names == ("0", "5", "10")


def test_several_columns_are_labels_and_numbers_are_numbers(study):
    labels = load(study, label=["left", "right"])
    assert (labels.targets, labels.class_names, labels.num_classes) == ("labels", ("left", "right"), 2)
    images, targets = labels.train_batch(torch.arange(3), 0, 0, torch.float64)
    expected = [[float(cell) for cell in rows_of()[row - 2][6:]] for row in rows_in(labels)["train"][:3]]
    assert (targets.tolist(), targets.dtype, images.dtype) == (expected, torch.float32, torch.float64)
    ages = load(study, label="age", target="numbers")
    assert ages.eval_batch(ages.val, torch.arange(1), torch.float32)[1].item() == 20 + 0.5 * (
        rows_in(ages)["val"][0] - 2
    )
    assert (ages.has_masks, ages.train_labels) == (False, None)


def test_masks_are_a_column_too(tmp_path):
    for number in range(6):
        save_image(tmp_path / f"{number}.png", number, size=(6, 6))
        mask = np.full((6, 6), 255, dtype=np.uint8)
        mask[:2] = 0
        Image.fromarray(mask).save(tmp_path / f"{number}_mask.png")
    rows = [[f"{number}.png", f"{number}_mask.png"] for number in range(6)]
    data = load(write_table(tmp_path, rows, ["image", "mask"]), mask="mask", num_classes=2, values={0: 0, 255: 1})
    assert data.has_masks
    assert data.train.labels[torch.arange(2)].unique().tolist() == [0, 1]
    ignored = load(tmp_path / "study.csv", mask="mask", num_classes=2)
    assert ignored.train.labels[torch.arange(2)].unique().tolist() == [0, IGNORE]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_cells_may_be_separated_in_three_ways_and_blank_lines_count_as_rows(tmp_path, delimiter):
    rows = [[f"{number}.png", "ab"[number % 2]] for number in range(6)]
    path = write_table(tmp_path, rows, ["image", "label"], delimiter=delimiter)
    path.write_text("\ufeff" + path.read_text().replace("\n3.png", "\n\n3.png"), encoding="utf-8")
    assert sorted(row for rows in rows_in(load(path)).values() for row in rows) == [2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("module", ["pyarrow", "pandas"])
def test_parquet_is_the_same_with_rows_from_0(study, monkeypatch, module):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.read_csv(study)
    frame.loc[3, "fold"] = None  # whole numbers beside a missing one become floats
    frame.to_parquet(study.with_suffix(".parquet"))
    if module == "pandas":
        monkeypatch.setattr(table, "parquet_columns", table.pandas_columns)
    data, expected = load(study.with_suffix(".parquet")), load(study)
    assert rows_in(data) == {name: [row - 2 for row in rows] for name, rows in rows_in(expected).items()}
    assert data.division == expected.division
    message = error_of(study.with_suffix(".parquet"), fold=1, folds="fold")
    assert message.startswith("data.folds: row 3, column 'fold' of ")


# How it is divided


def test_no_patient_is_in_two_splits_however_the_table_is_divided(study):
    for settings in ({}, {"fold": 0}, {"fold": 2, "folds": 3}, {"split_seed": 5}):
        found = patients(load(study, group="patient", **settings))
        assert len(set().union(*found.values())) == sum(map(len, found.values())) == 10, settings


def test_a_column_of_splits_is_taken_as_it_is(study):
    assert patients(load(study, split="split")) == {"train": {0, 1, 2, 5, 6, 7}, "val": {3, 8}, "test": {4, 9}}


def test_without_rows_for_validation_a_tenth_of_the_groups_validates(study, tmp_path):
    text = study.read_text().replace("validation", "train")
    (study.parent / "without.csv").write_text(text)
    found = patients(load(study.parent / "without.csv", split="split", group="patient"))
    assert found["test"] == {4, 9}
    assert len(found["val"]) == 1


@pytest.mark.parametrize("settings", [{"folds": 4}, {"folds": "fold"}], ids=str)
def test_each_row_is_tested_in_one_fold(study, settings):
    tested = defaultdict(int)
    for fold in range(4):
        found = patients(load(study, group="patient", fold=fold, **settings))
        assert found.keys() == {"train", "val", "test"}
        for patient in found["test"]:
            tested[patient] += 1
            assert settings["folds"] == 4 or patient % 4 == fold
    assert dict(tested) == dict.fromkeys(range(10), 1)


def test_the_division_is_of_the_table_and_the_seed_alone(study):
    expected = load(study, group="patient")
    assert load(study, group="patient").division == expected.division
    lines = study.read_text().splitlines()
    (study.parent / "turned.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert load(study.parent / "turned.csv", group="patient").division == expected.division
    assert load(study, group="patient", split_seed=1).division != expected.division


def test_a_run_does_not_go_on_with_a_table_that_has_grown_and_a_task_with_load_warns(study, caplog):
    data = load(study)
    trained = describe_data(data)
    assert normalized_as_trained(data, trained).division == data.division
    lines = study.read_text().splitlines()
    (study.parent / "shrunk.csv").write_text("\n".join(lines[:-1]))
    other = load(study.parent / "shrunk.csv")
    with pytest.raises(ConfigError, match=r"^data\.path: the table has other rows than when this run began"):
        normalized_as_trained(other, trained)
    assert as_trained(other, trained).division == other.division
    assert "divided otherwise than it was in training" in caplog.text


# Mistakes


def changed(root, row, column, cell):
    """The study with another cell; `row` counts the header."""
    rows = rows_of()
    rows[row - 2][HEADER.index(column)] = cell
    return write_table(root, rows, files=[one[0] for one in rows_of()])


@pytest.mark.parametrize(
    ("row", "column", "cell", "settings", "message"),
    [
        (5, "image", "", {}, "data.image: row 5, column 'image' of '{}': no file; fill it in, or remove the row"),
        (6, "image", "nope.png", {}, "data.image: row 6, column 'image' of '{}': no file '{}/nope.png'; paths are rel"),
        (7, "label", "", {}, "data.label: row 7, column 'label' of '{}': no class; fill it in, or remove the row"),
        (7, "patient", "", {"group": "patient"}, "data.group: row 7, column 'patient' of '{}': empty; fill it in"),
        (9, "image", "files/0.png", {"group": "patient"}, "data.group: row 9, column 'image' of '{}': the image of"
         " row 2, which is of another group in 'patient' (p0)"),
        (9, "split", "tset", {"split": "split"}, "data.split: row 9, column 'split' of '{}': expected train, val or"
         " test, got 'tset'"),
        (3, "split", "test", {"split": "split", "group": "patient"}, "data.split: row 3, column 'split' of '{}':"
         " 'test', but the group 'p0' is in 'train' too (row 2); keep it in one of them"),
        (14, "image", "files/0.png", {"split": "split"}, "data.split: row 14, column 'split' of '{}': 'Test', but the"
         " same image is in 'train' too (row 2)"),
        (4, "fold", "3", {"fold": 0, "folds": "fold", "group": "patient"}, "data.folds: row 4, column 'fold' of '{}':"
         " '3', but the group 'p0' is in '0' too (row 2)"),
        (8, "left", "2", {"label": ["left", "right"]}, "data.label: row 8, column 'left' of '{}': '2' is no label;"
         " expected 0 or 1, or -1 for unknown"),
        (8, "age", "nan", {"label": "age", "target": "numbers"}, "data.label: row 8, column 'age' of '{}': 'nan' is no"
         " number"),
    ],
)  # fmt: skip
def test_a_mistake_names_row_and_column(tmp_path, row, column, cell, settings, message):
    path = changed(tmp_path, row, column, cell)
    assert error_of(path, **settings).startswith(message.replace("{}", str(path), 1).replace("{}", str(tmp_path)))


def test_an_empty_cell_is_named_even_where_it_leaves_a_single_class(tmp_path):
    save_image(tmp_path / "a.png", 0)
    (tmp_path / "two.csv").write_text("image,label\na.png,cat\na.png,\n")
    assert error_of(tmp_path / "two.csv").startswith("data.label: row 3, column 'label' of ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": "file"}, "data.image: no column 'file' in '{}'; it has image, label, patient, fold, split, age, "),
        ({"label": "age"}, "data.label: row 3, column 'age' of '{}': 20.5 is a number, expected classes; data.target="),
        ({"fold": 7, "folds": "fold"}, "data.fold: expected one of the folds in column 'fold' of '{}' (0, 1, 2,"),
        ({"fold": 1, "folds": 40}, "data.path: 30 images of '{}' cannot be divided into 40 folds"),
        ({"fold": 1, "folds": 11, "group": "patient"}, "data.group: 10 groups in column 'patient' of '{}' cannot be"),
        ({"split": "label"}, "data.split: row 2, column 'label' of '{}': expected train, val or test, got 'cat' (29"
         " more rows have a mistake; task=check lists them all)"),
    ],
)  # fmt: skip
def test_columns_and_folds_that_are_not_there_are_named(study, settings, message):
    assert error_of(study, **settings).startswith(message.replace("{}", str(study)))


def test_what_is_no_table_is_one_message(tmp_path):
    assert error_of(tmp_path / "nope.csv").startswith(
        "data.path: expected a table, a CSV or Parquet file, found no file"
    )
    for content, message in {
        b"": "data.path: expected a header with names of columns",
        b"image,label\n": "data.path: '{}' has no row below its header",
        b"image,image\na,b\n": "data.path: expected a header with names of columns in '{}', found two columns 'image'",
        b"image,label\n\xff\n": "data.path: '{}' is no text in UTF-8",
        b'image,label\n"a,b\n': "data.path: '{}' is no CSV",
        b"image,label\na,b,c\na,b\na,c\n": "data.path: row 2, column 'label' of '{}': 3 cells, the header has 2",
    }.items():
        path = tmp_path / "a.csv"
        path.write_bytes(content)
        assert error_of(path).startswith(message.replace("{}", str(path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": ["a", "a"]}, "data.label: expected a column or a list of columns, each once"),
        ({"target": "mask"}, "data.target: expected null or one of classes, labels, numbers, got 'mask'"),
        ({"label": ["a", "b"], "target": "classes"}, "data.label: expected one column for data.target=classes"),
        ({"mask": "m"}, "data.num_classes: expected 2 to 255 with data.mask"),
        ({"num_classes": 3}, "data.num_classes: expected null without data.mask, got 3"),
        ({"mask": "m", "num_classes": 3, "label": "a"}, "data.label: expected null with data.mask, got 'a'"),
        ({"fold": 5}, "data.fold: expected 0 to 4 with data.folds=5, got 5"),
        ({"fold": 0, "split": "a"}, "data.split: expected null with data.fold"),
        ({"folds": 1}, "data.folds: expected 2 or more folds, or the column"),
    ],
)
def test_settings_that_contradict_each_other_are_one_message(settings, message):
    with pytest.raises(ConfigError) as caught:
        config("x.csv", **settings)
    assert str(caught.value).startswith(message)


def test_a_file_that_cannot_be_read_is_named_with_its_row(study, tmp_path):
    path = write_table(tmp_path, rows_of())
    (tmp_path / "files/4.png").write_text("no image")
    data = load(path)
    [split] = [split for split in (data.train, data.val, data.test) if 6 in split.images.source.rows]
    with pytest.raises(ConfigError, match=r"^data\.path: cannot read the image '.*4\.png \(row 6, column image\)'"):
        split.images[torch.arange(len(split))]


def test_check_lists_the_mistake_of_every_row_and_looks_at_the_others(tmp_path):
    rows = rows_of()
    rows[0][1], rows[5][0] = "", "files/nope.png"
    path = write_table(tmp_path, rows, files=[one[0] for one in rows_of()])
    inventory = take_inventory(config(path, group="patient"))
    assert [(one.rule, one.item) for one in inventory.findings] == [
        ("row", "row 2, column 'label'"), ("row", "row 7, column 'image'")
    ]  # fmt: skip
    assert (len(inventory), [part.split for part in inventory.parts]) == (28, ["train", "val", "test"])
    labels = take_inventory(config(path.parent / "study.csv", label=["left", "right"])).parts[0]
    row = rows_of()[labels.images.source.rows[1] - 2]
    assert list(labels.look(1).labels) == [number for number in (0, 1) if row[6 + number] == "1"]


# Losses, and other tables


def test_a_loss_for_other_targets_is_refused_with_the_one_to_choose(study):
    loss = {"cross_entropy": CrossEntropyConfig("cross_entropy", 0.0, None), "bce": BCE,
            "mse": MeanSquaredErrorConfig("mse")}  # fmt: skip
    ages, labels = load(study, label="age", target="numbers"), load(study, label=["left", "right"])
    for data, given, wanted in (
        (ages, "cross_entropy", "mse"),
        (labels, "mse", "bce"),
        (load(study), "bce", "cross_en"),
    ):
        with pytest.raises(ConfigError, match=rf"^loss: {given} is for .*; choose loss={wanted}"):
            build_loss(loss[given], data)
    build_loss(loss["mse"], ages)


def test_labels_that_are_not_known_have_to_be_left_out_by_the_loss(tmp_path, caplog):
    path = changed(tmp_path, 9, "right", "-1")
    settings = config(path, label=["left", "right"])
    data = registry.load_data(settings)
    with pytest.raises(ConfigError, match=r"^loss\.ignore_index: column 'right' has labels of -1"):
        with_known_labels(data, build_loss(BCE, data), settings)
    known = build_loss(replace(BCE, ignore_index=-1), data)
    assert with_known_labels(data, known, settings) is data


def test_a_label_that_no_training_image_has_is_a_warning(tmp_path, caplog):
    rows = [[*row[:-1], "0"] for row in rows_of()]
    check_training_classes(load(write_table(tmp_path, rows), label=["left", "right"]))
    assert "none of the 24 training images has right: the model cannot learn when it is there" in caplog.text


def test_another_table_is_evaluated_whole(study, tmp_path):
    rows = [row for row in rows_of() if row[1] != "dog"][:5]
    other = write_table(tmp_path, [row[:2] for row in rows], HEADER[:2])
    data = load_whole(config(study, group="patient"), str(other), NAMES)
    assert data.val.labels.tolist() == [NAMES.index(row[1]) for row in rows]
    with pytest.raises(ConfigError, match=r"^eval\.path: .* has the classes owl, which the training had not"):
        load_whole(config(study), str(other), NAMES[:2])
    with pytest.raises(ConfigError, match=r"^eval\.path: expected a table"):
        load_whole(config(study), str(tmp_path / "nope.csv"), NAMES)
