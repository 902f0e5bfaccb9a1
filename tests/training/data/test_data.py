"""Batches are a function of (seed, epoch, step) and augmentation one of (seed, epoch, sample): never of the ranks."""

import gzip
import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from syncbn.training.config.data import FashionMnistConfig
from syncbn.training.config.errors import ConfigError
from syncbn.training.data import augment as augmenting
from syncbn.training.data import registry
from syncbn.training.data.augment import augment
from syncbn.training.data.balance import ClassMembers
from syncbn.training.data.randomness import integers, mix, mix_key
from syncbn.training.data.sampler import Sampler
from syncbn.training.data.splits import hold_out, stratified_indices
from tests.training.jobs import compose_config

# The split of the digits is part of every published number: it must not move with a version of scikit-learn or torch.
DIGITS_SPLIT = "d1457d1d5e4724d7070e475debe28fbc8873ea7d0003aeac1cc82bed2161b489"


def sampler(num_samples=103, batch_size=16, accumulate=1, seed=0, rank=0, world_size=1):
    return Sampler(num_samples, batch_size, accumulate, seed, rank, world_size)


@given(
    num_samples=st.integers(1, 200),
    batch_size=st.integers(1, 64),
    accumulate=st.integers(1, 4),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_visited_once_an_epoch_at_any_world_size(
    num_samples, batch_size, accumulate, world_size, epoch
):
    whole = sampler(num_samples, batch_size, accumulate)
    ranks = [
        sampler(num_samples, batch_size, accumulate, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    seen = []
    for step in range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch):
        for one, *parts in zip(whole.shards(step), *(rank.shards(step) for rank in ranks), strict=True):
            joined = torch.cat([part.index for part in parts])
            assert torch.equal(joined, one.index)  # the same global micro-batch, cut
            sizes = [len(part.index) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert all(part.num_global == sum(sizes) for part in parts)
            seen += joined.tolist()
    assert sorted(seen) == list(range(num_samples))
    assert whole.smallest_micro_batch() == min(
        shard.num_global for step in range(whole.steps_per_epoch) for shard in whole.shards(step)
    )


def test_samples_seen_add_up_over_ranks_and_steps():
    ranks = [sampler(num_samples=37, batch_size=8, accumulate=3, rank=rank, world_size=3) for rank in range(3)]
    for step in (0, 1, 4, 5, 12):
        seen = [sum(rank.num_seen(step)) for rank in ranks]
        assert seen == [sum(len(shard.index) for s in range(step) for shard in rank.shards(s)) for rank in ranks]


def test_epochs_and_seeds_are_shuffled_differently():
    first = sampler().shards(0)[0].index
    assert not torch.equal(first, sampler().shards(sampler().steps_per_epoch)[0].index)
    assert not torch.equal(first, sampler(seed=1).shards(0)[0].index)


@given(
    labels=st.lists(st.sampled_from([0, 3, 4, 9]), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    world_size=st.integers(1, 4),
)
def test_balanced_draws_are_equally_many_of_each_class_at_any_world_size(labels, batch_size, world_size):
    labels = torch.tensor(labels)
    whole = Sampler(len(labels), batch_size, 1, 5, 0, 1, balance=ClassMembers(labels))
    ranks = [replace(whole, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = torch.zeros(len(labels), dtype=torch.int64)
    for epoch in range(3):
        drawn, times = [], []
        for step in range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch):
            parts = [rank.shards(step)[0] for rank in ranks]
            assert torch.equal(torch.cat([part.index for part in parts]), whole.shards(step)[0].index)
            assert torch.equal(torch.cat([part.repeats for part in parts]), whole.shards(step)[0].repeats)
            drawn += whole.shards(step)[0].index.tolist()
            times += whole.shards(step)[0].repeats.tolist()
        assert len(drawn) == len(labels)
        counts = labels[drawn].bincount()[labels.unique()]
        assert counts.max() - counts.min() <= 1
        assert sorted(zip(drawn, times, strict=True)) == [
            (sample, time) for sample in range(len(labels)) for time in range(drawn.count(sample))
        ]
        seen += torch.tensor(drawn).bincount(minlength=len(labels))
        for label in labels.unique():  # over the epochs too, none comes again before all others have been there
            assert seen[labels == label].max() - seen[labels == label].min() <= 1


def test_balanced_draws_differ_by_seed_and_epoch_and_not_by_what_was_asked_before():
    labels = torch.arange(100) % 7 // 3
    orders = [ClassMembers(labels).order(seed, epoch) for seed, epoch in ((0, 5), (0, 5), (0, 6), (1, 5))]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])


def test_a_sample_that_is_drawn_again_is_augmented_anew():
    data = registry.load_data(compose_config("data=synthetic", "data.shift=3", "data.flip=true").data)
    index = torch.arange(40)
    first, again = (data.train_batch(index, 0, 0, torch.float32, r)[0] for r in (None, torch.zeros(40).long()))
    assert torch.equal(first, again)
    second = data.train_batch(index, 0, 0, torch.float32, torch.ones(40).long())[0]
    assert sum(map(torch.equal, first, second)) < 10  # by chance, of 98 outcomes


@given(cut=st.integers(0, 20), shift=st.integers(0, 2), flip=st.booleans())
def test_augmentation_of_a_sample_does_not_depend_on_its_neighbours(cut, shift, flip):
    images, index = torch.rand(20, 2, 5, 6), torch.arange(100, 120)
    whole = augment(images, index, shift, flip, seed=3, epoch=1)
    parts = [augment(images[s], index[s], shift, flip, seed=3, epoch=1) for s in (slice(0, cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("shift", "flip", "fill"), [(0, True, 0), (3, False, 255), (4, True, 7)])
def test_large_images_are_shifted_and_mirrored_as_small_ones_are(monkeypatch, dtype, shift, flip, fill):
    images, index = torch.randint(0, 255, (40, 2, 5, 9)).to(dtype), torch.arange(40)
    expected = augment(images, index, shift, flip, 3, 1, fill=fill)
    monkeypatch.setattr(augmenting, "_LARGE", 1)
    assert torch.equal(augment(images, index, shift, flip, 3, 1, fill=fill), expected)


def test_augmentation_shifts_and_mirrors_and_brings_in_zeros():
    images = torch.rand(400, 1, 4, 4) + 0.5
    out = augment(images, torch.arange(400), 1, True, seed=0, epoch=0)
    candidates = []
    padded = torch.nn.functional.pad(images, [1, 1, 1, 1])
    for dy in range(3):
        for dx in range(3):
            moved = padded[:, :, dy : dy + 4, dx : dx + 4]
            candidates += [moved, moved.flip(-1)]
    matches = torch.stack([(out == candidate).flatten(1).all(1) for candidate in candidates])
    assert matches.any(0).all()
    assert matches.any(1).all()  # each of the 18 outcomes occurs


def test_draws_are_uniform_and_differ_by_epoch():
    draws = integers(5, torch.arange(50_000), 0, 0, 2)
    counts = torch.bincount(draws, minlength=5)
    assert ((counts - 10_000).abs() < 400).all()  # 4.5 standard deviations of a binomial
    assert (draws == integers(5, torch.arange(50_000), 0, 1, 2)).float().mean() < 0.22


def test_keys_differ_in_order_and_value():
    keys = {mix_key(*parts) for parts in [(0, 1), (1, 0), (0, 0), (1, 1), (0,), (0, 0, 0), (-1, 2)]}
    assert len(keys) == 7


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_keys_are_mixed_as_tensors_are(parts):
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = mix(key ^ part)
    assert mix_key(*parts) == int(key) & (2**63 - 1)


def test_the_digits_split_is_pinned_and_stratified():
    data = registry.load_data(compose_config().data)
    assert [len(split) for split in (data.train, data.val, data.test)] == [1437, 180, 180]
    digest = hashlib.sha256()
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    for part in stratified_indices(_digit_labels()):
        digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == DIGITS_SPLIT
    shares = torch.stack([torch.bincount(s.labels, minlength=10) / len(s) for s in (data.train, data.val, data.test)])
    assert (shares - torch.bincount(labels) / len(labels)).abs().max() < 0.01


@given(labels=st.lists(st.integers(0, 3), max_size=60), spread=st.integers(1, 9))
def test_splits_are_those_of_scikit_learn(labels, spread):
    labels = torch.tensor([0, 1, 2, 3] * 10 + labels) * spread
    index = torch.arange(len(labels)).numpy()
    train, rest = train_test_split(index, test_size=0.2, stratify=labels, random_state=0)
    val, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=0)
    expected = [sorted(part) for part in (train, val, test)]
    assert [part.tolist() for part in stratified_indices(labels)] == expected
    kept, held_out = train_test_split(index, test_size=0.1, stratify=labels, random_state=0)
    assert [part.tolist() for part in hold_out(labels)] == [sorted(kept), sorted(held_out)]


def _digit_labels():
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().target)


def test_training_pixels_are_normalized():
    data = registry.load_data(compose_config("data.shift=0").data)
    images, _ = data.train_batch(torch.arange(len(data.train)), 0, 0, torch.float64)
    assert abs(images.mean()) < 1e-6
    assert abs(images.std() - 1) < 1e-6


def test_classes_are_kept_and_renumbered():
    data = registry.load_data(compose_config("data.classes=[7,2]").data)
    assert data.num_classes == 2
    whole = registry.load_data(compose_config().data)
    assert len(data.val) == int(((whole.val.labels == 7) | (whole.val.labels == 2)).sum())
    assert torch.equal(data.val.images[data.val.labels == 0], whole.val.images[whole.val.labels == 7])


def write_idx(path, array, compress):
    header = bytes([0, 0, 8, array.dim()]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    raw = header + array.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(raw) if compress else raw)


def fashion_files(directory, num_train=5003, compress=True):
    suffix = ".gz" if compress else ""
    for stem, num in (("train", num_train), ("t10k", 4)):
        write_idx(directory / f"{stem}-images-idx3-ubyte{suffix}", torch.randint(256, (num, 28, 28)), compress)
        write_idx(directory / f"{stem}-labels-idx1-ubyte{suffix}", torch.arange(num) % 10, compress)
    return FashionMnistConfig("fashion_mnist", str(directory), None, None, shift=0, flip=False)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist_is_read_from_idx_files_with_val_held_out(tmp_path, compress):
    data = registry.load_data(fashion_files(tmp_path, compress=compress))
    assert [len(split) for split in (data.train, data.val, data.test)] == [3, 5000, 4]
    assert data.val.labels[0] == 3  # the 5,000 last training images
    assert data.train.images.shape == (3, 1, 28, 28)
    assert 0 <= data.train.images.min() <= data.train.images.max() <= 1


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    config = fashion_files(tmp_path, compress=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"data.path: .*t10k-images-idx3-ubyte' is not a whole IDX file"):
        registry.load_data(config)


def test_a_missing_file_names_the_package(tmp_path):
    with pytest.raises(ConfigError, match=r"data.path: .*dataset-fashion-mnist"):
        registry.load_data(FashionMnistConfig("fashion_mnist", str(tmp_path), None, None, shift=0, flip=False))


def test_synthetic_data_is_the_same_at_every_call():
    first, second = (registry.load_data(compose_config("data=synthetic").data) for _ in range(2))
    assert torch.equal(first.train.images, second.train.images)
    assert [len(split) for split in (first.train, first.val, first.test)] == [800, 100, 100]
