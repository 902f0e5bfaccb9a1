"""Files that somebody may give a job instead of a checkpoint: damaged, foreign, malformed and malicious ones.

`FAMILIES[family][name](path, content)` writes one of them to `path`; `content` is that of a real checkpoint, which the
function may change. Everything is made anew, so nothing here has to be kept in the repository.
"""

import io
import itertools
import json
import os
import pickle
import socket
import struct
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from syncbn.training.checkpoint import files
from syncbn.training.config.output import OF_COMMAND
from syncbn.training.config.schema import Config

LAYER = "backbone.stem.bn"
MEAN, VAR, COUNTER = (f"{LAYER}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked"))
TERA = 2**40


def write(path, content):
    """Writes a checkpoint whose digest fits; where nothing can be digested, with a wrong one."""
    digest = "0" * 64
    with suppress(Exception):
        digest = files.digest(content)
    torch.save({**content, files.DIGEST: digest}, path)


# Parts of a checkpoint: each gone, or something else.

PARTS = ("step", "config", "data", "model", "average", "optimizer", "schedule", "scaler", "counters", "totals", "drift",
         "tracker", "frozen")  # fmt: skip
WRONG = {"null": None, "negative": -1, "text": "x", "list": [1], "empty": {}, "other keys": {1: 2},
         "tensor": torch.zeros(2)}  # fmt: skip


def without(part):
    def make(path, content):
        del content[part]
        write(path, content)

    return make


def with_other(part, value):
    def make(path, content):
        content[part] = value
        write(path, content)

    return make


def changed(change):
    """A checkpoint whose digest fits, after a change."""

    def make(path, content):
        change(content)
        write(path, content)

    return make


def entries(part, names):
    """Each of these entries of a part: gone, null, a text."""
    made = {}
    for name in names:
        made[f"{part}.{name} gone"] = changed(lambda c, name=name: c[part].pop(name, None))
        for kind in ("null", "text"):
            made[f"{part}.{name} {kind}"] = changed(lambda c, name=name, kind=kind: c[part].update({name: WRONG[kind]}))
    return made


def of_group(name, value):
    return changed(lambda c: c["optimizer"]["param_groups"][0].update({name: value}))


def of_momentum(value):
    def change(content):
        state = content["optimizer"]["state"]
        state[next(iter(state))]["momentum_buffer"] = value

    return changed(change)


INSIDE = {
    **entries("optimizer", ("state", "param_groups")),
    **entries("schedule", ("base_lrs", "last_epoch", "_step_count", "_last_lr", "lr_lambdas")),
    **entries("counters", ("step", "best", "best_step", "evaluated_step", "steps_left_out")),
    **entries("totals", ("values",)),
    **entries("tracker", ("id", "run")),
    **entries("data", ("classes", "mean", "std")),
    "no parameter group": changed(lambda c: c["optimizer"].update(param_groups=[])),
    "two parameter groups": changed(lambda c: c["optimizer"]["param_groups"].append({"params": [], "lr": 0.1})),
    "a parameter twice": changed(lambda c: c["optimizer"]["param_groups"][0]["params"].__setitem__(0, 1)),
    "parameters by name": changed(lambda c: c["optimizer"]["param_groups"][0]["params"].__setitem__(0, "stem")),
    "state of no parameter": changed(lambda c: c["optimizer"]["state"].update({999: {}})),
    "a state that is none": changed(lambda c: c["optimizer"]["state"].update({0: "x"})),
    "no learning rate": changed(lambda c: c["optimizer"]["param_groups"][0].pop("lr")),
    "learning rate of text": of_group("lr", "high"),
    "momentum of text": of_group("momentum", "high"),
    "fused and foreach": of_group("foreach", True),
    "not fused": of_group("fused", False),
    "other momentum": of_momentum(torch.zeros(7, 7)),
    "momentum that is none": of_momentum("x"),
    "complex momentum": of_momentum(torch.zeros(1, dtype=torch.complex64)),
    "two base rates": changed(lambda c: c["schedule"].update(base_lrs=[0.1, 0.1], lr_lambdas=[None, None])),
    "a method of the schedule": changed(lambda c: c["schedule"].update(step=5, get_lr="x", optimizer=None)),
    "another counter": changed(lambda c: c["counters"].update(luck=7)),
    "another step": changed(lambda c: c.update(step=c["step"] + 3)),
    "a step beyond 64 bits": changed(lambda c: c.update(step=2**70)),
    "a step of 5000 digits": changed(lambda c: c.update(step=10**5000)),
    "one total": changed(lambda c: c["totals"].update(values=torch.zeros(1))),
    "drift of no layer": changed(lambda c: c.update(drift={"nose": {"bn": [torch.zeros(2)] * 2}})),
    "drift of other channels": changed(lambda c: c.update(drift={"backbone": {"stem.bn": [torch.zeros(7)] * 2}})),
    "drift of one statistic": changed(lambda c: c.update(drift={"backbone": {"stem.bn": [torch.zeros(2)]}})),
    "frozen that is not there": changed(lambda c: c.update(frozen={"nose": ["stats"]})),
    "frozen in an unknown way": changed(lambda c: c.update(frozen={"backbone.stem.bn": ["luck"]})),
    "frozen lists": changed(lambda c: c.update(frozen={"backbone.stem.bn": [["stats"]]})),
    "frozen statistics of a convolution": changed(lambda c: c.update(frozen={"backbone.stem.conv": ["stats"]})),
    "a missing weight": changed(lambda c: c["model"].pop("head.weight")),
    "a weight of text": changed(lambda c: c["model"].update({"head.weight": "x"})),
    "a weight too many": changed(lambda c: c["model"].update(nose=torch.zeros(1))),
    "weights by number": changed(lambda c: c.update(model=dict(enumerate(c["model"].values())))),
    "unknown kind of weights": changed(lambda c: c.update(weights="best")),
    "classes of another kind": changed(lambda c: c["data"].update(classes=["cat", "dog"])),
    "pixels of other channels": changed(lambda c: c["data"].update(mean=torch.zeros(1, 7, 1, 1))),
    "an unknown part": changed(lambda c: c.update(luck=[1, {2: "3"}])),
}

# The stored configuration.

VALUES = {"null": None, "list": [], "mapping": {"x": 1}, "text": "x"}
KEYS = [field.name for field in fields(Config) if field.name not in OF_COMMAND]
CONFIG = {
    **{f"config.{key} gone": changed(lambda c, key=key: c["config"].pop(key)) for key in KEYS},
    **{f"config.{key} {kind}": changed(lambda c, key=key, value=VALUES[kind]: c["config"].update({key: value}))
       for key, kind in zip(KEYS, itertools.cycle(VALUES))},
    "an unknown backend": changed(lambda c: c["config"].update(compile="luck")),
    "an unknown key": changed(lambda c: c["config"].update(luck=7)),
    "a numbered key": changed(lambda c: c["config"].update({7: 7})),
    "half an interpolation": changed(lambda c: c["config"].update(best="${")),
    "an interpolation of nothing": changed(lambda c: c["config"].update(best="${nose}")),
    "an interpolation of itself": changed(lambda c: c["config"].update(best="${best}")),
    "a mandatory value": changed(lambda c: c["config"].update(best="???")),
    "a number of text": changed(lambda c: c["config"].update(seed="7x")),
    "a tensor": changed(lambda c: c["config"].update(seed=torch.tensor(7))),
    "a freeze rule of nothing": changed(lambda c: c["config"].update(freeze={"a": {"match": "nose"}})),
    "an unknown model": changed(lambda c: c["config"]["model"].update(name="luck")),
    "an unknown metric": changed(lambda c: c["config"].update(best="luck")),
}  # fmt: skip

# Statistics, in a checkpoint and in a bare state dict.


def nested(_):
    return torch.nested.as_nested_tensor([torch.zeros(1), torch.zeros(2)])


def quantized(value):
    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)


TENSORS = {
    "complex": lambda value: value.to(torch.complex64),
    "conjugate": lambda value: value.to(torch.complex64).conj(),
    "sparse": lambda value: value.to_sparse(),
    "sparse rows": lambda value: torch.eye(len(value)).to_sparse_csr(),
    "quantized": quantized,
    "nested": nested,
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "float4": lambda value: torch.zeros(len(value), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "meta": lambda value: value.to("meta"),
    "text": lambda _: "x",
    "null": lambda _: None,
    "a mapping": lambda value: {"value": value},
    "too long": lambda value: torch.cat([value, value]),
    "a matrix": lambda value: value.expand(3, -1).clone(),
    "a scalar": lambda value: value[0].clone(),
    "empty": lambda value: value[:0].clone(),
    "whole numbers": lambda value: value.long(),
    "unsigned": lambda value: value.to(torch.uint16),
    "NaN": lambda value: torch.full_like(value, torch.nan),
    "negative": lambda value: -value.abs() - 1,
    "expanded": lambda value: value[:1].expand(len(value)),
    "expanded to 4 TiB": lambda value: value[:1].float().expand(TERA),
    "a parameter": lambda value: nn.Parameter(value),
}


def with_statistic(name, change, bare):
    def make(path, content):
        content["model"][name] = change(content["model"][name])
        if bare:
            torch.save(content["model"], path)
        elif change is TENSORS["expanded to 4 TiB"]:
            torch.save({**content, files.DIGEST: "0" * 64}, path)
        else:
            write(path, content)

    return make


STATISTICS = {
    f"{name.rpartition('.')[2]} {kind}, {'bare' if bare else 'checkpoint'}": with_statistic(name, change, bare)
    for bare in (True, False)
    for kind, change in TENSORS.items()
    for name in ((MEAN, VAR) if kind in ("too long", "NaN", "negative") else (MEAN,))
} | {
    "two counters": changed(lambda c: c["model"].update({COUNTER: torch.zeros(2, dtype=torch.int64)})),
    "a complex counter": changed(lambda c: c["model"].update({COUNTER: torch.zeros((), dtype=torch.complex64)})),
    "no mean": changed(lambda c: c["model"].pop(MEAN)),
}

# State dicts that are not ours.


def bare(change):
    """What `change` makes of the state dict, saved by torch."""
    return lambda path, content: torch.save(change(dict(content["model"])), path)


def renamed(rename):
    return bare(lambda state: {rename(number, key): value for number, (key, value) in enumerate(state.items())})


class Parameters(dict):
    """A class that no other process knows."""


FOREIGN = {
    "state dict": bare(lambda state: state),
    "in state_dict": bare(lambda state: {"state_dict": state, "epoch": 3}),
    "in state_dict, with a step": bare(lambda state: {"state_dict": state, "step": 3}),
    "in model, with a step": bare(lambda state: {"model": state, "step": "three"}),
    "with step, config and model": bare(lambda state: {"model": state, "step": 3, "config": {}}),
    "with a digest of its own": bare(lambda state: {**state, files.DIGEST: torch.zeros(1)}),
    "with an empty digest": bare(lambda state: {**state, files.DIGEST: None}),
    "numbered": renamed(lambda number, key: number),
    "keyed by tuples": renamed(lambda number, key: (number, key)),
    "keyed by bytes": renamed(lambda number, key: key.encode()),
    "module alone": bare(lambda state: {"module": state[MEAN]}),
    "_orig_mod alone": bare(lambda state: {"_orig_mod": state[MEAN]}),
    "module._orig_mod": bare(lambda state: {"module._orig_mod": state[MEAN]}),
    "dots": bare(lambda state: {"": state[MEAN], ".": state[MEAN], "..": state[VAR]}),
    "in DDP and out of it": bare(lambda state: state | {f"module.{key}": value for key, value in state.items()}),
    "a name with line breaks": renamed(lambda number, key: f"{key}\n\x1b[31m{number}"),
    "a long name": renamed(lambda number, key: key * 10_000),
    "None as a name": bare(lambda state: state | {None: state[MEAN]}),
    "nothing": bare(lambda state: {}),
    "nothing in state_dict": bare(lambda state: {"state_dict": {}}),
    "no tensor": bare(lambda state: {"epoch": 3, "lr": 0.1}),
    "no batch normalization": bare(lambda state: {"head.weight": state["head.weight"]}),
    "a list": bare(lambda state: list(state.values())),
    "a tensor": bare(lambda state: state[MEAN]),
    "a number": bare(lambda state: 7),
    "a text": bare(lambda state: "x"),
    "null": bare(lambda state: None),
    "a set": bare(lambda state: {1, 2}),
    "a module": bare(lambda state: nn.Linear(2, 2)),
    "a class of their own": bare(Parameters),
    "nested in itself": bare(lambda state: {"model": {"model": {"model": state}}}),
    "old format": lambda path, content: torch.save(content["model"], path, _use_new_zipfile_serialization=False),
}

# Bytes.


def raw(data):
    return lambda path, content: path.write_bytes(data)


def cut(share):
    """A checkpoint of which a share is there."""

    def make(path, content):
        write(path, content)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return make


def archive(pickled, **options):
    """A file of torch's format with this pickle."""

    def make(path, content):
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(1)}, buffer)
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", **options) as new:
            for record in old.infolist():
                is_pickle = record.filename.endswith("data.pkl")
                new.writestr(record.filename, pickled() if is_pickle else old.read(record))

    return make


def deep(levels):
    """A pickle of a dict in a dict, and so on, which no recursion could write."""
    return lambda: b"\x80\x02" + b"}X\x01\x00\x00\x00a" * levels + b"}" + b"s" * levels + b"."


def within_itself():
    content = {}
    content["model"] = content
    return pickle.dumps(content, 2)


def doubling(levels):
    """A list of the same list twice, and so on: small in the file, without end for whoever walks it."""
    content = [0]
    for _ in range(levels):
        content = [content, content]
    return pickle.dumps({"model": content}, 2)


def flipped(path, content):
    write(path, content)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(struct.pack("<Q", len(text) if length is None else length) + text + data)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BYTES = {
    "empty": raw(b""),
    "one byte": raw(b"\x80"),
    "text": raw(b"no checkpoint\n"),
    "zeros": raw(bytes(10_000)),
    "a pickle": raw(pickle.dumps({"a": 1})),
    "half a pickle": raw(pickle.dumps({"a": [1] * 999})[:-9]),
    "an image": raw(b"\x89PNG\r\n\x1a\n" + bytes(99)),
    "a page": raw(b"<html><body>404</body></html>"),
    "an empty archive": raw(b"PK\x05\x06" + bytes(18)),
    "one bit": flipped,
    **{f"{share:.0%} of it": cut(share) for share in (0.1, 0.5, 0.9, 0.999)},
    "no pickle": archive(lambda: b""),
    "an endless text": archive(lambda: b"\x80\x04\x8d" + struct.pack("<Q", TERA) + b"x."),
    "an endless memo": archive(lambda: b"\x80\x04r" + struct.pack("<I", 2**31) + b"."),
    "200 levels": archive(deep(200)),
    "20000 levels": archive(deep(20_000)),
    "within itself": archive(within_itself),
    "60 times doubled": archive(lambda: doubling(60)),
    "a bomb": archive(lambda: b"\x80\x02X" + struct.pack("<I", 2**24) + bytes(2**24) + b".",
                      compression=zipfile.ZIP_DEFLATED),
    "fit.safetensors": lambda path, content: save_file(content["model"], path),
    "empty.safetensors": raw(b""),
    "short.safetensors": raw(b"\x01"),
    "text.safetensors": raw(b"no checkpoint, but long enough"),
    "length.safetensors": safetensors({}, length=2**60),
    "json.safetensors": safetensors(b"{no json"),
    "list.safetensors": safetensors([1, 2]),
    "offsets.safetensors": safetensors({"a": {**ONE, "data_offsets": [0, 2**50]}}, bytes(4)),
    "shape.safetensors": safetensors({"a": {**ONE, "shape": [2**40]}}, bytes(4)),
    "type.safetensors": safetensors({"a": {**ONE, "dtype": "F33"}}, bytes(4)),
    "nothing.safetensors": safetensors({}),
    "cut.safetensors": safetensors({"a": ONE}, bytes(2)),
    "torch.safetensors": lambda path, content: write(path, content),
}  # fmt: skip

# Places.


def link(target):
    def make(path, content):
        path.symlink_to(path if target is None else target)

    return make


def loop_of_two(path, content):
    other = path.with_name(f"{path.name}.back")
    other.symlink_to(path)
    path.symlink_to(other)


def bound(path, content):
    """A socket; its name is relative, because an address has room for 107 characters."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as own:
            own.bind(path.name)
    finally:
        os.chdir(before)


PLACES = {
    "nothing": lambda path, content: None,
    "a link to itself": link(None),
    "a loop of two": loop_of_two,
    "a link to nothing": link("nowhere.pt"),
    "a link to zeros": link("/dev/zero"),
    "a link to null": link("/dev/null"),
    "a directory": lambda path, content: path.mkdir(),
    "a directory of directories": lambda path, content: (path / "checkpoints/best.pt").mkdir(parents=True),
    "a pipe": lambda path, content: os.mkfifo(path),
    "a socket": bound,
}

# Code. Each would create the file `marker` in the working directory.


class Calls:
    """Pickled, a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def calling(function, *args, inside=None):
    """A file whose pickle has this call, alone or as an entry of a checkpoint."""

    def make(path, content):
        call = Calls(function, *args)
        torch.save(call if inside is None else {**content, inside: call, files.DIGEST: "0" * 64}, path)

    return make


def plainly(function, *args):
    return lambda path, content: path.write_bytes(pickle.dumps(Calls(function, *args)))


TOUCH = "open('marker', 'w').close()"
PICKLES = {
    "os.system": calling(os.system, "touch marker"),
    "os.system in a pickle": plainly(os.system, "touch marker"),
    "eval": calling(eval, TOUCH),
    "exec": calling(exec, TOUCH),
    "open": calling(open, "marker", "w"),
    "touch": calling(Path.touch, Path("marker")),
    "torch.save": calling(torch.save, 1, "marker"),
    "eval as the step": calling(eval, TOUCH, inside="step"),
    "eval in the old format": lambda path, content: torch.save(
        Calls(eval, TOUCH), path, _use_new_zipfile_serialization=False
    ),
    "eval.safetensors": plainly(eval, TOUCH),
}


def bomb():
    buffer = io.BytesIO()
    torch.save(Calls(eval, TOUCH), buffer)
    return buffer.getvalue()


LOADS = {"_target_": "torch.load", "f": {"_target_": "io.BytesIO", "_args_": [bomb()]}, "weights_only": False}
CODE = {
    "torch.load": LOADS,
    "open": {"_target_": "builtins.open", "file": "marker", "mode": "w"},
    "touch": {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["marker"]}},
    "os.system": {"_target_": "os.system", "command": "touch marker"},
    "nested": {"_target_": "torch.nn.Sequential", "_args_": [LOADS]},
    "partial": {"_target_": "torch.nn.Identity", "hook": {**LOADS, "_partial_": True}},
}
TARGETS = (
    {
        f"{name} as {key}": changed(lambda c, key=key, node=node: c["config"].update({key: node}))
        for name, node in CODE.items()
        for key in ("model", "data", "loss")
    }
    | {
        f"{name} as a metric": changed(lambda c, node=node: c["config"].update(metrics={"own": node}))
        for name, node in CODE.items()
    }
    | {
        "a variable of the environment": changed(lambda c: c["config"].update(best="${oc.env:HOME}")),
    }
)

FAMILIES = {
    "parts gone": {f"{part} gone": without(part) for part in PARTS},
    "parts changed": {f"{part} {kind}": with_other(part, value) for part in PARTS for kind, value in WRONG.items()},
    "inside of parts": INSIDE,
    "config": CONFIG,
    "statistics": STATISTICS,
    "foreign": FOREIGN,
    "bytes": BYTES,
    "places": PLACES,
    "pickles": PICKLES,
    "targets": TARGETS,
}
