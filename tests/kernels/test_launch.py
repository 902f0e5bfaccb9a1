"""A compiled kernel is started again without Triton's help, and only for what it was compiled for."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is there on Linux only")

from syncbn.kernels.triton import launch as launching
from syncbn.kernels.triton.launch_plan import LaunchOptions


class Program:
    """Stands for a Triton function: remembers compilations and starts."""

    def __init__(self):
        self.arg_names = ["a", "b", "size", "BLOCK"]
        self.pre_run_hooks, self.compiled, self.started = [], [], []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            launcher = SimpleNamespace(
                global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=False,
                launch=lambda *arguments: self.started.append(arguments),
            )  # fmt: skip
            return SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")

        return run


@pytest.fixture
def program(monkeypatch):
    monkeypatch.setattr(launching, "_is_direct", True)
    monkeypatch.setattr(launching, "current_cuda_stream", lambda device: "stream")
    return Program()


def test_the_second_launch_calls_what_the_first_compiled(program):
    a, b, blocks = torch.ones(4), torch.ones(4), LaunchOptions({"BLOCK": 8, "num_warps": 4})
    launching.launch(program, (2, 3, 1), (a, b), (4,), blocks)
    launching.launch(program, (5, 1, 1), (b, a), (9,), blocks)
    assert program.compiled == [((2, 3, 1), (a, b, 4), {"BLOCK": 8, "num_warps": 4})]
    grid, *rest, pointer, other, size, block = program.started[0][:3], *program.started[0][3:]
    assert (grid, pointer, other, size, block) == ((5, 1, 1), b.data_ptr(), a.data_ptr(), 9, 8)
    assert rest[:2] == ["stream", "function"]
    assert "metadata" in rest


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a.double(), b),
        lambda a, b: (a, None),
        lambda a, b: (a[1:], b),
        lambda a, b: (a, b[1:]),
    ],
    ids=["type", "none", "first not aligned", "second not aligned"],
)
def test_what_a_kernel_was_not_compiled_for_is_compiled(program, change):
    a, b, blocks = torch.ones(4), torch.ones(4), LaunchOptions({"BLOCK": 8})
    launching.launch(program, (1, 1, 1), (a, b), (4,), blocks)
    changed = change(a, b)
    for _ in range(2):
        launching.launch(program, (1, 1, 1), changed, (4,), blocks)
    launching.launch(program, (1, 1, 1), (a, b), (4,), blocks)
    assert (len(program.compiled), len(program.started)) == (2, 2)


def test_launches_that_a_hook_observes_take_the_public_way(program, monkeypatch):
    a, b, blocks = torch.ones(4), torch.ones(4), LaunchOptions({"BLOCK": 8})
    launching.launch(program, (1, 1, 1), (a, b), (4,), blocks)
    monkeypatch.setattr(launching._knobs.launch_enter_hook, "calls", [print])
    launching.launch(program, (1, 1, 1), (a, b), (4,), blocks)
    monkeypatch.setattr(launching._knobs.launch_enter_hook, "calls", [])
    program.pre_run_hooks.append(print)
    launching.launch(program, (1, 1, 1), (a, b), (4,), blocks)
    assert (len(program.compiled), program.started) == (3, [])


def test_a_tensor_on_another_device_is_left_to_triton_which_says_so(program):
    a, b, blocks = torch.ones(4), torch.ones(4), LaunchOptions({"BLOCK": 8})
    launching.launch(program, (1, 1, 1), (a, b), (4,), blocks)
    elsewhere = SimpleNamespace(dtype=b.dtype, data_ptr=b.data_ptr, get_device=lambda: 0)
    launching.launch(program, (1, 1, 1), (a, elsewhere), (4,), blocks)
    assert (len(program.compiled), program.started) == (2, [])


def test_versions_of_triton_that_were_not_tried_take_the_public_way(program, monkeypatch):
    monkeypatch.setattr(launching, "_is_direct", False)
    for _ in range(2):
        launching.launch(program, (1, 1, 1), (torch.ones(4), None), (4,), LaunchOptions({"BLOCK": 8}))
    assert (len(program.compiled), program.started) == (2, [])
