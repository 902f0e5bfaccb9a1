"""Reading back an offline wandb run: protobuf records in LevelDB's log format, after a header of seven bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record, RunRecord

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<IHB")  # checksum, length, kind (1 whole, 2 first, 3 middle, 4 last)


def read_records(path: Path) -> Iterator[Record]:
    """Every record of a .wandb file."""
    raw = path.read_bytes()
    assert raw[:4] == b":W&B"
    position, parts = 7, b""
    while position + _HEADER.size <= len(raw):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(raw, position)
        position += _HEADER.size
        parts += raw[position : position + length]
        position += length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """What a run logged, a dictionary per call of `log`."""
    [path] = run_dir.glob("wandb/offline-run-*/*.wandb")
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in read_records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def read_run(run_dir: Path, path: Path | None = None) -> RunRecord:
    """What a run, or this file of several, says of itself: id, project, group, kind of job, configuration."""
    if path is None:
        [path] = run_dir.glob("wandb/offline-run-*/*.wandb")
    return next(record.run for record in read_records(path) if record.WhichOneof("record_type") == "run")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration that a run was started with."""
    return {item.key: json.loads(item.value_json) for item in read_run(run_dir).config.update}
