"""Another folder than that of the training, whole, for a model that is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from syncbn.training.config import layout
from syncbn.training.config.data import DataConfig, MaskFolderConfig, TableConfig
from syncbn.training.config.errors import ConfigError, listed
from syncbn.training.config.loading import DecodedConfig
from syncbn.training.data import folders
from syncbn.training.data.dataset import Split
from syncbn.training.data.decoding import Decoded, Files
from syncbn.training.data.images import ImageData
from syncbn.training.data.masks import MaskValues
from syncbn.training.data.preparation import Preparation
from syncbn.training.data.tables.load import load_whole_table


def load_whole(config: DataConfig, path: str, names: Sequence[str]) -> ImageData:
    """All images of `eval.path` as the validation split: a directory per class, `images/` and `masks/`, or a table.

    Args:
        config: that of the data set of the training, which says how images are prepared.
        names: the classes of the training; the folder may lack some of them.

    Raises:
        ConfigError: training was not on images in files; the folder is missing or empty, has a class that the training
            had not, or images and masks that are no pairs.
    """
    if not isinstance(config, DecodedConfig):
        raise ConfigError(
            "eval.path: needs a run on image files (image_folder, mask_folder, table or hf); leave it out"
        )
    if isinstance(config, TableConfig) and not Path(path).expanduser().is_dir():
        return load_whole_table(config, path, names)
    if isinstance(config, TableConfig) and (config.mask is not None or config.kind != "classes"):
        raise ConfigError("eval.path: expected a table with the columns of the training's, got a directory")
    root, prepared, others = Path(path).expanduser(), Preparation.of(config), Counter[str]()
    if not root.is_dir():
        raise ConfigError(f"eval.path: expected a directory, found none at {path!r}")
    if isinstance(config, MaskFolderConfig):
        images, masks = layout.image_mask_pairs(root, others, "eval.path")
        labels = Decoded(Files(masks), prepared, MaskValues.of(config), of=Files(images))
        split, num_classes = Split(Decoded(Files(images), prepared), labels), config.num_classes
    else:
        found = layout.directories(root)
        if unknown := sorted(set(found) - set(names)):
            raise ConfigError(
                f"eval.path: expected in {str(root)!r} a directory for each of the classes {listed(names)}, found also"
                f" {listed(unknown)}; give the directory that holds the classes"
            )
        images, numbers = folders.labelled(root, [name for name in names if name in found], others)
        of_found = [number for number, name in enumerate(names) if name in found]
        split, num_classes = Split(Decoded(Files(images), prepared), numbers.new_tensor(of_found)[numbers]), len(names)
    if not images:
        raise ConfigError(f"eval.path: no image in {str(root)!r}")
    return folders.class_for(config)(split, split, None, num_classes, 0, False, tuple(names), preparation=prepared)
