"""Compute the lower bound (floor) of a model's time on this device, and on an H100 from its data sheet.

    python benchmarks/floors.py [s16 s32 b16 b32]

``benchmarks/model.py`` prints the floor of each part of a model next to the part's measured time.

The floor of a part is the larger of two times: its arithmetic at the device's best rate, and its bytes at the bandwidth
of the memory. The bytes are the fewest that a program without recomputation must move. Each activation that has to go
to memory is written once and read once:

- A convolution reads its input and writes its output. Its backward pass reads both and the gradient of the output, and
  writes the gradient of the input.
- A step of a block reads x and writes x; everything in between stays in caches. In training it also stores what the
  backward pass needs and could only recompute with a matrix product: the hidden layer before GELU, and the mixed
  tokens. The backward pass reads them, x and the gradient of the output, and writes the gradient of x.
- Weights are fp32. They are read once in each pass, and their gradients are written once.

The whole model can overlap the arithmetic of one part with the bytes of another. So its floor is the larger of the two
sums. Arithmetic other than matrix products is not counted, so no program reaches a floor completely.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from posmlp.model import backbone, cpu
from posmlp.model.backbone import grid
from posmlp.model.cost import device_name, gate_macs, seconds
from posmlp.model.gates import PositionGate
from posmlp.model.spec import BLOCKS, Variant, Window, model_variant, unit_window

PARTS = ("stem", "downsampling", "norms", "fc1", "gates", "fc2", "elementwise", "window order")
ForwardParts = dict[tuple[int, int], str | None]  # part of each forward operation, by thread and sequence number


@dataclass(frozen=True)
class Work:
    """Operations (two for a multiply-accumulate) and bytes of memory traffic."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_seconds(self, peak: DevicePeak) -> float:
        """Return the larger of the time of the arithmetic and the time of the memory traffic."""
        return max(self.flops / peak.flops, self.bytes / peak.bandwidth)


@dataclass(frozen=True)
class DevicePeak:
    """Highest operations per second and bytes per second of a device."""

    flops: float
    bandwidth: float


# SXM5, from the maker's data sheet (without sparsity); fp32 products without TF32.
H100 = {torch.bfloat16: DevicePeak(989e12, 3.35e12), torch.float32: DevicePeak(67e12, 3.35e12)}


def minimum_work(variant: Variant, dtype: torch.dtype, train: bool, batch: int = 1) -> dict[str, Work]:
    """Return the work of each of ``PARTS`` in a forward pass, or in a forward and a backward pass (``train``)."""
    size, found = dtype.itemsize, {part: Work() for part in PARTS}
    passes = 3 if train else 1  # the backward pass has two products for each of the forward pass
    traffic = {"weights": 4 * passes, "kept": 2 * size if train else 0}
    height = width = variant.image_size
    blocks = (variant.blocks,) * len(variant.dims) if isinstance(variant.blocks, str) else variant.blocks

    def conv(dim_in: int, dim: int) -> Work:
        """Return the work of a convolution (1,3,3) with stride (1,2,2), and set the size to that of its output."""
        nonlocal height, width
        pixels_in = batch * variant.frames * height * width
        height, width = (height + 1) // 2, (width + 1) // 2
        pixels, weights = batch * variant.frames * height * width, 9 * dim_in * dim
        input_values, input_gradient = dim_in * pixels_in, dim_in > 3  # the clip needs no gradient
        moved = (input_values + dim * pixels) * (2 if train else 1)
        moved += input_values if train and input_gradient else 0
        products = passes if input_gradient else min(passes, 2)
        return Work(2 * products * pixels * weights, size * moved + traffic["weights"] * weights)

    found["stem"] = conv(3, variant.dims[0] // 2) + conv(variant.dims[0] // 2, variant.dims[0])
    for i, (dim, depth, groups, window, block) in enumerate(
        zip(variant.dims, variant.depths, variant.groups, variant.full_windows(), blocks, strict=True)
    ):
        if i:
            found["downsampling"] += conv(variant.dims[i - 1], dim)
        sides = (variant.frames, height, width)
        extent = cast(Window, tuple(min(a, b) for a, b in zip(window, sides, strict=True)))
        tokens = batch * math.prod(extent) * math.prod(grid(sides, extent))
        for step in BLOCKS[block] * depth:
            x = size * tokens * dim
            found["norms"] += Work(bytes=(2 if train else 1) * x)  # reads x
            found["elementwise"] += Work(bytes=(3 if train else 1) * x)  # adds to x; its gradient is read and written
            for unit in step:
                unit_extent = unit_window(unit, extent)
                gate = gate_macs(unit_window(unit, window), extent, dim, groups, tokens)
                table = groups * math.prod(2 * n - 1 for n in unit_extent)
                found["fc1"] += Work(
                    2 * passes * tokens * 2 * dim * dim,
                    traffic["weights"] * 2 * dim * dim + traffic["kept"] * tokens * 2 * dim,
                )
                found["gates"] += Work(2 * passes * gate, traffic["weights"] * table + traffic["kept"] * tokens * dim)
                found["fc2"] += Work(2 * passes * tokens * dim * dim, traffic["weights"] * dim * dim)
    return found


def measured_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """Return the best rates measured on the device: a product of large matrices, and a copy larger than all caches."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    multiply = cpu.product if device.type == "cpu" else torch.matmul
    calls = 10 if device.type == "cuda" else 1  # a GPU copies as fast as a call is launched and waited for

    def best_seconds(run: Callable[[], object]) -> float:
        run()
        return min(seconds(lambda: [run() for _ in range(calls)], device) for _ in range(7)) / calls

    product, copy = best_seconds(lambda: multiply(a, b)), best_seconds(lambda: target.copy_(source))
    return DevicePeak(2 * side**3 / product, 2 * source.nbytes / copy)


@contextlib.contextmanager
def mark_parts() -> Iterator[None]:
    """Mark the parts of a model for the profiler, inside the context."""

    def marked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(part):
                return function(*args, **kwargs)

        return run

    marks: list[tuple[Any, str, str]] = [
        (backbone.Stem, "forward", "stem"),
        (backbone.Downsample, "forward", "downsampling"),
        (backbone, "channel_norm", "norms"),
        (cpu, "channel_norm", "norms"),
        (cpu, "channel_norm_backward", "norms"),
        (PositionGate, "forward", "gates"),
        (PositionGate, "mixing_weights", "gates"),
        (cpu, "mix", "gates"),
        (cpu, "mix_backward", "gates"),
        (backbone, "to_windows", "window order"),
        (backbone, "from_windows", "window order"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in marks:
            stack.enter_context(mock.patch.object(owner, name, marked(part, getattr(owner, name))))
        yield


def measure_parts(run: Callable[[], None], dims: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Return the seconds of a call in each of ``PARTS``, from PyTorch's profiler (CPU thread, or kernels of a GPU).

    An operation of the backward pass belongs to the part of its forward operation. fc1 and fc2 are identified by their
    shapes: they are the products, other than those of gates, between C and 4C channels, and between 2C and C (parallel
    blocks).
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with mark_parts(), profile(activities=activities, record_shapes=True) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.events()
    forward: ForwardParts = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope == 0:
            forward.setdefault((event.thread, event.sequence_nr), enclosing_part(event))
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if device.type == "cuda" and (event.name in PARTS or event.device_type != DeviceType.CPU):
            continue  # a mark or a kernel: its time is that of operations inside it, or that started it
        part = enclosing_part(event, forward) or linear_part(event.input_shapes, dims) or "elementwise"
        found[part] += 1e-6 * microseconds
    return found


def enclosing_part(event: Any, forward: ForwardParts | None = None) -> str | None:
    """Return the mark around an operation, or for a backward operation its part in ``forward``; None without a mark."""
    while event is not None:
        if event.name in PARTS:
            return str(event.name)
        if forward and event.name.startswith("autograd::engine"):
            found = forward.get((event.fwd_thread, event.sequence_nr))
            if found:
                return found
        event = event.cpu_parent
    return None


def linear_part(shapes: list[list[int]], dims: tuple[int, ...]) -> str | None:
    """Return ``fc1`` or ``fc2`` if a product of these shapes is one of them, forward or backward, or else None."""
    sides = {side for shape in shapes[:2] if len(shape) >= 2 for side in shape[-2:]}
    if any(4 * dim in sides and sides & {dim, dim + 1} for dim in dims):  # with or without the column of the bias
        return "fc1"
    return "fc2" if any(dim in sides and sides & {2 * dim, 2 * dim + 1} for dim in dims) else None


def print_parts(variant: Variant, run: Callable[[], None], clip: Tensor, dtype: torch.dtype, step: bool) -> None:
    """Print work, floor, time and floor / time of each part of a model that ``run`` runs on ``clip``.

    Times are medians of three profiles.
    """
    peak, work = measured_peak(clip.device, dtype), minimum_work(variant, dtype, step, len(clip))
    run()
    rounds = [measure_parts(run, variant.dims, clip.device) for _ in range(3)]
    measured = {part: statistics.median(times[part] for times in rounds) for part in PARTS}
    best = f"{peak.flops / 1e9:.0f} GFLOP/s in a large product, {peak.bandwidth / 1e9:.0f} GB/s in a copy"
    print(f"\neager {dtype} {'step' if step else 'forward'}; best rates {best}")
    print(f"{'part':<14}{'GFLOP':>9}{'MB':>9}{'floor, ms':>11}{'ms':>9}{'floor/ms':>10}")
    for part in PARTS:
        print_part(part, work[part], work[part].floor_seconds(peak), measured[part])
    total = sum(work.values(), Work())
    print_part("all", total, total.floor_seconds(peak), sum(measured.values()))


def print_part(label: str, work: Work, floor: float, measured: float) -> None:
    """Print the line of one part; times are seconds."""
    share = f"{floor / measured:.0%}" if measured else "-"
    sizes = f"{work.flops / 1e9:>9.3g}{work.bytes / 1e6:>9.3g}"
    print(f"{label:<14}{sizes}{1e3 * floor:>11.2f}{1e3 * measured:>9.1f}{share:>10}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["s16", "s32", "b16", "b32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    this_device = {dtype: measured_peak(device, dtype) for dtype in H100}
    print(f"{device_name(device)}, {args.threads} threads; torch {torch.__version__}")
    for where, peaks in (("here, measured", this_device), ("H100, data sheet", H100)):
        for dtype, peak in peaks.items():
            print(f"{where}, {dtype}: {peak.flops / 1e12:.3g} TFLOP/s, {peak.bandwidth / 1e9:.0f} GB/s")
    print("\n| floor | GFLOP | MB bf16 | bf16 here, ms | bf16 H100, ms | MB fp32 | fp32 here, ms | fp32 H100, ms |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in args.models:
        for train in (False, True):
            cells = []
            for dtype in H100:
                work = sum(minimum_work(model_variant(name), dtype, train).values(), Work())
                cells.append(f"{work.bytes / 1e6:.0f}")
                cells += [f"{1e3 * work.floor_seconds(peaks[dtype]):.3g}" for peaks in (this_device, H100)]
            label = f"{name} {'step' if train else 'inference'}"
            print(f"| {label} | {work.flops / 1e9:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
