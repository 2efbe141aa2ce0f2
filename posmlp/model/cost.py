"""Cost of a model: parameters, multiply-accumulates, latency, throughput and memory.

``count_macs`` is a closed form of the plain data, so a search can call it for thousands of candidates without building
them. ``measure`` times a given model. ``cost`` does everything for a named model.
"""

from __future__ import annotations

import ctypes
import math
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posmlp.metrics import COST_CLIPS_PER_S, COST_GMACS, COST_LATENCY_MS, COST_PARAMS_M, COST_PEAK_MB
from posmlp.model.backbone import grid
from posmlp.model.create import create_model
from posmlp.model.gates import map_window
from posmlp.model.spec import Variant, Window, block_units, model_variant, unit_window

# Operations (FLOP) for each multiply-accumulate of a forward pass. A training step costs three forward passes: the
# backward pass has two matrix products for each one of the forward pass.
EVAL_FLOPS_PER_MAC = 2
TRAIN_FLOPS_PER_MAC = 3 * EVAL_FLOPS_PER_MAC


@dataclass(frozen=True)
class Measurement:
    """Result of ``measure``.

    Attributes:
        latency_ms: median milliseconds of a forward pass of one clip.
        clips_per_s: clips per second at the given batch size.
        peak_mb: peak megabytes (1e6 bytes) of a forward pass at that batch size, without the weights and the clips;
            None where the system does not report it.
    """

    latency_ms: float
    clips_per_s: float
    peak_mb: float | None


@dataclass(frozen=True)
class Cost:
    """Cost of a named model on one device. Plain data: ``dataclasses.asdict`` gives JSON-compatible values.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates per clip.
        latency_ms, clips_per_s, peak_mb: as in ``Measurement``.
        device: human-readable name of the device.
        threads: CPU threads that PyTorch used.
        batch: batch size of ``clips_per_s`` and ``peak_mb``.
        frames, image_size: a clip is ``[3, frames, image_size, image_size]``.
        name: the model, one of ``posmlp.list_models()``.
    """

    params: int
    macs: int
    latency_ms: float
    clips_per_s: float
    peak_mb: float | None
    device: str
    threads: int
    batch: int
    frames: int
    image_size: int
    name: str

    def metrics(self) -> dict[str, float]:
        """The numbers by metric name; a number that could not be measured is left out."""
        values = {
            COST_PARAMS_M: self.params / 1e6,
            COST_GMACS: self.macs / 1e9,
            COST_LATENCY_MS: self.latency_ms,
            COST_CLIPS_PER_S: self.clips_per_s,
            COST_PEAK_MB: self.peak_mb,
        }
        return {key: value for key, value in values.items() if value is not None}


def cost(
    name: str,
    *,
    batch: int = 1,
    repeats: int = 5,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> Cost:
    """Build a model with fresh weights and measure it in fp32, on clips of its variant's size.

    Args:
        name, overrides: as for ``create_model``; the overrides ``frames`` and ``image_size`` set the clip's size.
        batch, repeats: as for ``measure``.
        device: device to measure on; None: the first CUDA device if there is one, otherwise the CPU.

    Raises:
        ValueError: as for ``create_model`` and ``measure``.
    """
    variant = model_variant(name, **overrides)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay the same
        model = create_model(name, **overrides).to(device)
    measured = measure(model, (3, variant.frames, variant.image_size, variant.image_size), repeats=repeats, batch=batch)
    return Cost(
        params=count_params(model),
        macs=count_macs(variant),
        latency_ms=measured.latency_ms,
        clips_per_s=measured.clips_per_s,
        peak_mb=measured.peak_mb,
        device=device_name(device),
        threads=torch.get_num_threads(),
        batch=batch,
        frames=variant.frames,
        image_size=variant.image_size,
        name=name,
    )


def format_cost(cost: Cost) -> str:
    """Format a cost as a table for people, one line per number."""
    device = cost.device + (f", {cost.threads} threads" if cost.threads > 1 else ", 1 thread")
    rows = [
        ("model", f"{cost.name}, {cost.frames} frames of {cost.image_size} x {cost.image_size}"),
        ("device", device),
        ("parameters", f"{cost.params / 1e6:.4g} M"),
        ("arithmetic", f"{cost.macs / 1e9:.4g} GMACs per clip"),
        ("latency", f"{cost.latency_ms:.1f} ms at batch 1"),
        ("throughput", f"{cost.clips_per_s:.2f} clips/s at batch {cost.batch}"),
    ]
    if cost.peak_mb is not None:
        rows.append(("peak memory", f"{cost.peak_mb:.0f} MB at batch {cost.batch}, weights and clips not counted"))
    return "\n".join(f"{label:<13}{value}" for label, value in rows)


def count_params(model: nn.Module) -> int:
    """Number of parameters, trainable or frozen; a shared parameter counts once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(variant: Variant, frames: int | None = None, size: int | tuple[int, int] | None = None) -> int:
    """Multiply-accumulates of one clip: convolutions, linear layers and gates as computed, padding included.

    As usual, elementwise work (norms, GELU, the product with v) is not counted.

    Args:
        variant: from ``model_variant``, which checks it.
        frames, size: clip length and image size (a number or (height, width)); None: those of the variant.
    """
    size = size or variant.image_size
    height, width = (size, size) if isinstance(size, int) else size
    frames = frames or variant.frames
    blocks = (variant.blocks,) * len(variant.dims) if isinstance(variant.blocks, str) else variant.blocks

    def conv(dim_in: int, dim: int, stride: int = 2) -> int:
        """Count a convolution (1,3,3) with a stride in space, and set height and width to those of its output."""
        nonlocal height, width
        height, width = -(-height // stride), -(-width // stride)
        return 9 * dim_in * dim * frames * height * width

    macs = conv(3, variant.dims[0] // 2) + conv(variant.dims[0] // 2, variant.dims[0])
    for i, (dim, depth, groups, window, block) in enumerate(
        zip(variant.dims, variant.depths, variant.groups, variant.full_windows(), blocks, strict=True)
    ):
        if i:
            macs += conv(variant.dims[i - 1], dim, variant.stage4_stride // 16 if i == 3 else 2)
        t, h, w = window
        extent = min(t, frames), min(h, height), min(w, width)  # as in Stage: a small input fills part of a window
        tokens = math.prod(extent) * math.prod(grid((frames, height, width), extent))
        for kind in block_units(block):
            gate = gate_macs(unit_window(kind, window), extent, dim, groups, tokens)
            macs += depth * (tokens * dim * 3 * dim + gate)  # fc1 and fc2, gate
    return macs + variant.dims[-1] * variant.num_classes


def gate_macs(window: Window, extent: Window, dim: int, groups: int, tokens: int) -> int:
    """Multiply-accumulates of a unit's gate, as ``PositionGate`` computes it.

    Args:
        window: the unit's, from ``unit_window``.
        extent: tokens along time, height, width that a window of the input has.
        dim, groups, tokens: channels, channel groups, and tokens of the stage's input, padding included.
    """
    window = map_window(window, extent)
    t, h, w = (min(n, m) for n, m in zip(window, extent, strict=True))
    if window[0] == 1 or window[1:] == (1, 1):
        return tokens * dim * t * h * w  # each token is a sum over its window
    components = 2 * t - 1  # of joint_product: spatial products, two transforms of the tokens, one of the tables
    return (
        dim * tokens * (4 * t - 3) * h * w // t
        + 2 * dim * tokens * components
        + groups * components**2 * (2 * h - 1) * (2 * w - 1)
    )


def measure(model: nn.Module, clip_shape: tuple[int, ...], *, repeats: int = 5, batch: int = 1) -> Measurement:
    """Time the forward pass of a model in eval mode, without gradients, on the model's device and in its dtype.

    Args:
        model: takes clips ``[B, *clip_shape]``. The training mode of each module is restored afterwards.
        clip_shape: shape of one clip, ``(3, T, H, W)``.
        repeats: number of timed passes, whose median is returned; two passes before them are for warm-up.
        batch: batch size for throughput and memory.

    Raises:
        ValueError: ``repeats`` or ``batch`` is less than 1.
    """
    if repeats < 1 or batch < 1:
        raise ValueError(f"repeats and batch must be at least 1, got {repeats} and {batch}")
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)  # leaves the global random state alone
    clips = torch.randn(batch, *clip_shape, generator=generator).to(weight)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            latency = median_seconds(lambda: model(clips[:1]), weight.device, repeats)
            batch_seconds = latency if batch == 1 else median_seconds(lambda: model(clips), weight.device, repeats)
            peak = peak_mb(lambda: model(clips), weight.device)
    finally:
        for module, mode in modes:
            module.training = mode
    return Measurement(latency_ms=1e3 * latency, clips_per_s=batch / batch_seconds, peak_mb=peak)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of ``repeats`` calls, after two calls that warm up caches, allocators and kernel choices."""
    return statistics.median([seconds(run, device) for _ in range(2 + repeats)][2:])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including all work that it queues on the device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work; nothing to do on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak megabytes (1e6 bytes) during a call on top of those before it; None where the system does not report it.

    On CUDA this is the memory of tensors. On Linux CPUs it is the growth of the process's resident size, so it is right
    only while nothing else in the process allocates.
    """
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    # glibc keeps freed memory, and reusing it would not show in the resident size: return it to the system first.
    if not (trim_heap() and reset_resident_peak()):
        return None
    before = resident_peak()
    run()
    return (resident_peak() - before) / 1e6


def trim_heap() -> bool:
    """Return freed memory to the system. False: this C library cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return False
    return True


def reset_resident_peak() -> bool:
    """Set the peak resident size of this process (VmHWM, ``ru_maxrss``) to its current size. False: it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or a kernel or sandbox without this reset
        return False
    return True


def resident_peak() -> int:
    """Peak resident bytes of this process since the last reset (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


# Dense matrix products in half precision, FLOP/s, from the vendors' data sheets (half of the figure "with sparsity").
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "T4": 65e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device; None where it is not known (CPUs, fp32)."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def device_name(device: torch.device) -> str:
    """Human-readable name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
