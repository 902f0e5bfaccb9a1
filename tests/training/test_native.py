"""`data.size=native`: images in the size of their files, from the folder to the mask of a prediction."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks import export, parity
from tests.training.images import save_image
from tests.training.jobs import compose_config, data_config, read_metrics
from tests.training.trainer.test_train import load_last

SIZES = [(9, 12), (16, 10), (13, 13), (12, 9), (7, 15)]  # width and height


def scans(root, numbers=(9, 3, 3)):
    """Images of five sizes and their masks; of some masks most pixels do not count."""
    for start, split, num in zip((0, 100, 200), ("train", "val", "test"), numbers, strict=True):
        for number in range(start, start + num):
            width, height = SIZES[number % len(SIZES)]
            save_image(root / split / "images" / f"{number}.png", number, (width, height))
            mask = np.random.default_rng(number).choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
            mask[: number % 4] = 255
            path = root / split / "masks" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root


UNET = ("model=unet_small", "model.width=2", "model.depth=2")


def native(root, *more, model=UNET):
    return ["data=mask_folder", f"data.path={root}", "data.num_classes=3", "data.size=native", "data.workers=0",
            "data.shift=2", *model, "batch_size=4", "metrics=mean_iou", "duration=4", "log_every=1", "eval_every=4",
            "tracker=none", "loss=ce_dice", *more]  # fmt: skip


def measured(run):
    """What a run has recorded that does not depend on the number of ranks, or on time."""
    names = ("step", "train/loss", "val/", "test/")
    return [{key: value for key, value in one.items() if key.startswith(names)} for one in read_metrics(run)]


WITH_ALL = ("accumulate=2", "bn.fuse=true", "data.augment.jiggle._target_=tests.training.transforms.Jiggle")


@pytest.mark.parametrize(
    ("worlds", "more"),
    [
        ((1, 2), WITH_ALL),
        pytest.param((1, 2, 3), ("loss.class_weights=balanced", "duration=12"), marks=pytest.mark.slow),
        pytest.param((1, 3), ("loss=cross_entropy", "channels_last=true", "ema=0.9"), marks=pytest.mark.slow),
    ],
)
def test_every_step_is_the_same_at_any_world_size(job, tmp_path, worlds, more):
    overrides = native(scans(tmp_path / "scans"), "precision=fp64", *more)
    runs = [job(*overrides, f"run=w{world}", num_ranks=world) for world in worlds]
    first, *others = [load_last(run)["model"] for run in runs]
    for model, run in zip(others, runs[1:], strict=True):
        torch.testing.assert_close(model, first, rtol=0, atol=1e-9)
        for one, other in zip(measured(run), measured(runs[0]), strict=True):
            assert one == pytest.approx(other, abs=1e-9)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_goes_on_to_the_bit(job, tmp_path, num_ranks):
    same = [*native(scans(tmp_path / "scans"), *WITH_ALL), "save.every=1", "save.keep=9"]
    whole, parts = job(*same, "run=whole", num_ranks=num_ranks), tmp_path / "outputs/parts"
    shutil.copytree(whole, parts)
    for path in [*(parts / "checkpoints").glob("step_*[34].pt"), parts / "summary.json"]:
        path.unlink()
    job(*same, "run=parts", num_ranks=num_ranks)
    expected, actual = load_last(whole), load_last(parts)
    for part in ("model", "optimizer", "counters"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0, msg=part)
    assert measured(parts) == measured(whole)


def test_tasks_take_images_as_they_are(job, tmp_path):
    root = scans(tmp_path / "scans", (4, 3, 3))
    run = job(*native(root), "duration=1", "run=trained")
    evaluated = job("task=eval", f"load={run}", "run=eval")
    losses = [[one["val/loss"] for one in measured(path) if "val/loss" in one] for path in (run, evaluated)]
    assert losses[0] == losses[1] != []
    job("task=predict", f"load={run}", f"predict.path={root}/test/images", "predict.batch_size=2", "run=predict")
    for path in (root / "test/images").iterdir():
        with Image.open(path) as image, Image.open(tmp_path / "outputs/predict/masks" / path.name) as mask:
            assert mask.size == image.size
    job("task=recalibrate", f"load={run}", "run=recalibrated")
    job("task=audit", f"load={run}", "run=audited")
    job("task=check", *native(root)[:5], "run=checked")
    context = RankContext(0, 1, torch.device("cpu"), torch.float32)
    for task, given in ((export, [f"load={run}"]), (parity, native(root)[:5])):
        config = compose_config(f"task={task.__name__.rpartition('.')[2]}", *given)
        with pytest.raises(ConfigError, match=r"data.size: .*give data.size=\[HEIGHT,WIDTH\]"):
            task.run(config, tmp_path / "none", context)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "pad"}, r"^data.fit: expected crop with data.size=native"),
        ({"decode": "reduced"}, r"^data.decode: expected full with data.size=native"),
        ({"cache": "1GB"}, r"^data.cache: expected auto or 0 with data.size=native"),
    ],
    ids=str,
)
def test_keys_without_effect_are_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        data_config("mask_folder", size="native", **settings)


@pytest.mark.parametrize("name", ["image_folder", "table"])
def test_images_with_one_label_need_one_size(name):
    with pytest.raises(ConfigError, match=r"^data.size: .* native is for masks, got 'native'"):
        data_config(name, size="native")
    assert data_config("table", size="native", mask="mask", num_classes=2).height_and_width is None


OWN = "tests.training.test_native"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model=unet_small", "compile=true"], r"^compile: goes without data.size=native"),
        (["model=unet_small", "bn.virtual_ranks=2", "bn.sync=false"], r"^bn.virtual_ranks: goes without data.size="),
        (["model=custom", f"model._target_={OWN}.Checkpointed"],
         r"^data.size=native: .* side by side .*CheckpointError.*\(activation checkpointing"),
        (["model=custom", f"model._target_={OWN}.Checkpointed", "+model.reentrant=true"],
         r"^data.size=native: the gradients of .* of two images differ by .*\(activation checkpointing"),
        (["model=custom", f"model._target_={OWN}.NeedsMultiples"],
         r"^model: cannot take images of shape \(1, 3, .*\(failed in "),
    ],
    ids=["compile", "virtual ranks", "checkpointing", "reentrant", "multiples"],
)  # fmt: skip
def test_what_does_not_go_with_it_is_said_at_start(job, tmp_path, more, message):
    data = native(scans(tmp_path / "scans", (4, 3, 3)), model=more)
    with pytest.raises(ConfigError, match=message):
        job(*data, "run=refused")


class Checkpointed(nn.Module):
    """Recomputes a part, with its batch normalization, in the backward pass."""

    def __init__(self, in_channels, num_classes, reentrant=False):
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, images):
        inner = images.requires_grad_() if self.reentrant else images
        return self.head(torch.utils.checkpoint.checkpoint(self.body, inner, use_reentrant=self.reentrant))


class NeedsMultiples(nn.Module):
    """Halves images, and doubles them again."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.first, self.norm = nn.Conv2d(in_channels, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Conv2d(3 + in_channels, num_classes, 1)

    def forward(self, images):
        return self.head(torch.cat([images, self.up(self.norm(self.first(images)))], 1))
