"""The schemas of models, of their normalization, and of what is loaded into them or frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from syncbn.training.config.errors import require as require
from syncbn.training.config.errors import require_choice as require_choice

CHANNELS_PER_GROUP = 4  # of GroupNorm


@dataclass
class ResnetSmallConfig:
    """A small residual network."""

    name: str
    width: int
    """Channels of the first stage."""
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
    """Channels at full resolution."""
    depth: int
    """How often height and width are halved."""

    def __post_init__(self) -> None:
        for key in ("width", "depth"):
            require(getattr(self, key) >= 1, f"model.{key}", "1 or more", getattr(self, key))


@dataclass
class BnConfig:
    """Batch normalization."""

    sync: bool
    """Convert to SyncBatchNorm; False leaves statistics local to each rank."""
    group: str | int
    """The ranks to sum over: "world", "node", or a number of neighbouring ranks."""
    own_group: bool
    """Where `group` is the world: a process group for BN alone, so that its sums do not queue behind DDP's buckets."""
    buffers: str
    """Running statistics that differ between ranks: "pool" them before evaluation and checkpoint, or keep "per_group".
    """
    virtual_ranks: int | None
    """Local statistics as of so many ranks in all, a multiple of those that there are; see `virtual`."""
    momentum: float | str | None
    """None: as built; a number; "cumulative" for torch's momentum=None."""
    eps: float | None
    fuse: bool
    """Let SyncBatchNorm do the activation, and the addition, that follow it (`syncbn.fuse`)."""
    memory: str
    """"lean": with `fuse`, layers with a leaky ReLU keep their output for backward instead of their input."""
    debug: bool
    """Compare the ranks' places before each collective."""

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
        if self.virtual_ranks is not None:
            require(self.virtual_ranks >= 1, "bn.virtual_ranks", "null or 1 or more ranks", self.virtual_ranks)
            require(not self.sync, "bn.virtual_ranks", "null unless bn.sync=false", self.virtual_ranks)
            require(self.buffers == "pool", "bn.buffers", "pool with bn.virtual_ranks", self.buffers)
        is_rate = (
            isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool) and 0 < self.momentum <= 1
        )
        valid = self.momentum in (None, "cumulative") or is_rate
        require(valid, "bn.momentum", "null, cumulative, or a number above 0 and at most 1", self.momentum)
        require(self.eps is None or self.eps > 0, "bn.eps", "null or a number above 0", self.eps)


@dataclass
class FreezeRuleConfig:
    """What a rule of the freeze plan selects (see `syncbn.FreezePlan`); times are durations."""

    match: str | list[str]
    exclude: str | list[str] | None = None
    stats: bool = True
    affine: bool = True
    weights: bool = False
    start: str | int | float | None = None
    until: str | int | float | None = None


@dataclass
class InitConfig:
    """A pretrained sub-network."""

    path: str
    """A checkpoint of ours, a run directory, or a state dict saved by torch or safetensors."""
    prefix: str | None = None
    """What its keys have in front; None: the name of the sub-network, where they have it."""
    strict: bool = True
    """Everything has to fit; False loads what does."""


ModelConfig = ResnetSmallConfig | UnetSmallConfig | dict[str, Any]  # the last: a `_target_` and its arguments
