"""What the GPU kernels of the gate take of a multiprocessor, as Triton compiles them; no GPU is needed.

    python benchmarks/kernels.py --types bf16 fp32 --capabilities 80 90

Compiles every kernel that a forward and a backward pass launch, for the windows of the released models and a joint
one, and prints registers of a thread, bytes spilled to the stack, shared memory of a program, and how many programs a
multiprocessor holds at once by registers, shared memory and warps.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from posmlp.model import gpu_kernels

WINDOWS = {
    "space 14": ((1, 14, 14), (16, 14, 14)),  # the window, and the extent of its stage
    "space 7": ((1, 7, 7), (16, 7, 7)),
    "time 16": ((16, 1, 1), (16, 14, 14)),
    "time 32": ((32, 1, 1), (32, 14, 14)),
    "joint": ((16, 14, 14), (16, 14, 14)),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARED = {80: 164, 90: 228}  # KB of a multiprocessor; each program takes one more than it asks for
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Taken(NamedTuple):
    """What a kernel takes: registers a thread, bytes of stack a thread, shared bytes and warps a program."""

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int

    def resident(self, capability: int) -> int:
        """Programs that a multiprocessor holds at once."""
        registers = math.ceil(self.registers / 8) * 8 * 32 * self.warps
        return min(65536 // registers, SHARED[capability] * 1024 // (self.shared + 1024), 64 // self.warps)


def launches(window: tuple[int, ...], extent: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Kernels, arguments and constants of a forward and a backward pass of 288 channels in 32 groups, 8 clips."""
    caught: list[tuple[Any, ...]] = []

    def catch(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        caught.append((self, args, constants))

    with torch.device("meta"):
        u = torch.empty(288, 8, 1, extent[0], extent[1] * extent[2], dtype=dtype)
        table, bias = torch.empty(32, math.prod(2 * n - 1 for n in window)), torch.empty(math.prod(window))
    line, run = gpu_kernels.lines(window, extent), JITFunction.run
    JITFunction.run = catch
    try:
        gpu_kernels.forward(u, u, table, bias, line)
        gpu_kernels.backward(u, u, u, table, bias, line)
    finally:
        JITFunction.run = run
    return caught


def compiled(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], capability: int) -> Taken:
    """One launch compiled to machine code, as it would be on a GPU: pointers are multiples of 16 bytes."""
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps")}
    signature, aligned = {}, {}
    for i, (name, arg) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name] = pointers[arg.dtype] if isinstance(arg, torch.Tensor) else "i32"
        if isinstance(arg, torch.Tensor):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([BINARIES / "cuobjdump", "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return Taken(kernel.__name__, int(found[1]), int(found[2]), binary.metadata.shared, binary.metadata.num_warps)


def taken(window: str, dtype: torch.dtype, capability: int) -> Iterator[Taken]:
    """Each kernel of a window of ``WINDOWS``, in the order of launches; the gradient of v is ``mix`` again."""
    for kernel, args, constants in launches(*WINDOWS[window], dtype):
        yield compiled(kernel, args, constants, capability)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", nargs="+", default=[*WINDOWS], choices=WINDOWS)
    parser.add_argument("--types", nargs="+", default=["bf16", "fp32"], choices=TYPES)
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], choices=SHARED)
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    labels = ("registers", "stack", "shared", "warps", "at once")
    print(f"{'':<36}{''.join(f'{label:>10}' for label in labels)}")
    for capability in args.capabilities:
        for name in args.types:
            for window in args.windows:
                for each in dict.fromkeys(taken(window, TYPES[name], capability)):
                    label = f"sm_{capability} {name} {window}: {each.kernel}"
                    cells = (*each[1:], each.resident(capability))
                    print(f"{label:<36}{''.join(f'{cell:>10}' for cell in cells)}", flush=True)


if __name__ == "__main__":
    main()
