"""task=predict and eval.path: a trained model on other files, without the data of its training."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.config.errors import ConfigError, TrainingError
from syncbn.training.data.original_size import mask_in_original_size
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.trained_input import TrainedInput
from syncbn.training.data.whole_folder import load_whole
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.ensemble import Shape
from syncbn.training.tasks.loaded import open_run
from syncbn.training.tasks.predict import find_images
from syncbn.training.tracking.summary import read_summary
from tests.once import made_once
from tests.training.images import save_classes, save_image, save_masks
from tests.training.jobs import compose_config, read_metrics, run_rank, start

SMALL = ("model.width=2", "batch_size=8", "duration=3", "tracker=none", "data.workers=0", "data.size=8")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A working directory with `photos` in three parts and a run `a` on them."""

    def make(cwd):
        for split, num in (("train", 12), ("val", 7), ("test", 3)):
            save_classes(cwd / "photos" / split, {"cat": num, "dog": num + 1, "owl": num})
        run_rank(cwd, ("data=image_folder", "data.path=photos", "model.stages=1", *SMALL, "run=a"))
        return cwd

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def segmented(tmp_path_factory):
    """A working directory with a run `m` on masks of three classes."""

    def make(cwd):
        save_masks(cwd / "scans", num=4, values=(0, 1, 2))
        data = ("data=mask_folder", "data.path=scans", "data.num_classes=3", "model=unet_small", "model.depth=1")
        run_rank(cwd, (*data, *SMALL, "run=m"))
        return cwd

    return made_once(tmp_path_factory, "segmented", make)


@pytest.fixture
def new(tmp_path):
    """Images of several sizes and types at several depths, and a file that is none."""
    root = tmp_path / "new"
    for number, (name, size) in enumerate(
        {
            "b.png": (20, 16),
            "a.jpg": (9, 31),
            "deep/c.png": (8, 8),
            "deep/er/d.bmp": (40, 12),
            "e.webp": (16, 16),
        }.items()
    ):
        save_image(root / name, 70 + number, size=size)
    (root / "notes.txt").write_text("")
    return root


def command(load, path, *more):
    return ("task=predict", f"load={load}", f"predict.path={path}", "run=p", "predict.batch_size=2", *more)


def predict(cwd, load, path, *more):
    """The run directory of a prediction, and the text of its table."""
    run = run_rank(cwd, command(load, path, *more))
    return run, (run / "predictions.csv").read_text()


def rows(text):
    return list(csv.DictReader(text.splitlines()))


def by_hand(run, path, flip=False):
    """Probabilities of the classes for a file, from what the checkpoint says."""
    opened = open_run(compose_config("task=eval", f"load={run}"), run.parent / "nowhere")
    described = TrainedInput.of(opened.checkpoint)
    here = RankContext(0, 1, torch.device("cpu"), torch.float32)
    model = opened.model(Shape(3, 3), here).eval()
    with Image.open(path) as image, torch.no_grad():
        pixels = described.prepare(image)[None]
        scores = [model(x).double().softmax(1) for x in (pixels, *([pixels.flip(-1)] if flip else []))]
    return sum(scores)[0] / len(scores)


@pytest.mark.parametrize("flip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_file_has_a_row_with_its_best_classes_in_the_order_of_the_names(trained, tmp_path, new, flip):
    # The training data are not here: data.path was relative to another directory.
    _, text = predict(tmp_path, trained / "outputs/a", new, f"predict.flip={flip}")
    found = rows(text)
    assert [row["file"] for row in found] == ["a.jpg", "b.png", "deep/c.png", "deep/er/d.bmp", "e.webp"]
    names = ["cat", "dog", "owl"]
    for row in found[::3]:
        expected = by_hand(trained / "outputs/a", new / row["file"], flip)
        order = expected.argsort(descending=True).tolist()
        assert [row[f"class_{number}"] for number in (1, 2, 3)] == [names[number] for number in order]
        for number, label in enumerate(order, start=1):
            assert float(row[f"probability_{number}"]) == pytest.approx(float(expected[label]), abs=2e-6)
        assert (row["class"], row["probability"]) == (row["class_1"], row["probability_1"])
        assert len(row["probability"].partition(".")[2]) == 6
        assert row["error"] == ""


def test_a_file_that_cannot_be_read_is_a_row_with_an_error_and_the_others_are_predicted(trained, tmp_path, new):
    (new / "b.png").write_bytes((new / "b.png").read_bytes()[:100])
    with pytest.raises(
        TrainingError, match=r"^predict.path: 1 of 5 files cannot be read, the first is b.png \(.*\); s"
    ):
        predict(tmp_path, trained / "outputs/a", new)
    found = rows((tmp_path / "outputs/p/predictions.csv").read_text())
    assert [bool(row["error"]) for row in found] == [False, True, False, False, False]
    assert [bool(row["class"] and row["probability_3"]) for row in found] == [True, False, True, True, True]


def test_files_and_directories_may_be_listed(new):
    found = find_images([str(new / "deep"), str(new / "b.png")])
    assert [file.name for file in found] == [str(new / name) for name in ("b.png", "deep/c.png", "deep/er/d.bmp")]
    assert [file.mask.as_posix() for file in found] == ["b.png", "c.png", "er/d.png"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "segmented"])
def test_the_same_bytes_at_1_and_3_ranks_and_with_workers(ranks, request, tmp_path, new, kind):
    run = request.getfixturevalue(kind) / ("outputs/a" if kind == "trained" else "outputs/m")
    predict(tmp_path, run, new)
    expected = content(tmp_path / "outputs/p")
    assert len(expected) == (1 if kind == "trained" else 6)
    ranks(3, run_rank, tmp_path, command(run, new, "run=three"))
    assert content(tmp_path / "outputs/three") == expected
    predict(tmp_path, run, new, "run=workers", "data.workers=2")
    assert content(tmp_path / "outputs/workers") == expected


def content(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.suffix in (".csv", ".png")}


def test_a_mask_has_the_size_of_its_image_and_is_255_where_that_was_cropped_away(segmented, tmp_path, new):
    run, text = predict(tmp_path, segmented / "outputs/m", new)
    assert [row["mask"] for row in rows(text)] == [
        "masks/a.png", "masks/b.png", "masks/deep/c.png", "masks/deep/er/d.png", "masks/e.png"
    ]  # fmt: skip
    masks = {row["file"]: np.array(Image.open(run / row["mask"])) for row in rows(text)}
    assert masks["deep/er/d.bmp"].shape == (12, 40)
    assert (masks["deep/er/d.bmp"][:, :14] == 255).all()
    assert (masks["deep/er/d.bmp"][:, 26:] == 255).all()
    assert {*np.unique(masks["deep/er/d.bmp"][:, 14:26])} <= {0, 1, 2}
    expected = by_hand(segmented / "outputs/m", new / "deep/c.png").argmax(0)
    assert (masks["deep/c.png"] == expected.numpy()).all()  # it has the size that the model takes


def test_masks_of_an_earlier_prediction_are_gone_and_stay_where_the_later_one_fails(segmented, tmp_path, new):
    run, _ = predict(tmp_path, segmented / "outputs/m", new)
    before = content(run)
    with pytest.raises(ConfigError, match=r"^load: "):
        predict(tmp_path, tmp_path / "nowhere", new)
    assert content(run) == before
    (new / "a.jpg").unlink()
    (new / "b.png").write_text("no image")
    with pytest.raises(TrainingError, match=r"^predict.path: 1 of 4 files cannot be read"):
        predict(tmp_path, segmented / "outputs/m", new)
    found = {path.relative_to(run).as_posix() for path in run.glob("**/*.png")}
    assert found == {row["mask"] for row in rows((run / "predictions.csv").read_text())} - {""}
    assert "masks/b.png" not in found
    assert not [*run.glob(".masks*")]


def test_masks_that_would_be_one_file_are_an_error(new):
    save_image(new / "b.jpg", 3)
    assert len(find_images([str(new)])) == 6
    with pytest.raises(ConfigError, match=r"^predict.path: the masks of b.jpg and b.png would be one file; rename"):
        find_images([str(new)], distinct_masks=True)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(24, 24), (24, 48), (60, 30)])
def test_a_mask_goes_back_to_where_the_image_came_from(fit, size):
    # Scores that say where in the image a pixel is: the upper half is class 0, the lower half class 1.
    picture = Image.fromarray(np.repeat(np.arange(size[0], dtype=np.float32)[:, None] / size[0], size[1], axis=1) * 255)
    prepared = Preparation((24, 24), 1, fit).fitted(picture.convert("L"))[0].double() / 255
    mask = mask_in_original_size(torch.stack([1 - prepared, prepared]), fit, size)
    kept = mask != 255
    assert mask.shape == size
    assert kept.all() == (fit != "crop" or size == (24, 24))
    wanted = (torch.arange(size[0]) >= size[0] / 2).to(torch.uint8)[:, None].expand(size)
    assert (mask == wanted)[kept].double().mean() > 0.9


def test_a_mistake_names_the_key(tmp_path):
    with pytest.raises(ConfigError, match=r"^predict.path: expected a directory or a file, found none at 'nowhere'"):
        find_images(["nowhere"])
    with pytest.raises(ConfigError, match=r"^predict.path: no image in .*"):
        find_images([str(tmp_path)])


def test_without_a_path_there_is_nothing_to_predict():
    with pytest.raises(ConfigError, match=r"^predict.path: expected a directory of images, a file, or a list"):
        compose_config("task=predict", "load=outputs/a")


# Another folder to evaluate on


def test_another_folder_is_evaluated_whole(trained, tmp_path):
    run = run_rank(tmp_path, ("task=eval", f"load={trained / 'outputs/a'}", f"eval.path={trained / 'photos/val'}"))
    found, expected = read_metrics(run)[-1], read_summary(trained / "outputs/a")["metrics"]
    assert {name for name in found if "/" in name} == {"eval/loss", "eval/accuracy"}
    for name in ("loss", "accuracy"):
        assert found[f"eval/{name}"] == pytest.approx(expected[f"val/{name}"])


def test_it_may_lack_classes_and_has_no_others(tmp_path):
    save_classes(tmp_path / "one", {"owl": 3})
    config = compose_config("data=image_folder", "data.path=photos").data
    data = load_whole(config, str(tmp_path / "one"), ["cat", "dog", "owl"])
    assert data.val.labels.tolist() == [2, 2, 2]
    assert data.num_classes == 3
    save_classes(tmp_path / "one", {"yak": 1})
    with pytest.raises(ConfigError, match=r"^eval.path: expected in .* of the classes cat, dog, owl, found also yak;"):
        load_whole(config, str(tmp_path / "one"), ["cat", "dog", "owl"])


@pytest.mark.slow
def test_masks_of_another_folder(segmented, tmp_path):
    run = run_rank(tmp_path, ("task=eval", f"load={segmented / 'outputs/m'}", f"eval.path={segmented / 'scans/val'}"))
    expected = read_summary(segmented / "outputs/m")["metrics"]
    assert read_metrics(run)[-1]["eval/loss"] == pytest.approx(expected["val/loss"])
    with pytest.raises(ConfigError, match=r"^eval.path: expected the directory '.*scans/images', found none"):
        run_rank(tmp_path, ("task=eval", f"load={segmented / 'outputs/m'}", f"eval.path={segmented / 'scans'}"))


@pytest.mark.slow
def test_as_a_user_types_it(trained, tmp_path, new):
    (new / "b.png").write_text("no image")
    done = start(tmp_path, "task=predict", f"load={trained / 'outputs/a'}", f"predict.path={new}", "run=p", num_ranks=2)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("error: predict.path: 1 of 5 files cannot be read") == 1
    assert len((tmp_path / "outputs/p/predictions.csv").read_text().splitlines()) == 6
