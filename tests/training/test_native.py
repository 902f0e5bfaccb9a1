"""`data.size=native`: images in the size of their files, from the folder to the mask of a prediction."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from syncbn.training.config.errors import ConfigError
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.models.unet import UnetSmall
from syncbn.training.tasks import export, parity
from syncbn.training.trainer import native_checks
from tests.training.images import save_image
from tests.training.jobs import compose_config, data_config, read_metrics, run_rank
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
            "data.shift=2", *model, "batch_size=4", "metrics=mean_iou", "duration=3", "log_every=1", "eval_every=3",
            "tracker=none", "loss=ce_dice", *more]  # fmt: skip


def measured(run):
    """What a run has recorded that does not depend on the number of ranks, or on time."""
    names = ("step", "train/loss", "val/", "test/")
    return [{key: value for key, value in one.items() if key.startswith(names)} for one in read_metrics(run)]


WITH_ALL = ("precision=fp64", "accumulate=2", "bn.fuse=true", "save.every=1", "save.keep=9",
            "data.augment.jiggle._target_=tests.training.transforms.Jiggle")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Images, and a run on them in one process."""
    cwd = tmp_path_factory.mktemp("native")
    root = scans(cwd / "scans")
    return root, run_rank(cwd, tuple(native(root, *WITH_ALL, "run=trained")))


def check_same(run, other):
    torch.testing.assert_close(load_last(run)["model"], load_last(other)["model"], rtol=0, atol=1e-9)
    for one, two in zip(measured(run), measured(other), strict=True):
        assert one == pytest.approx(two, abs=1e-9)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_step_is_the_same_at_any_world_size(job, trained, num_ranks):
    root, run = trained
    check_same(job(*native(root, *WITH_ALL, "run=other"), num_ranks=num_ranks), run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["loss.class_weights=balanced"], ["loss=cross_entropy", "channels_last=true", "ema=0.9", "bn.sync=false"]]
)
def test_so_it_is_with_other_settings(job, tmp_path, more):
    overrides = native(scans(tmp_path / "scans"), "precision=fp64", "duration=12", *more)
    worlds = (1, 2, 3) if "bn.sync=false" not in more else (1, 1)
    runs = [job(*overrides, f"run=w{number}", num_ranks=world) for number, world in enumerate(worlds)]
    for run in runs[1:]:
        check_same(run, runs[0])


def resumed(job, whole, parts, same, num_ranks):
    """The same run once more, from its first step on."""
    shutil.copytree(whole, parts)
    for path in [*(parts / "checkpoints").glob("step_*[23].pt"), parts / "summary.json"]:
        path.unlink()
    job(*same, f"run={parts.name}", num_ranks=num_ranks)
    expected, actual = load_last(whole), load_last(parts)
    for part in ("model", "optimizer", "counters"):
        torch.testing.assert_close(actual[part], expected[part], rtol=0, atol=0, msg=part)
    assert measured(parts) == measured(whole)


def test_a_run_that_was_interrupted_goes_on_to_the_bit(job, trained, tmp_path):
    root, whole = trained
    resumed(job, whole, tmp_path / "outputs/parts", native(root, *WITH_ALL), 1)


@pytest.mark.slow
def test_on_two_ranks_too(job, tmp_path):
    same = native(scans(tmp_path / "scans"), *WITH_ALL[1:])
    whole = job(*same, "run=whole", num_ranks=2)
    resumed(job, whole, tmp_path / "outputs/parts", same, 2)


def test_tasks_take_images_as_they_are(job, trained, tmp_path):
    root, run = trained
    evaluated = job("task=eval", f"load={run}", "run=eval")
    losses = [[one["val/loss"] for one in measured(path) if "val/loss" in one] for path in (run, evaluated)]
    assert losses[0] == losses[1] != []
    job("task=predict", f"load={run}", f"predict.path={root}/test/images", "predict.batch_size=2", "run=predict")
    for path in (root / "test/images").iterdir():
        with Image.open(path) as image, Image.open(tmp_path / "outputs/predict/masks" / path.name) as mask:
            assert mask.size == image.size


@pytest.mark.slow
def test_so_do_those_that_train_nothing_new(job, trained):
    root, run = trained
    given = [f"load={run}", "trust=[tests.training.transforms.Jiggle]"]
    for task in ("recalibrate", "audit"):
        job(f"task={task}", *given, f"run={task}")
    job("task=check", *native(root)[:5], "run=checked")
    shipped = job("task=export", *given, "data.size=[12,16]", "export.formats=[pt2]", "run=shipped")
    assert (shipped / "export/model.pt2").exists()


@pytest.mark.slow
def test_tasks_that_need_one_size_ask_for_it(trained, tmp_path):
    root, run = trained
    context = RankContext(0, 1, torch.device("cpu"), torch.float32)
    for task, given in ((export, [f"load={run}"]), (parity, native(root)[:5])):
        config = compose_config(f"task={task.__name__.rpartition('.')[2]}", *given)
        with pytest.raises(ConfigError, match=r"data.size: .*give data.size=\[HEIGHT,WIDTH\]"):
            task.run(config, tmp_path / "none", context)


def test_keys_that_do_not_go_with_it_are_errors():
    config = compose_config(*native("scans"), "bn.sync=false")
    native_checks.check(config)
    for key, other in (
        ("compile", replace(config, compile=True)),
        ("graph", replace(config, graph=True)),
        ("bn.virtual_ranks", replace(config, bn=replace(config.bn, virtual_ranks=2))),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}: goes without data.size=native.* set {key}="):
            native_checks.check(other)


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


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: Checkpointed(3, 3),
            r"two images cannot go .* side by side \(CheckpointError.*\(activation",
        ),
        (lambda: Checkpointed(3, 3, reentrant=True), r"the gradients of body.0.weight of two images differ by"),
        (lambda: Checkpointed(3, 3).body.append(Centred()), r"the outputs of two images differ by"),
        (
            lambda: Checkpointed(3, 3).body.append(nn.InstanceNorm2d(4, track_running_stats=True).train()),
            "the values of",
        ),
    ],
    ids=["checkpointed", "reentrant", "centred", "instances"],
)
def test_a_network_whose_samples_meet_elsewhere_is_an_error_that_says_where(network, message):
    model = network()
    with pytest.raises(ConfigError, match=rf"^data.size=native: {message}"):
        native_checks.check_network(model, torch.randn(1, 3, 9, 7))
    native_checks.check_network(UnetSmall(3, 3, 2, 1), torch.randn(1, 3, 9, 7))
    assert not any(buffer.any() for name, buffer in model.named_buffers() if name.endswith("tracked"))


def test_a_network_that_cannot_take_an_odd_size_is_named_at_start(job, tmp_path):
    own = ["model=custom", "model._target_=tests.training.test_native.NeedsMultiples"]
    data = native(scans(tmp_path / "scans", (4, 3, 3)), model=own)
    with pytest.raises(ConfigError, match=r"^model: cannot take images of shape \(1, 3, .*\(failed in "):
        job(*data, "run=refused")


class Centred(nn.Module):
    """Takes the mean of a batch away."""

    def forward(self, input):
        return input - input.mean((0, 2, 3), keepdim=True)


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
