"""Finds the samples of a data set, and what is wrong with its directories, without stopping at the first mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from syncbn.training.config import layout
from syncbn.training.config.data import DataConfig, ImageFolderConfig, MaskFolderConfig, OpenData, TableConfig
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.layout import SPLITS
from syncbn.training.config.loading import DecodedConfig
from syncbn.training.data import custom, folders, registry
from syncbn.training.data.custom import CustomData
from syncbn.training.data.dataset import IGNORE, Data, Rows
from syncbn.training.data.decoding import Decoded, Files
from syncbn.training.data.inspection.parts import ItemsPart, Part, RowsPart
from syncbn.training.data.inspection.records import Finding
from syncbn.training.data.masks import MaskValues
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.tables.samples import divide, read_samples


@dataclass
class Inventory:
    """The samples of a data set by split, the same on every rank."""

    parts: Sequence[Part]
    class_names: Sequence[str]
    """Names of the labels 0, 1, ...; numbers where they have no names, and empty if the targets are not classes."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with its directories."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and not wrong."""
    expected: Sequence[str] | None = None
    """The classes that should occur in training; None for all."""
    if_binary: str = ""
    """What to say if masks hold no value but 0 and one that does not count."""

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def add(self, rule: str, split: str, item: str, text: str) -> None:
        """Adds a finding."""
        self.findings.append(Finding(rule, split, item, text))


def take_inventory(config: DataConfig) -> Inventory:
    """Finds the samples of the data set of the configuration; folders of images are searched here, others loaded.

    Raises:
        ConfigError: `data.path` is no directory; for other data sets whatever loading them raises.
    """
    match config:
        case ImageFolderConfig():
            return _of_classes(config)
        case MaskFolderConfig():
            return _of_masks(config)
        case TableConfig():
            return _of_table(config)
        case OpenData():
            return _of_data(custom.build_custom(config))
        case DecodedConfig():
            return _of_data(registry.load_data(replace(config, cache="0", augment={})))
        case _:
            return _of_data(registry.load_data(replace(config, augment={})))


def _of_data(data: Data) -> Inventory:
    names = list(data.class_names) or [str(number) for number in range(data.num_classes or 0)]
    parts: list[Part] = []
    for split in SPLITS:
        rows = getattr(data, split)
        if isinstance(data, CustomData) and rows is not None:
            parts.append(ItemsPart.of(split, data))
        elif rows is not None:
            parts.append(RowsPart(split, rows.images, rows.labels, data.num_classes))
    return Inventory(parts, names)


def _of_classes(config: ImageFolderConfig) -> Inventory:
    """`data=image_folder`: what `folders.load_classes` would find, and what it would refuse."""
    root, others = layout.root_of(config), Counter[str]()
    inventory = Inventory([], [])
    splits = _splits(root, inventory, optional=("val", "test"))
    by_split = {split: layout.directories(root / split) for split in splits} or {"": layout.directories(root)}
    first, expected = next(iter(by_split.items()))
    names = sorted({name for found in by_split.values() for name in found})
    inventory.class_names, inventory.expected = names, expected
    if len(expected) < 2:
        found = listed(expected) or "none"
        inventory.add("layout", first, "", f"expected a directory for each of two classes or more, found {found}")
    for split, here in by_split.items():
        place = root / split
        if missing := sorted(set(expected) - set(here)):
            inventory.add("layout", split, "", f"no directory for {listed(missing)} in {place}, as train has")
        if unknown := sorted(set(here) - set(expected)):
            inventory.add("layout", split, "", f"a directory for {listed(unknown)} in {place}, which train has not")
        _find_strays(place, {place / name for name in here}, split, inventory)
    parts = {split: folders.labelled(root / split, names, others) for split in by_split}
    if "val" not in parts:
        paths, labels = parts.pop(first)
        try:
            own = labels if names == expected else folders.labelled(root / first, expected, Counter())[1]
            cut = folders.split_labels(own, expected, with_test=not splits)
            held = {name: ([paths[i] for i in part.tolist()], labels[part]) for name, part in zip(SPLITS, cut)}  # noqa: B905
            parts = held | parts
        except ConfigError as error:
            inventory.add("layout", "", "", str(error).removeprefix("data.path: "))
            parts = {"train": (paths, labels), **parts}
    for split, (paths, labels) in parts.items():
        images = Decoded(Files(paths), Preparation.of(config))
        _add_part(inventory, split, images, labels, len(names))
    _note_others(inventory, others)
    return inventory


def _of_masks(config: MaskFolderConfig) -> Inventory:
    """`data=mask_folder`: what `folders.load_masks` would find, and what it would refuse."""
    root, others = layout.root_of(config), Counter[str]()
    inventory = Inventory([], [str(number) for number in range(config.num_classes)])
    splits, prepared, values = _splits(root, inventory, ("test",)), Preparation.of(config), MaskValues.of(config)
    if config.num_classes == 2 and not values.given and values.table[255] == IGNORE:
        inventory.if_binary = (
            "the masks hold 0 and 255 alone, and 255 does not count; data.values={0:0,255:1} makes it class 1"
        )
    if not splits:
        inventory.add("layout", "", "", f"expected the directories {', '.join(SPLITS)} in {root}, each with images/ and"
                      f" masks/, found {listed(layout.directories(root)) or 'none'}")  # fmt: skip
    for split in splits:
        images, masks = (_by_stem(root / split / kind, split, inventory, others) for kind in ("images", "masks"))
        _find_strays(root / split, {root / split / kind for kind in ("images", "masks")}, split, inventory)
        for stem in sorted(images.keys() - masks.keys()):
            inventory.add("no mask", split, str(images[stem]), f"no mask of that name in {root / split / 'masks'}")
        for stem in sorted(masks.keys() - images.keys()):
            inventory.add("no image", split, str(masks[stem]), f"no image of that name in {root / split / 'images'}")
        pairs = sorted(images.keys() & masks.keys())
        sources = [Files([str(paths[stem]) for stem in pairs]) for paths in (images, masks)]
        labels = Decoded(sources[1], prepared, values, of=sources[0])
        _add_part(inventory, split, Decoded(sources[0], prepared), labels, config.num_classes)
        if alone := [str(images[stem]) for stem in sorted(images.keys() - masks.keys())]:
            _add_part(inventory, split, Decoded(Files(alone), prepared), None, config.num_classes)
        if alone := [str(masks[stem]) for stem in sorted(masks.keys() - images.keys())]:
            _add_part(inventory, split, None, Decoded(Files(alone), prepared, values), config.num_classes)
    _note_others(inventory, others)
    return inventory


def _of_table(config: TableConfig) -> Inventory:
    """`data=table`: the rows that a run would take, by split, and those that it would refuse."""
    samples, numbers = read_samples(config), config.kind == "numbers"
    classes = [str(number) for number in range(samples.num_classes)] if samples.targets is None else samples.class_names
    inventory = Inventory([], [] if numbers else list(classes))
    for mistake in samples.all_mistakes():
        inventory.add("row", "", mistake.place, mistake.text)
    try:
        splits = divide(samples)
    except ConfigError as error:
        inventory.add("layout", "", "", str(error))
        splits = {"train": samples.intact}
    for split, positions in splits.items():
        rows = samples.split(positions)
        labels = None if numbers else rows.labels
        _add_part(inventory, split, rows.images, labels, None if numbers else samples.num_classes)
    return inventory


def _splits(root: Path, inventory: Inventory, optional: Sequence[str]) -> list[str]:
    """The split directories that are there; those that are missing become a finding."""
    try:
        return layout.split_directories(root, optional)
    except ConfigError as error:
        inventory.add("layout", "", "", str(error).removeprefix("data.path: "))
        return [split for split in SPLITS if split in layout.directories(root)]


def _add_part(
    inventory: Inventory, split: str, images: Rows | None, labels: Rows | None, num_classes: int | None
) -> None:
    part = RowsPart(split, images, labels, num_classes)
    if len(part) == 0:
        inventory.add("layout", split, "", "no image")
    inventory.parts = [*inventory.parts, part]


def _by_stem(directory: Path, split: str, inventory: Inventory, others: Counter[str]) -> dict[str, Path]:
    """Image files by their path below the directory, without the extension; the first of those of one name."""
    if not directory.is_dir():
        inventory.add("layout", split, "", f"expected the directory {directory}, found none")
        return {}
    paths: dict[str, Path] = {}
    for path in layout.image_files(directory, others):
        stem = str(path.relative_to(directory).with_suffix(""))
        if stem in paths:
            inventory.add("same name", split, str(path), f"has the name of {paths[stem].name}; keep one of them")
        paths.setdefault(stem, path)
    return paths


def _find_strays(directory: Path, read: set[Path], split: str, inventory: Inventory) -> None:
    """Images beside the directories that are read, which no run would ever see."""
    for path in sorted(directory.iterdir()):
        if path not in read and path.is_file() and layout.is_image(path.name):
            inventory.add("stray image", split, str(path), "lies outside of the directories that are read")


def _note_others(inventory: Inventory, others: Counter[str]) -> None:
    if others:
        kinds = listed([f"{count} {kind}" for kind, count in sorted(others.items())])
        inventory.notes.append(f"{sum(others.values())} files that are no images are left out ({kinds})")
