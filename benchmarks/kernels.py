"""Print the resources that the gate's GPU kernels need, as Triton compiles them. No GPU is needed.

    python benchmarks/kernels.py --types bf16 fp32 --capabilities 80 90

Compiles every kernel that a forward and a backward pass launch, for the windows of the released models and for a joint
window. Prints registers per thread, bytes per thread that spill to the stack, bytes of shared memory and warps per
program, and the number of programs that a multiprocessor holds at once, limited by registers, shared memory and warps.
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
    "space 14": ((1, 14, 14), (16, 14, 14)),  # the window, and the tokens (T, H, W) of its stage
    "space 7": ((1, 7, 7), (16, 7, 7)),
    "time 16": ((16, 1, 1), (16, 14, 14)),
    "time 32": ((32, 1, 1), (32, 14, 14)),
    "joint": ((16, 14, 14), (16, 14, 14)),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of a multiprocessor, by compute capability (CUDA C++ Programming Guide). Each program uses 1 KB more than it requests.
SHARED_MEMORY_KB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
MOST_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class KernelResources(NamedTuple):
    """Registers and stack bytes per thread, bytes of shared memory and warps per program."""

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int

    def programs_at_once(self, capability: int) -> int:
        """Return the number of programs that a multiprocessor holds at once."""
        registers = math.ceil(self.registers / 8) * 8 * 32 * self.warps
        by_memory = SHARED_MEMORY_KB[capability] * 1024 // (self.shared + 1024)
        return min(65536 // registers, by_memory, MOST_WARPS[capability] // self.warps)


def record_launches(window: tuple[int, ...], extent: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Return kernel, arguments and constants of each launch in a forward and a backward pass.

    The input has 288 channels in 32 groups and 8 clips.
    """
    launches: list[tuple[Any, ...]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        launches.append((self, args, constants))

    with torch.device("meta"):
        u = torch.empty(288, 8, 1, extent[0], extent[1] * extent[2], dtype=dtype)
        table, bias = torch.empty(32, math.prod(2 * n - 1 for n in window)), torch.empty(math.prod(window))
    lines, run = gpu_kernels.find_lines(window, extent), JITFunction.run
    JITFunction.run = record
    try:
        gpu_kernels.forward(u, u, table, bias, lines)
        gpu_kernels.backward(u, u, u, table, bias, lines)
    finally:
        JITFunction.run = run
    return launches


def compile_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], capability: int) -> KernelResources:
    """Compile one launch to machine code as on a GPU, where pointers are multiples of 16 bytes."""
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
    return KernelResources(
        kernel.__name__, int(found[1]), int(found[2]), binary.metadata.shared, binary.metadata.num_warps
    )


def compile_kernels(window: str, dtype: torch.dtype, capability: int) -> Iterator[KernelResources]:
    """Yield the resources of each kernel for a window of ``WINDOWS``, in launch order.

    The gradient of v is the kernel ``mix`` again.
    """
    for kernel, args, constants in record_launches(*WINDOWS[window], dtype):
        yield compile_launch(kernel, args, constants, capability)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", nargs="+", default=[*WINDOWS], choices=WINDOWS)
    parser.add_argument("--types", nargs="+", default=["bf16", "fp32"], choices=TYPES)
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], choices=SHARED_MEMORY_KB)
    args = parser.parse_args()
    print(f"Triton {triton.__version__}")
    labels = ("registers", "stack", "shared", "warps", "at once")
    print(f"{'':<36}{''.join(f'{label:>10}' for label in labels)}")
    for capability in args.capabilities:
        for name in args.types:
            for window in args.windows:
                for each in dict.fromkeys(compile_kernels(window, TYPES[name], capability)):
                    label = f"sm_{capability} {name} {window}: {each.kernel}"
                    cells = (*each[1:], each.programs_at_once(capability))
                    print(f"{label:<36}{''.join(f'{cell:>10}' for cell in cells)}", flush=True)


if __name__ == "__main__":
    main()
