"""Compiles every Triton program for an H100, which needs no GPU; run by test_cuda in a process of its own.

The arguments come from the launches themselves: `cuda` runs on tensors without memory, and what it would launch is
recorded.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from syncbn.kernels import cuda, cuda_step
from syncbn.kernels.step import Statistics
from syncbn.kernels.triton import programs

SHAPES = [(64, 64, 56, 56), (64, 2048, 7, 7), (2, 256, 14, 14), (256, 128), (1, 1, 2**31 + 8)]
CHANNELS = (64, 2048, 7, 7)  # a program for each channel


class Recorder:
    """Stands for a program: `recorder[grid](*arguments, **options)` remembers the launch."""

    def __init__(self, launches: dict, name: str) -> None:
        self.launches, self.program, self.name = launches, getattr(programs, name), name

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments: Any, **options: Any) -> None:
            assert all(size > 0 for size in grid)
            values = dict(zip(self.program.arg_names, arguments, strict=False))
            types = {
                parameter.name: parameter.annotation_type or ("constexpr" if value is None else mangle_type(value))
                for parameter, value in zip(self.program.params, arguments, strict=False)
            }
            fixed = {name: None for name, value in values.items() if value is None}
            fixed |= {name: options.pop(name) for name in self.program.arg_names if name in options}
            key = (self.name, *types.items(), *fixed.items(), *options.items())
            types |= dict.fromkeys(fixed, "constexpr")
            self.launches[key] = (self.name, types, fixed, options)

        return launch


class Recorders:
    """Stands for the module of programs."""

    def __init__(self) -> None:
        self.launches: dict = {}

    def __getattr__(self, name: str) -> Recorder:
        return Recorder(self.launches, name)

    def launch(self, program: Recorder, grid: tuple, tensors: tuple, scalars: tuple, blocks: dict) -> None:
        """Stands for `launch.launch`."""
        program[grid](*tensors, *scalars, **blocks)


def record(dtypes: list[torch.dtype]) -> list[tuple]:
    """What all operators would launch for these types, shapes and both layouts."""
    recorders = Recorders()
    cuda._import_programs = lambda: recorders
    cuda.multiprocessors = lambda device: 132  # an H100
    for dtype in dtypes:
        for shape in SHAPES:
            for rows in (False, True):
                input = torch.empty(shape, dtype=dtype, device="meta")
                if rows:
                    input = input.movedim(1, -1).contiguous().movedim(-1, 1)
                vector = torch.empty(shape[1], device="meta")
                packed = cuda.moments(input)
                mean, invstd, count = cuda.finish(
                    packed, vector, vector, torch.empty((), dtype=torch.int64, device="meta"), 0.1, 1e-5,
                    torch.float64 if dtype == torch.float64 else torch.float32,
                )  # fmt: skip
                cuda.finish(packed, None, None, None, None, 1e-5, mean.dtype)
                cuda.finish(packed, vector, vector, torch.empty((), dtype=torch.int64, device="meta"), None, 1e-5,
                            mean.dtype)  # fmt: skip
                moved = Statistics(vector, vector, torch.empty((), dtype=torch.int64, device="meta"), 0.1, 1e-5)
                cuda_step.forward(input, vector, vector, None, None, moved, None)
                saved = (input, input, mean, invstd, vector, vector)
                cuda_step.backward(*saved, None, None, count, vector.dtype, None, False, True)
                if shape == CHANNELS and not rows:
                    for activation, kept in (("relu", input), ("leaky_relu", None), ("silu", None)):
                        cuda_step.forward(input, vector, vector, kept, activation, moved, None)
                        cuda_step.backward(*saved, kept, activation, count, vector.dtype, None, False, True)
                cuda.normalize(input, mean, invstd, vector, vector)
                cuda.normalize(input, mean, invstd, None, None)
                if shape == SHAPES[0]:
                    for activation in ("relu", "leaky_relu", "silu"):
                        options = (input, mean, invstd, vector, vector)
                        cuda.normalize(*options, input, activation)
                        for kept in (None, input):
                            cuda.activated_reduce(input, *options, kept, activation, vector.dtype)
                cuda.backward_local(input, input, mean, invstd, vector, count, vector.dtype)
    return list(recorders.launches.values())


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers for each thread, and bytes that do not fit into them, of a compiled program."""
    # Triton's own choice: several are there since 3.6, and 3.9 writes what only the other one reads.
    ptxas = (get_ptxas(capability) if inspect.signature(get_ptxas).parameters else get_ptxas()).path
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "program.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", "--fmad=false", f"--gpu-name=sm_{capability}a", source, "-o", Path(directory, "out")]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores", text)
    used = re.search(r"Used (\d+) registers", text)
    assert spilled is not None, text
    assert used is not None, text
    return int(used.group(1)), int(spilled.group(1))


def main(dtypes: list[str]) -> None:
    """A line for each program: its name, its types, what it takes."""
    for name, types, fixed, options in record([getattr(torch, dtype) for dtype in dtypes]):
        program = getattr(programs, name)
        aligned = {(program.arg_names.index(key),): [["tt.divisibility", 16]] for key in types if types[key][0] == "*"}
        source = ASTSource(program, types, fixed, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        registers, spilled = resources(compiled.asm["ptx"], 90)
        loads = sorted(set(re.findall(r"ld\.global\S*|cp\.async\.c\S*", compiled.asm["ptx"])))
        blocks = {key: value for key, value in fixed.items() if value is not None}
        print(name, types.get("input", ""), blocks, f"registers={registers} spilled={spilled}", *loads)


if __name__ == "__main__":
    main(sys.argv[1:])
