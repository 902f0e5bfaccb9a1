"""Loads `data=table`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from syncbn.training.config.data import TableConfig
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.data.folders import class_for, decoded_data
from syncbn.training.data.images import ImageData
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.tables.samples import digest_of, divide, read_samples

log = logging.getLogger(__name__)


def load_table(config: TableConfig) -> ImageData:
    """Loads the images that the table `data.path` lists, divided into train, val and, if there is any, test.

    Raises:
        ConfigError: a mistake in the table; the message names row and column. See also `read_samples` and `divide`.
    """
    samples = read_samples(config)
    samples.require_none()
    splits = divide(samples)
    if config.group is not None:
        numbers = [f"{len({samples.groups[one] for one in positions})} {name}" for name, positions in splits.items()]
        log.info("%s: groups in column %r: %s", config.path, config.group, ", ".join(numbers))
    parts = {name: samples.split(positions) for name, positions in splits.items()}
    data = decoded_data(parts, config, samples.num_classes, samples.class_names)
    return replace(data, targets=config.kind, division=digest_of(samples, splits))


def load_whole_table(config: TableConfig, path: str, names: Sequence[str]) -> ImageData:
    """All rows of another table, whose columns have the same names, as the validation split.

    Args:
        config: that of the training.
        names: the classes of the training, of which the table may lack some.

    Raises:
        ConfigError: a mistake in the table; a class that the training had not.
    """
    samples = read_samples(config, path, divided=False)
    samples.require_none()
    split = samples.split(range(len(samples.table)))
    if samples.targets is not None and config.kind == "classes":
        if unknown := sorted(set(samples.class_names) - set(names)):
            raise ConfigError(f"eval.path: {path!r} has the classes {listed(unknown)}, which the training had not; it"
                              f" had {listed(names)}")  # fmt: skip
        numbers = samples.targets.values.new_tensor([names.index(name) for name in samples.class_names])
        split = replace(split, labels=numbers[samples.targets.values])
    num_classes = samples.num_classes if config.kind != "classes" or config.mask is not None else len(names)
    data = class_for(config)(
        split, split, None, num_classes, 0, False, tuple(names), preparation=Preparation.of(config)
    )
    return replace(data, targets=config.kind)
