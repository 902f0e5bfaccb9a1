"""Transforms of the user's own: the same bits at any world size and number of workers; mistakes are one line each."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.training.config.errors import ConfigError
from syncbn.training.config.trust import Command, check_stored
from syncbn.training.data import registry
from syncbn.training.data.dataset import IGNORE
from syncbn.training.data.loader import Loader
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import RankContext
from syncbn.training.tasks.loaded import _that_is_run
from tests.training.checkpoint.test_resume import SMALL
from tests.training.images import save_classes, save_masks
from tests.training.jobs import ROOT, compose_config, data_config
from tests.training.transforms import Paint

DOCS = ROOT / "docs/data.md"
OWN = "tests.training.transforms"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    save_classes(root / "classes", {"a": 12, "b": 11})
    save_masks(root / "masks", num=6)
    return root


def load(files, name, **settings):
    kinds = {
        "classes": ("image_folder", {"path": str(files / "classes"), "size": 12, "workers": 0}),
        "masks": ("mask_folder", {"path": str(files / "masks"), "size": 12, "workers": 0}),
        "memory": ("shapes", {"num_samples": 20}),
        "numbers": ("synthetic", {"num_samples": 20, "size": 8}),
    }
    kind, small = kinds[name]
    return registry.load_data(data_config(kind, **small, **settings))


def own(name, **arguments):
    return {"_target_": f"{OWN}.{name}", **arguments}


def batch(data, epoch=0, repeats=None):
    return data.train_batch(torch.arange(5), 3, epoch, torch.float32, repeats)


@pytest.mark.parametrize("name", ["classes", "masks", "memory", "numbers"])
def test_batches_have_the_same_bits_at_any_world_size_and_number_of_workers(files, name):
    data = load(files, name, augment={"jiggle": own("Jiggle")})
    whole = Sampler(len(data.train), 5, 2, 0, 0, 1)
    expected = [data.train_batch(s.index, 3, 0, torch.float32) for step in (0, 1) for s in whole.shards(step)]
    workers = {0: (0, 0, 0), 1: (1, 0)} if name == "masks" else {0: (0, 0, 0)}
    for per_rank in workers.values():
        parts = []
        for rank, num in enumerate(per_rank):
            context = RankContext(rank, len(per_rank), torch.device("cpu"), torch.float32)
            sampler = Sampler(len(data.train), 5, 2, 0, rank, len(per_rank))
            with Loader(data, context, workers=num) as loader:
                parts.append([found for step in (0, 1) for found in loader.micro_batches(sampler, 3, step)])
        for number, wanted in enumerate(expected):
            for part in (0, 1):
                assert torch.equal(torch.cat([rank[number][part] for rank in parts]), wanted[part])


def test_a_draw_differs_by_epoch_sample_and_time_and_leaves_the_generators_as_they_were(files):
    data = load(files, "classes", augment={"jiggle": own("Jiggle")})
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    first, again = batch(data)[0], batch(data)[0]
    assert (torch.rand(1), np.random.rand(), random.random()) == before
    assert torch.equal(first, again)
    second = batch(data, repeats=torch.tensor([0, 1, 0, 0, 2]))[0]
    assert [torch.equal(*pair) for pair in zip(first, second, strict=True)] == [True, False, True, True, False]
    assert not torch.equal(batch(data, epoch=1)[0], first)


def test_transforms_get_whole_images_and_what_comes_out_is_fitted_as_any_image_is(files):
    Paint.seen.clear()
    data = load(files, "classes", augment={"paint": own("Paint", value=0)})
    assert data.train.images.cache is None  # whole images are not kept
    assert data.val.images.cache is not None
    images, _ = batch(data)
    for number, seen in enumerate(Paint.seen):
        with Image.open(data.train.images.source.paths[number]) as file:
            whole = torch.from_numpy(np.array(file)).permute(2, 0, 1)
        assert torch.equal(seen, whole)  # 16 x 20, uint8
        whole[:, 0] = 0
        mean, std = data.pixel_stats
        fitted = data.preparation.fitted(Image.fromarray(whole.permute(1, 2, 0).numpy()))
        assert torch.equal(images[number], ((fitted.float() / 255 - mean.float()) / std.float())[0])


def test_the_order_is_that_of_the_configuration_and_null_removes_one(files):
    nodes = {"turn": own("Turn"), "paint": own("Paint", value=255)}
    orders = [("turn", "paint"), ("paint", "turn")]
    one, other = (batch(load(files, "memory", augment={n: nodes[n] for n in order}))[0] for order in orders)
    painted = [[bool((row == row[..., :1]).all()) for row in (found[:, :, 0], found[..., 0])] for found in (one, other)]
    assert painted == [[True, False], [False, True]]  # the first row, or what has become of it, the first column
    given = [f"data.augment.{name}._target_={OWN}.Turn" for name in "ba"]
    assert list(compose_config(*given).data.augment) == ["b", "a"]
    assert list(compose_config(*given, "data.augment.b=null").data.augment) == ["a"]


def test_they_take_the_place_of_shift_and_flip(files):
    both = {"shift": 3, "flip": True}
    same = load(files, "memory", **both, augment={"turn": own("Turn", times=0)})
    plain = load(files, "memory", shift=0, flip=False)
    for found, expected in zip(batch(same), batch(plain), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(batch(load(files, "memory", **both))[0], batch(plain)[0])


def test_a_mask_is_transformed_and_fitted_with_its_image(tmp_path):
    for split in ("train", "val"):  # the red of a picture says the class
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for number in range(5):
            classes = np.random.default_rng(number).integers(0, 3, (16, 20), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
            red = np.stack([classes * 60 + 60, classes * 0, classes * 0], axis=2).astype(np.uint8)
            for kind, pixels in (("images", red), ("masks", classes)):
                Image.fromarray(pixels).save(tmp_path / split / kind / f"{number}.png")
    augment = {"turn": own("Turn"), "jiggle": own("Jiggle", smallest=0.8)}
    config = data_config(
        "mask_folder", path=str(tmp_path), workers=0, fit="pad", size=160, mean=0, std=1, augment=augment
    )
    images, masks = batch(registry.load_data(config))
    assert 0 < (masks == IGNORE).float().mean() < 0.5  # the padding
    assert (images[:, 0][masks == IGNORE] == 0).all()
    for image, mask in zip(images[:, 0], masks, strict=True):
        reds = torch.stack([image[mask == number].median() for number in range(3)])
        assert ((reds / reds[0] - torch.tensor([1.0, 2.0, 3.0])).abs() < 0.1).all()  # up to rounding


def test_what_a_transform_draws_when_it_is_built_is_the_same_on_every_rank(files):
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        values.append(load(files, "classes", augment={"p": own("Paint")}).augmentation.transforms["p"].value)
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("OwnGenerator", "changes '.*' in another way when it is called again, .*not from a generator of its own$"),
        ("Float", r"expected an image of uint8 \(3, H, W\), got float32 \(3, 16, 20\); leave out what normalizes"),
        ("Fails", r"fails for the image of '.*' \(RuntimeError: no such luck\); expected a transform"),
        ("Nothing", "expected something to call, got Nothing"),
    ],
)
def test_a_transform_that_cannot_be_used_is_one_line_that_names_it(files, target, message):
    data = load(files, "classes", augment={"mine": own(target)})
    with pytest.raises(ConfigError, match=rf"^data.augment.mine: {message}") as raised:
        data.check_augmentation(0)
    assert "\n" not in str(raised.value)


def test_a_transform_of_images_alone_is_refused_for_masks(files):
    data = load(files, "masks", augment={"mine": own("Float")})
    with pytest.raises(ConfigError, match=r"^data.augment.mine: fails for the image and mask of .* two tensors"):
        data.check_augmentation(0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"size": 3}, r"^data.augment.a._target_: required; give a transform"),
        ({"_target_": f"{OWN}.Nope"}, r"^data.augment.a._target_=.*Nope: "),
        ({"_target_": "torchvision.transforms.v2.Nope"}, r"^data.augment.a(: needs torchvision|._target_=)"),
    ],
)
def test_a_mistake_in_the_configuration_names_the_transform(files, node, message):
    with pytest.raises(ConfigError, match=message):
        load(files, "classes", augment={"a": node}).check_augmentation(0)


def test_a_run_meets_a_generator_of_its_own_before_it_trains_and_a_file_names_no_transform_by_itself(job, files):
    small = [override for override in SMALL if not override.startswith("data")]
    photos = [*small, "data=image_folder", f"data.path={files / 'classes'}", "data.size=12", "data.workers=0"]
    with pytest.raises(ConfigError, match=r"^data.augment.mine: changes .* from a generator of its own"):
        job(*photos, f"data.augment.mine._target_={OWN}.OwnGenerator", "run=own")
    run = job(*photos, f"data.augment.p._target_={OWN}.Paint", "duration=1", "run=a")
    with pytest.raises(ConfigError, match=rf"names code .*: data.augment.p._target_={OWN}.Paint; .*trust"):
        job("duration=2", "run=a")
    Paint.seen.clear()
    recalibrated = job("task=recalibrate", f"load={run}", "run=b")  # runs none of it
    assert Paint.seen == []
    stored = torch.load(recalibrated / "recalibrated.pt", weights_only=True)["config"]["data"]
    assert stored["augment"] == {"p": own("Paint")}
    with pytest.raises(ConfigError, match=r"^load: .*names code"):
        job("task=audit", f"load={run}", "run=c")


def test_an_interpolation_among_transforms_is_refused_also_where_none_is_built():
    stored = {"data": {"name": "hf", "augment": {"a": {"_target_": "os.system", "_args_": [{"b": "${oc.env:HOME}"}]}}}}
    assert _that_is_run(stored, "train") == stored
    with pytest.raises(
        ConfigError, match=r"^load: run.pt holds what is never taken from a file: data.augment.a.args.0"
    ):
        check_stored(_that_is_run(stored, "eval"), "load", Path("run.pt"), Command({}))


@pytest.mark.parametrize(
    ("name", "transforms"), [("photographs", ["crop", "flip", "color"]), ("scans", ["turn", "light"])]
)
def test_the_recipes_of_the_documentation_can_be_chosen(tmp_path, name, transforms):
    blocks = re.findall(r"```yaml\n(# @package data.augment\n# mine/(.*?): .*?)```", DOCS.read_text(), re.DOTALL)
    for content, path in blocks:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(content)
    config = compose_config(
        "data=image_folder", "data.path=x", f"hydra.searchpath=[file://{tmp_path}]", f"+data_augment={name}"
    )
    assert list(config.data.augment) == transforms


@pytest.mark.parametrize("name", ["classes", "masks"])
def test_torchvision_s_transforms_are_called_with_its_tensors(files, name):
    pytest.importorskip("torchvision")
    module = "torchvision.transforms.v2"
    crop = {"_target_": f"{module}.RandomResizedCrop", "size": [10, 14]}
    augment = {"crop": crop, "flip": {"_target_": f"{module}.RandomHorizontalFlip"}}
    data = load(files, name, augment=augment)
    data.check_augmentation(0)
    first, again = batch(data), batch(load(files, name, augment=augment))
    for found, expected in zip(first, again, strict=True):
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)
    assert first[0].shape == (5, 3, 12, 12)
    assert set(first[1].unique().tolist()) <= {0, 1, 2, IGNORE}
    assert not torch.equal(batch(data, epoch=1)[0], first[0])
