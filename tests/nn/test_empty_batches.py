"""Batches with zero rows, of whatever a data loader yields: same class and structure, and not one row of real data."""

import dataclasses
import pickle
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attr
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils import _pytree as pytree

from syncbn.nn.empty_batches import cut_to_nothing, pack_batch

X, Y = torch.ones(3, 4, dtype=torch.float64), np.zeros((3, 2), dtype=np.int16)


class Encoding(UserDict):
    """As Hugging Face's `BatchEncoding`: keys are attributes, too."""

    def __init__(self, data, length):
        super().__init__(data)
        self.length = length

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class ModelOutput(OrderedDict):
    """As Hugging Face's: attributes and items are the same, and a dataclass besides."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Registered(Mapping):
    """A mapping that nothing can be assigned to."""

    def __init__(self, items):
        self._items = dict(items)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


Pair = namedtuple("Pair", "x y")


class Named(Pair):
    """A subclass of a named tuple."""


@dataclasses.dataclass
class Batch:
    x: Tensor
    names: list[str]
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Any
    length: int = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "length", len(self.x))


@dataclasses.dataclass
class Late:
    """A field that somebody sets after it was built."""

    x: Tensor
    mask: Tensor = dataclasses.field(init=False)


@attr.define(frozen=True)
class Attrs:
    x: Tensor
    _private: Tensor


class Listed(list):
    pass


class Image(Tensor):
    """As torchvision's `tv_tensors`: its operators return plain tensors; what it knows besides is in its dictionary."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Node:
    """Registered with torch's pytree."""

    def __init__(self, x, y):
        self.x, self.y = x, y


pytree.register_pytree_node(Node, lambda node: ([node.x, node.y], None), lambda parts, _: Node(*parts))


class Color(Enum):
    RED = 1


def with_late_mask():
    batch = Late(X)
    batch.mask = X > 0
    return batch


CONTAINERS = {
    "dict": ({"x": X, "y": Y}, lambda b: [b["x"], b["y"]]),
    "OrderedDict": (OrderedDict(x=X), lambda b: [b["x"]]),
    "defaultdict": (defaultdict(list, x=X), lambda b: [b["x"], b["nothing"]]),
    "UserDict": (UserDict(x=X, inner={"y": Y}), lambda b: [b["x"], b["inner"]["y"]]),
    "BatchEncoding": (Encoding({"x": X}, 3), lambda b: [b["x"], b.x]),
    "ModelOutput": (ModelOutput(x=X), lambda b: [b["x"], b.x]),
    "mappingproxy": (MappingProxyType({"x": X}), lambda b: [b["x"]]),
    "read-only mapping": (Registered({"x": X}), lambda b: [b["x"]]),
    "tuple": ((X, (X, Y)), lambda b: [b[0], *b[1]]),
    "list": ([X, [Y]], lambda b: [b[0], b[1][0]]),
    "subclass of list": (Listed([X]), lambda b: [b[0]]),
    "named tuple": (Pair(X, [X]), lambda b: [b.x, b.y[0]]),
    "subclass of a named tuple": (Named(X, [X]), lambda b: [b.x, b.y[0]]),
    "dataclass": (Batch(X, ["a", "b", "c"]), lambda b: [b.x, b.names]),
    "frozen dataclass": (Frozen(X), lambda b: [b.x, range(b.length)]),
    "dataclass with a field set late": (with_late_mask(), lambda b: [b.x, b.mask]),
    "attrs": (Attrs(X, X), lambda b: [b.x, b._private]),
    "namespace": (SimpleNamespace(x=X), lambda b: [b.x]),
    "pytree node": (Node(X, Y), lambda b: [b.x, b.y]),
    "structseq": (torch.max(X, 1), lambda b: [b.values, b.indices]),
    "nested": ({"a": [Batch(X, []), UserDict(b=(X,))]}, lambda b: [b["a"][0].x, b["a"][1]["b"][0]]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_container_keeps_its_class_and_has_no_row(kind):
    batch, parts = CONTAINERS[kind]
    lengths = [len(part) for part in parts(batch)]
    empty = cut_to_nothing(batch)
    assert type(empty) is type(batch)
    assert [len(part) for part in parts(empty)] == [0] * len(lengths)
    assert [len(part) for part in parts(batch)] == lengths  # the real batch is what it was
    assert all(part.shape[1:] in ((4,), (2,), ()) for part in parts(empty) if isinstance(part, Tensor | np.ndarray))


def test_what_a_class_knows_besides_stays():
    assert cut_to_nothing(Encoding({"x": X}, 3)).length == 3
    image = X.as_subclass(Image)
    image.format = "XYXY"
    empty = cut_to_nothing(image)
    assert (type(empty), len(empty), empty.format) == (Image, 0, "XYXY")


def test_single_values_are_handed_on():
    values = {
        "name": "abc", "bytes": b"abc", "none": None, "number": 3, "flag": True, "color": Color.RED, "type": torch.int8,
        "size": torch.Size([3]), "shape": (3, 3), "numpy": np.float32(2.0), "scalar": torch.tensor(2.0), "set": {"a"},
        "array": np.array(2.0), "device": X.device, "kind": Batch,
    }  # fmt: skip
    empty = cut_to_nothing({"x": X, **values})
    assert {name: value for name, value in empty.items() if name != "x"} == values


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"x": X, "names": ["a", "b", "c"]}, []),
        ({"x": X, "names": ("a", "b", "c")}, ()),
        ({"x": X, "names": [1, 2, 3]}, []),
        ({"x": X, "names": [["a"], ["b", "c"], []]}, []),  # ragged: a list for each row
        ({"x": X, "names": [object(), object(), object()]}, []),  # whatever it is, one for each row
        ({"x": X, "names": [("a", "b", "c"), ("d", "e", "f")]}, [(), ()]),  # columns of a list of two fields
        ({"x": X, "names": ["mean", "std"]}, ["mean", "std"]),  # not one for each row
        ({"names": ["a", "b"], "labels": [0, 1]}, []),  # no tensor tells how many rows there are
    ],
)
def test_a_list_with_an_entry_for_each_row_is_cut(batch, expected):
    assert cut_to_nothing(batch)["names"] == expected


class Mine:
    """A batch that a `collate_fn` made, as in torch's documentation of `pin_memory`."""

    def __init__(self, x):
        self.x = x


@dataclasses.dataclass
class Strict:
    x: Tensor

    def __post_init__(self):
        if len(self.x) == 0:
            raise ValueError("no rows")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Mine(X), r"empty batch of .*Mine \(a type of which it is not known"),
        ({"x": X, "inner": [Mine(X)]}, r"empty batch of .*Mine "),
        (pack_sequence([X, X]), "PackedSequence .it cannot have zero rows"),
        (Strict(X), "Strict .ValueError: no rows"),
        ({"x": X, "f": len}, "builtin_function_or_method"),
        (torch.nested.nested_tensor([X[:1], X], layout=torch.jagged), "NestedTensor"),
    ],
    ids=["object", "inside", "packed sequence", "refuses", "function", "nested tensor"],
)
def test_what_cannot_be_cut_is_an_error_with_its_type_and_the_remedy(batch, message):
    with pytest.raises(TypeError, match=f"loader: cannot make an .*{message}.*empty=lambda batch"):
        cut_to_nothing(batch)


def test_another_rank_finds_tensors_on_the_kind_of_device_they_were_on():
    batch = {"x": X[:0].to("meta"), "y": X[:0], "z": Y[:0]}
    found = pickle.loads(pack_batch(batch))
    assert [found["x"].device.type, found["y"].device.type] == ["meta", "cpu"]
    assert found["x"].shape == found["y"].shape == (0, 4)
    assert found["z"].shape == (0, 2)
