"""From the configuration to what a run is made of: model, sampler, the types that a rank computes in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from syncbn.training.config.schema import Config
from syncbn.training.data import dataset
from syncbn.training.data.sampler import Sampler
from syncbn.training.distributed.rank_context import Place
from syncbn.training.models import build
from syncbn.training.models.virtual_ranks import groups_per_rank, make_virtual
from syncbn.training.trainer import execution

DTYPES = {"fp64": torch.float64}  # of parameters and images; anything else: float32
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(config: Config, data: dataset.Data, place: Place) -> nn.Module:
    """The model with its initial weights, the same on every rank.

    Raises:
        ConfigError: see `models.build`, `groups_per_rank` and `make_virtual`.
    """
    torch.manual_seed(config.seed)
    model = build.build(config.model, config.bn, data.num_channels, data.num_classes).to(place.device, place.dtype)
    if config.bn.virtual_ranks is not None:
        make_virtual(model, groups_per_rank(config.bn, place.world_size))
    if place.channels_last:
        execution.lay_out(model)
    return model


def sampler_for(config: Config, data: dataset.Data, place: Place) -> Sampler:
    """Which samples this rank trains on."""
    groups = groups_per_rank(config.bn, place.world_size)
    return Sampler(
        len(data.train), config.batch_size, config.accumulate, config.seed, place.rank, place.world_size, groups
    )


def place_for(config: Config, place: Place) -> Place:
    """`place` with the precision of this configuration."""
    return replace(
        place,
        dtype=DTYPES.get(config.precision, torch.float32),
        autocast=AUTOCAST.get(config.precision),
        channels_last=config.channels_last,
    )
