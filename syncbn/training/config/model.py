"""Schemas of models, batch normalization, freezing, and loading of pretrained sub-networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from os.path import expanduser
from typing import Any

from syncbn.training.config.errors import require as require
from syncbn.training.config.errors import require_choice as require_choice

CHANNELS_PER_GROUP = 4  # in each group of nn.GroupNorm
_FROM_DATA = {
    **dict.fromkeys(("num_classes", "n_classes", "classes", "out_channels"),
                    "a class for each directory, or data.num_classes where the data has that key"),
    **dict.fromkeys(("in_channels", "in_chans", "num_channels"), "data.channels, where the data has that key"),
}  # fmt: skip


def from_data(key: str) -> str | None:
    """What to say of an argument that a network has elsewhere, and that ours take from the data; None for others."""
    where = _FROM_DATA.get(key.removeprefix("model."))
    return None if where is None else f"no such key; the number comes from the data ({where})"


@dataclass
class ResnetSmallConfig:
    """A small residual network."""

    name: str
    width: int
    """Channels of the first stage; each further stage doubles them."""
    depth: int
    """Residual blocks per stage."""
    stages: int
    norm: str
    """The normalization: "batch", or "group" for GroupNorm, in groups of 4 channels."""

    def __post_init__(self) -> None:
        for key in ("width", "depth", "stages"):
            require(getattr(self, key) >= 1, f"model.{key}", "1 or more", getattr(self, key))
        require_choice("model.norm", self.norm, ("batch", "group"))
        in_groups = self.norm == "batch" or self.width % CHANNELS_PER_GROUP == 0
        require(in_groups, "model.width", f"a multiple of {CHANNELS_PER_GROUP} where model.norm=group", self.width)


@dataclass
class UnetSmallConfig:
    """A small U-Net."""

    name: str
    width: int
    """Channels at full resolution; each halving doubles them."""
    depth: int
    """Number of times that height and width are halved."""

    def __post_init__(self) -> None:
        for key in ("width", "depth"):
            require(getattr(self, key) >= 1, f"model.{key}", "1 or more", getattr(self, key))


@dataclass
class BnConfig:
    """Batch normalization."""

    sync: bool
    """Convert batch normalization to SyncBatchNorm; False: statistics are local to each rank."""
    group: str | int
    """Ranks whose statistics are summed: "world", "node", or a number of neighboring ranks per group."""
    own_group: bool
    """With group "world": a process group of BN's own, so that its all-reduces do not queue behind DDP's buckets."""
    buffers: str
    """Treatment of running statistics that differ between ranks: "pool" combines them before evaluation and checkpoint,
    "per_group" leaves them different.
    """
    virtual_ranks: int | None
    """Number of ranks whose local statistics are imitated, a multiple of the world size; see `models.virtual_ranks`."""
    momentum: float | str | None
    """Momentum of the running statistics; "cumulative": torch's momentum=None; None: as the model was built."""
    eps: float | None
    fuse: bool
    """Fuse the addition and activation that follow a SyncBatchNorm into it (`syncbn.fuse`)."""
    memory: str
    """What fused layers save for backward: "lean" saves the output instead of the input, where a leaky ReLU follows."""
    debug: bool
    """Compare layer, direction and call between ranks before each collective, and raise if they differ; slow."""
    skip_nonfinite: bool = False
    """Batches whose mean or variance is not finite move no running statistics (see `SyncBatchNorm`)."""
    averaged: str = "running"
    """Statistics of the best averaged weights at a run's end: "population", of the training set, or "running", averaged
    like the weights (as in version 0.1.0).
    """

    def __post_init__(self) -> None:
        is_number = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= 1
        require(
            self.group in ("world", "node") or is_number, "bn.group", "world, node, or a number of ranks", self.group
        )
        require(self.sync or self.group == "world", "bn.group", "world where bn.sync=false", self.group)
        expected = "false unless bn.sync=true and bn.group=world (other groups are BN's own anyway)"
        require(not self.own_group or (self.sync and self.group == "world"), "bn.own_group", expected, self.own_group)
        require(self.sync or not self.fuse, "bn.fuse", "false where bn.sync=false", self.fuse)
        require_choice("bn.memory", self.memory, ("default", "lean"))
        require(self.fuse or self.memory == "default", "bn.memory", "default unless bn.fuse=true", self.memory)
        require_choice("bn.buffers", self.buffers, ("pool", "per_group"))
        require_choice("bn.averaged", self.averaged, ("population", "running"))
        if self.virtual_ranks is not None:
            require(self.virtual_ranks >= 1, "bn.virtual_ranks", "null or 1 or more ranks", self.virtual_ranks)
            require(not self.sync, "bn.virtual_ranks", "null unless bn.sync=false", self.virtual_ranks)
            require(self.buffers == "pool", "bn.buffers", "pool with bn.virtual_ranks", self.buffers)
        expected = "false unless bn.sync=true or bn.virtual_ranks is given"
        can_skip = self.sync or self.virtual_ranks is not None
        require(can_skip or not self.skip_nonfinite, "bn.skip_nonfinite", expected, self.skip_nonfinite)
        is_rate = (
            isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool) and 0 < self.momentum <= 1
        )
        valid = self.momentum in (None, "cumulative") or is_rate
        require(valid, "bn.momentum", "null, cumulative, or a number above 0 and at most 1", self.momentum)
        require(self.eps is None or self.eps > 0, "bn.eps", "null or a number above 0", self.eps)


@dataclass
class FreezeRuleConfig:
    """A rule of the freeze plan (see `syncbn.FreezePlan`); `start` and `until` are durations."""

    match: str | list[str]
    exclude: str | list[str] | None = None
    stats: bool = True
    affine: bool = True
    weights: bool = False
    start: str | int | float | None = None
    until: str | int | float | None = None


@dataclass
class InitConfig:
    """A pretrained state to load into a sub-network of the model, or into all of it; applied in this order."""

    path: str
    """A checkpoint of this package, a run directory, or a state dict saved by torch or safetensors."""
    key: str | None = None
    """Name of the state dict in the file, dotted if nested; None: `model` or `state_dict`, or the file itself."""
    prefix: str | None = None
    """Prefix of the sub-network's keys in the file; None: its name or nothing, whichever matches more keys."""
    rename: dict[str, str] = field(default_factory=dict)
    """New prefixes by old ones, of the keys that are left below `prefix`; of several the longest counts."""
    skip: str | list[str] | None = None
    """Patterns of names of the model that are not loaded, such as a head for other classes."""
    strict: bool = True
    """Require that all remaining keys and shapes match; False: load those that match."""

    def __post_init__(self) -> None:
        self.path = expanduser(self.path)


ModelConfig = ResnetSmallConfig | UnetSmallConfig | dict[str, Any]  # dict: a user's `_target_` and its arguments
