"""The measurements of ``benchmarks/gpu.py``. Each is a generator of rows: plain data, the first value names the row.

A row may come twice: the second replaces the first, which is there in case the time runs out.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from floors import H100, PARTS, DevicePeak, Work, measure_parts, measured_peak, minimum_work
from joint import run_block
from model import check_equal, in_eager_mode, make_pass, supports_nothing, without_fast_paths
from plain import PlainBlock, PlainModel, position_index
from torch import Tensor, nn

from posmlp.model import gpu
from posmlp.model.backbone import Block, to_windows
from posmlp.model.cost import TRAIN_FLOPS_PER_MAC, count_macs, device_name, peak_flops, peak_mb, seconds, wait
from posmlp.model.create import create_model
from posmlp.model.gates import PositionGate
from posmlp.model.spec import STAGES, UNITS, Variant, Window, model_variant, unit_window

HERE = Path(__file__).parent
Row = dict[str, Any]
Run = Callable[[], object]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Largest error of a gate, by type, as a multiple of the size that its element has at random (``gate_errors``). In bf16
# it is 13 times the type's epsilon, in fp32 840 times, as sums have up to half a million terms. TF32 exceeds it.
BOUNDS = {"fp32": 1e-4, "bf16": 1e-1}
MOST_ROUNDS, FEWEST_ROUNDS = 15, 3
FP8_LARGEST = 448.0  # of float8_e4m3fn
CHECKED_TOKENS = 4096  # of a product of fp8, against fp32, which takes twice the memory
PINNED_COPY = "copy from pinned memory"  # a row of the device's rates
LAUNCHES = "host alone, clips of 32 x 32"  # a row of the loop


class SkippedError(Exception):
    """A measurement does not apply to this device; the message says why."""


class Sizes(NamedTuple):
    """What is measured: models, clips of a step, clips at inference, clips in the check of the gates."""

    model: str
    gates: tuple[str, ...]
    clips: int
    served: tuple[int, int]
    checked: int


FULL = Sizes("s16", ("s16", "b16", "s32", "b32"), 16, (1, 32), 2)
TINY = Sizes("tiny", ("tiny",), 4, (1, 2), 1)


@dataclass(frozen=True)
class Job:
    """What a measurement needs to know.

    Attributes:
        device: the GPU, or the CPU in a test of these scripts.
        tiny: use the smallest sizes.
        end: when the measurement will be stopped, by ``time.monotonic()``.
        rows: the rows of the measurements before, by their names.
        kernels: whether the gates may use their kernels; False if those have failed.
    """

    device: torch.device
    tiny: bool = False
    end: float = math.inf
    rows: Mapping[str, list[Row]] = field(default_factory=dict)
    kernels: bool = True

    @property
    def sizes(self) -> Sizes:
        """The sizes to measure."""
        return TINY if self.tiny else FULL

    @property
    def clips(self) -> int:
        """Clips of a training step: as many as have fitted the memory."""
        return next((row["clips"] for row in self.rows.get("step", []) if "clips" in row), self.sizes.clips)

    def peak(self, dtype: torch.dtype) -> DevicePeak:
        """The best rates of this device, as measured before; without them those of an H100, from its data sheet."""
        for row in self.rows.get("device", []):
            if row.get("type") == NAMES[dtype]:
                return DevicePeak(1e12 * row["TFLOP/s"], 1e9 * row["GB/s"])
        return H100[dtype]

    def until(self, share: float) -> float:
        """The time at which a share of what is left will be used."""
        now = time.monotonic()
        return now + share * (min(self.end, now + 3600) - now)


def about(job: Job) -> Iterator[Row]:
    """Device, driver and versions: one row."""
    device = job.device
    if device.type == "cuda" and (torch.version.cuda is None or not torch.cuda.is_available()):
        raise SkippedError(f"no NVIDIA GPU that torch {torch.__version__} can use")
    found = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "commit": first_line("git", "rev-parse", "--short", "HEAD"),
    }
    if device.type == "cuda":
        torch.zeros(1, device=device).item()  # the GPU works in this process
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory GB": properties.total_memory / 1e9,
            "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "power limit": first_line("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "gates": "Triton kernels" if gpu.has_kernels(device) else "PyTorch",
        }
    yield found


def triton_version() -> str | None:
    """The version of Triton; None without it."""
    if not gpu.HAS_TRITON:
        return None
    import triton

    return str(triton.__version__)


def first_line(*command: str) -> str | None:
    """The first line that a command prints; None where it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, cwd=HERE)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.splitlines()), None)


def short(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


# Timing


def milliseconds(run: Run, calls: int, device: torch.device, lead: int = 0) -> float:
    """Milliseconds of a call, the mean of some in a row: by events on a GPU, which also count the time it waits.

    Before those are ``lead`` calls that do not count.
    """
    wait(device)
    for _ in range(lead):
        run()
    if device.type != "cuda":
        return 1e3 * seconds(lambda: [run() for _ in range(calls)], device) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def compare(
    runs: Mapping[str, Run], job: Job, share: float, span: float = 0.1, lead: int = 0
) -> Iterator[tuple[str, Row]]:
    """Time runs in turn, round by round, so that what changes over time affects all alike.

    Args:
        share: of the time left, for the rounds; there are at least ``FEWEST_ROUNDS`` of them.
        span: seconds of calls in a row, at least one call.
        lead: calls before those that do not count.

    Yields:
        The name of a run and what is known of it: first ``first call s`` and ``ms`` of the second call, or ``error``;
        after all rounds the medians ``ms``. The first call compiles.
    """
    calls: dict[str, int] = {}
    for name, run in runs.items():
        try:
            first, second = (seconds(run, job.device) for _ in range(2))
            calls[name] = 1 if job.tiny else max(1, min(1000, math.ceil(span / second)))
            yield name, {"first call s": first, "ms": 1e3 * second}
        except Exception as error:  # compilers raise many kinds
            yield name, {"error": short(error)}
        free_memory(job.device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    until, rounds, most = job.until(share), 0, FEWEST_ROUNDS if job.tiny else MOST_ROUNDS
    while calls and (rounds < FEWEST_ROUNDS or (rounds < most and time.monotonic() < until)):
        for name, count in calls.items():
            times[name].append(milliseconds(runs[name], count, job.device, lead))
        rounds += 1
    for name, values in times.items():
        yield name, {"ms": statistics.median(values), "rounds": rounds}


def medians(runs: Mapping[str, Run], job: Job, share: float) -> tuple[dict[str, float | None], dict[str, str]]:
    """The median milliseconds of each run, None if it fails, and the errors of those that do; as ``compare``."""
    found: dict[str, Row] = {name: {} for name in runs}
    for name, values in compare(runs, job, share):
        found[name] |= values
    errors = {name: values["error"] for name, values in found.items() if "error" in values}
    return {name: values.get("ms") for name, values in found.items()}, errors


def free_memory(device: torch.device) -> None:
    """Give cached memory back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Best rates of the device


def device_rates(job: Job) -> Iterator[Row]:
    """Rates of a large product and a large copy, and of a copy from the host's pinned memory."""
    for dtype, name in NAMES.items():
        if job.tiny:
            yield {"type": name, "TFLOP/s": H100[dtype].flops / 1e12, "GB/s": H100[dtype].bandwidth / 1e9}
            continue
        measured_peak(job.device, dtype)  # the clocks rise
        peak, sheet = measured_peak(job.device, dtype), peak_flops(job.device, name)
        yield {
            "type": name,
            "TFLOP/s": peak.flops / 1e12,
            "by data sheet": sheet and sheet / 1e12,
            "GB/s": peak.bandwidth / 1e9,
        }
    if job.device.type == "cuda":
        source, target = torch.empty(2**26, dtype=torch.uint8).pin_memory(), torch.empty(2**26, dtype=torch.uint8)
        target = target.to(job.device)
        copies = [milliseconds(lambda: target.copy_(source, non_blocking=True), 5, job.device) for _ in range(5)]
        yield {"type": PINNED_COPY, "GB/s": source.nbytes / min(copies) / 1e6}


# Gates


def gates(job: Job) -> Iterator[Row]:
    """Errors of each gate against fp64, forward and backward; joint windows come last, as they take longest."""
    done = set()
    for kind in UNITS:
        for name in job.sizes.gates:
            variant = model_variant(name)
            for stage in range(STAGES):
                window = unit_window(kind, variant.full_windows()[stage])
                if (same := (kind, window, variant.dims[stage], stage)) in done:
                    continue  # 32 frames have the spatial windows of 16
                done.add(same)
                yield check_gate(name, stage, kind, job)
                free_memory(job.device)


def check_gate(name: str, stage: int, kind: str, job: Job) -> Row:
    """Errors of the gate of a stage, from 0, with the kernels and with PyTorch's operators, in each type."""
    variant = model_variant(name)
    dim, groups, full = variant.dims[stage], variant.groups[stage], variant.full_windows()[stage]
    window, side = unit_window(kind, full), variant.image_size >> (stage + 2)
    windows = (variant.frames // full[0]) * (side // full[1]) * (side // full[2])
    paths = {"kernels": gpu.supports, "PyTorch": supports_nothing}
    if not gpu.has_kernels(job.device):
        del paths["kernels"]
    label = f"{name} stage {stage + 1}, {kind} {' x '.join(map(str, window))}"
    row: Row = {"gate": label, "channels": dim, "groups": groups}
    row |= {f"{path} {type_name}": None for path in paths for type_name in BOUNDS}
    row |= {"within bounds": True, "errors": {}, "by tensor": {}}
    for dtype, type_name in NAMES.items():
        torch.manual_seed(0)
        gate = PositionGate(groups, window).to(job.device)
        nn.init.normal_(gate.table)
        nn.init.normal_(gate.bias)
        hidden = random_signs(2 * dim, job.sizes.checked, windows, full, job.device, dtype)
        grad = random_signs(dim, job.sizes.checked, windows, full, job.device, dtype)
        for path, supports in paths.items():
            cell = f"{path} {type_name}"
            try:
                with mock.patch.object(gpu, "supports", supports):
                    found = gate_errors(gate, hidden, grad, full, kind)
            except Exception as error:  # a kernel that does not compile or run
                row["errors"][cell], row["within bounds"] = short(error), False
                continue
            row["by tensor"][cell], row[cell] = found, max(found.values())
            row["within bounds"] &= row[cell] <= BOUNDS[type_name]
    return row


def random_signs(
    channels: int, clips: int, windows: int, extent: Window, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Numbers of 0.5 to 1.5 with random signs, ``[channels, clips, windows, T, N]``: of one size, so errors are too."""
    x = torch.rand(channels, clips, windows, extent[0], extent[1] * extent[2], device=device) + 0.5
    return (x * (torch.randint(2, x.shape, device=device) * 2 - 1)).to(dtype)


def gate_errors(gate: PositionGate, hidden: Tensor, grad: Tensor, extent: Window, kind: str) -> dict[str, float]:
    """The largest error of the result and of each gradient.

    The size of an element is the root of the sum of its squared terms: what a sum of terms with random signs has. The
    error is relative to that.

    Args:
        hidden: u and v in one tensor, ``[2C, clips, windows, T, N]``.
        grad: gradient of the result, ``[C, clips, windows, T, N]``.
        extent: tokens of a window of the stage.
        kind: of the unit.
    """
    u, v = (half.detach().requires_grad_() for half in hidden.chunk(2))
    result = gate(u, v, extent)
    actual = [result.detach(), *torch.autograd.grad(result, (u, v, gate.table, gate.bias), grad)]
    groups, index = len(gate.table), pair_index(gate.window, u.device)
    inputs = [to_lines(x.detach().double(), groups, kind) for x in (u, v, grad)]
    parameters = [gate.table.detach().double(), gate.bias.detach().double()]
    exact = gate_in_fp64(*inputs, *parameters, index)
    sizes = gate_in_fp64(*(x.square() for x in (*inputs, *parameters)), index)
    found = {}
    for name, value, truth, size in zip(("result", "u", "v", "table", "bias"), actual, exact, sizes, strict=True):
        value = to_lines(value.double(), groups, kind) if value.ndim == 5 else value.double()
        found[name] = ((value - truth).abs() / size.sqrt()).nan_to_num(nan=math.inf).max().item()
    return found


@functools.cache
def pair_index(window: Window, device: torch.device) -> Tensor:
    """``position_index`` on the device; the one of a joint window takes long to make."""
    return position_index(window).to(device)


def to_lines(x: Tensor, groups: int, kind: str) -> Tensor:
    """Tokens that mix as rows of a matrix: ``[C, B, W, T, N]`` to ``[groups, L, columns]``."""
    axes = [4] * ("t" in UNITS[kind]) + [5] * ("h" in UNITS[kind])
    x = x.unflatten(0, (groups, -1)).movedim(axes, [*range(1, 1 + len(axes))])
    return x.flatten(1, len(axes)).flatten(2)


def gate_in_fp64(u: Tensor, v: Tensor, grad: Tensor, table: Tensor, bias: Tensor, index: Tensor) -> list[Tensor]:
    """The gate and its gradients by the formula, group by group: the map ``[L, L]`` is made and multiplied.

    Args:
        u, v, grad: ``[groups, L, columns]``.
        table: ``[groups, offsets]``.
        bias: ``[L]``.
        index: ``[L, L]``, the offset from each input token (axis 1) to each output token (axis 0).

    Returns:
        The result, and the gradients of u, v, table and bias.
    """
    result, d_u, d_v = (torch.empty_like(x) for x in (u, u, v))
    d_table, d_bias = torch.zeros_like(table), torch.zeros_like(bias)
    for s in range(len(table)):
        maps = table[s][index]
        mixed, d_mixed = maps @ u[s] + bias[:, None], grad[s] * v[s]
        result[s], d_v[s], d_u[s] = mixed * v[s], mixed * grad[s], maps.mT @ d_mixed
        d_table[s].index_add_(0, index.flatten(), (d_mixed @ u[s].mT).flatten())
        d_bias += d_mixed.sum(1)
    return [result, d_u, d_v, d_table, d_bias]


# Training steps


class Models(NamedTuple):
    """A model, the plain implementation with its weights, and clips with labels."""

    ours: nn.Module
    plain: nn.Module
    clip: Tensor
    labels: Tensor


def make_models(job: Job, clips: int) -> Models:
    """Fresh models and random clips on the device."""
    torch.manual_seed(0)
    variant = model_variant(job.sizes.model)
    ours = create_model(job.sizes.model).to(job.device)
    clip = random_clip(variant, clips, job.device)
    labels = torch.randint(variant.num_classes, (clips,), device=job.device)
    return Models(ours, PlainModel(ours).to(job.device), clip, labels)


def random_clip(variant: Variant, clips: int, device: torch.device) -> Tensor:
    """Normalised clips of noise, float32 ``[clips, 3, T, H, W]``."""
    return torch.randn(clips, 3, variant.frames, variant.image_size, variant.image_size, device=device)


def make_step(model: nn.Module, clip: Tensor, targets: Tensor) -> Run:
    """A training step under bf16 autocast: forward, cross entropy, backward, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(clip.device.type, torch.bfloat16):
            logits = model(clip)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    model.train()
    return step


def step(job: Job) -> Iterator[Row]:
    """A training step: the plain implementation, ours, and ours without its kernels."""
    clips, reason = job.sizes.clips, None
    while True:
        models = make_models(job, clips)
        try:
            make_step(models.plain, models.clip, models.labels)()  # it takes the most memory
            break
        except torch.OutOfMemoryError:
            reason = f"{clips} clips do not fit the memory"
            if clips == 1:
                raise
        del models
        free_memory(job.device)
        clips //= 2
    free_memory(job.device)
    try:
        check_equal(models.ours, models.plain, models.clip[:1])
    except Exception as error:
        yield {"step": "equal logits and gradients", "errors": {"plain / ours": short(error)}}
    ours = make_step(models.ours, models.clip, models.labels)
    runs = {"plain": make_step(models.plain, models.clip, models.labels), "ours": ours}
    if job.kernels and gpu.has_kernels(job.device):
        runs["ours, PyTorch gates"] = without_fast_paths(ours)
    yield from compared_steps(runs, job, clips, reason)


def compiled_step(job: Job) -> Iterator[Row]:
    """The same with the blocks of both compiled by ``torch.compile``."""
    models = make_models(job, job.clips)
    for model in (models.plain, models.ours):
        compile_blocks(model, job.device)
    plain, ours = (make_step(model, models.clip, models.labels) for model in (models.plain, models.ours))
    yield from compared_steps({"plain": plain, "ours": ours, "ours, eager": in_eager_mode(ours)}, job, job.clips)


def compiled_model_step(job: Job) -> Iterator[Row]:
    """The same with both models compiled as a whole."""
    models = make_models(job, job.clips)
    runs = {}
    for name, model in (("plain", models.plain), ("ours", models.ours)):
        model.compile(dynamic=False, backend=compiler(job.device))
        runs[name] = make_step(model, models.clip, models.labels)
    yield from compared_steps(runs, job, job.clips)


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Compile each block when it is called first; blocks of a stage share their code."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.modules():
        if isinstance(block, (PlainBlock, Block)):
            block.compile(dynamic=False, backend=compiler(device))


def compiler(device: torch.device) -> str:
    """Backend of ``torch.compile``. On a CPU these scripts are only tested, so nothing is compiled to machine code."""
    return "inductor" if device.type == "cuda" else "eager"


def compared_steps(runs: Mapping[str, Run], job: Job, clips: int, reason: str | None = None) -> Iterator[Row]:
    """Time steps in turn, measure their memory, and relate them to the best rates of the device."""
    variant, peak = model_variant(job.sizes.model), job.peak(torch.bfloat16)
    floor = sum(minimum_work(variant, torch.bfloat16, True, clips).values(), Work()).floor_seconds(peak)
    flops = TRAIN_FLOPS_PER_MAC * count_macs(variant) * clips
    rows: dict[str, Row] = {name: {"step": name, "clips": clips} for name in runs}
    for name, found in compare(runs, job, share=0.5):
        row = rows[name]
        if "error" in found:
            row["errors"] = {name: found["error"]}
        else:
            spent = found["ms"] / 1e3
            row |= found | {
                "clips/s": clips / spent,
                "MFU %": 100 * flops / spent / peak.flops,
                "floor ms": 1e3 * floor,
                "of the floor %": 100 * floor / spent,
            }
        if reason:
            row["note"] = reason
        yield row
    for name, row in rows.items():
        if "ms" in row:
            yield row | {"peak MB": peak_mb(runs[name], job.device)}


def parts_of_a_step(job: Job) -> Iterator[Row]:
    """Time of each part of our step next to its floor, from PyTorch's profiler."""
    models, variant = make_models(job, job.clips), model_variant(job.sizes.model)
    run = make_pass(models.ours, models.clip, torch.bfloat16, step=True)
    run()
    rounds = [measure_parts(run, variant.dims, job.device) for _ in range(1 if job.tiny else 3)]
    work, peak = minimum_work(variant, torch.bfloat16, True, job.clips), job.peak(torch.bfloat16)
    for part in PARTS:
        floor, spent = work[part].floor_seconds(peak), statistics.median(times[part] for times in rounds)
        row = {"part": part, "ms": 1e3 * spent, "floor ms": 1e3 * floor}
        yield row | {"of the floor %": 100 * floor / spent if spent else None}


# The training loop

# The values of the recipe k400_s16 that the loop reads. The recipe itself needs pydantic and PyYAML.
RECIPE: dict[str, dict[str, Any]] = {
    "data": {"repeats": 2, "modality": "rgb", "normalisation": "imagenet"},
    "augment": {
        "flip": 0.5,
        "flip_classes": {},
        "randaug_layers": 4,
        "randaug_magnitude": 7.0,
        "brightness": 0.0,
        "contrast": 0.0,
        "saturation": 0.0,
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
    "optim": {
        "lr": 2e-4,
        "min_lr": 1e-6,
        "lr_batch": 128,
        "schedule": "cosine",
        "warmup_epochs": 10.0,
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
        "label_smoothing": 0.1,
        "clip_grad": 20.0,
        "ema": None,
        "layer_decay": None,
        "freeze": None,
    },
    "train": {"epochs": 60, "precision": "bf16", "seed": 0},
}
DROP_PATH = 0.1  # of that recipe
CLIPS_TOGETHER = 4  # mixing needs pairs of videos, each of two clips
AHEAD = 2  # batches that are ready when a run of the loop begins; they would hide that batches come too slowly


def recipe(variant: Variant, clips: int) -> Any:
    """``RECIPE`` with the attributes of a ``posmlp.config.Config``, for one worker with a batch of ``clips``."""
    sections = {name: SimpleNamespace(**values) for name, values in RECIPE.items()}
    sections["train"].global_batch = clips
    model = SimpleNamespace(variant=lambda: variant)
    scaling = SimpleNamespace(micro_batch=None)
    return SimpleNamespace(task="recognition", model=model, scaling=scaling, clips_together=CLIPS_TOGETHER, **sections)


def loop(job: Job) -> Iterator[Row]:
    """The training loop: decoded clips in the host's memory, with the whole Kinetics augmentation.

    The bare step has its normalised batch on the device. Another step also augments the batch there. The loop's batches
    are pinned and copied two steps ahead (``posmlp.video.prefetch``). Both read a step's result when the next has
    started. A step of clips so small that the device has next to nothing to do shows the host's own time.
    """
    model = create_model(job.sizes.model, drop_path=DROP_PATH).to(job.device)
    yield from looped(model, job)


def compiled_loop(job: Job) -> Iterator[Row]:
    """The same with compiled blocks. Without drop path, whose rate would make each block a program of its own."""
    model = create_model(job.sizes.model).to(job.device)
    compile_blocks(model, job.device)
    yield from looped(model, job, small_clips=False)


def looped(model: nn.Module, job: Job, small_clips: bool = True) -> Iterator[Row]:
    """Time the loop of a model and its parts; ``small_clips``: also the host alone."""
    from posmlp.learn.learner import Learner, StartedStep  # these alone need NumPy
    from posmlp.video.augment import to_train_input
    from posmlp.video.batch import Batch
    from posmlp.video.prefetch import prefetch

    variant, device = model_variant(job.sizes.model), job.device
    clips = max(1, job.clips // CLIPS_TOGETHER) * CLIPS_TOGETHER
    torch.manual_seed(0)
    config = recipe(variant, clips)
    learner = Learner(model, config, steps_per_epoch=1000)

    def random_batch(side: int) -> Batch:
        pixels = torch.randint(256, (clips, variant.frames, side, side, 3), dtype=torch.uint8)
        return Batch(pixels, torch.randint(variant.num_classes, (clips,)), torch.ones(clips), new_seeds())

    def new_seeds() -> Tensor:
        return torch.randint(2**63 - 1, (clips,))

    def on_host() -> Iterator[Batch]:
        held = [random_batch(variant.image_size) for _ in range(4)]
        while True:
            for batch in held:
                yield replace(batch, seeds=new_seeds())

    started: list[StartedStep] = []

    def start(batch: Batch) -> None:
        """Start a step and read the result of the one before."""
        started.append(learner.start_step(batch))
        if len(started) > 1:
            started.pop(0).result()

    here = random_batch(variant.image_size).to(device)
    inputs, targets = to_train_input(here, config, torch.arange(variant.num_classes, device=device))
    ahead = prefetch(on_host(), device, AHEAD)
    runs: dict[str, Run] = {
        "bare step": make_step(model, inputs, targets),
        "loop": lambda: start(next(ahead)),
        "with the augmentation, batch on the device": lambda: start(replace(here, seeds=new_seeds())),
    }
    if small_clips:
        small = random_batch(32).to(device)
        runs[LAUNCHES] = lambda: start(replace(small, seeds=new_seeds()))
    rows: dict[str, Row] = {name: {"loop": name, "clips": clips} for name in runs}
    for name, found in compare(runs, job, share=0.8, span=1.0, lead=AHEAD):
        row = rows[name]
        if "error" in found:
            row["errors"] = {name: found["error"]}
        else:
            row |= found
            if name != LAUNCHES:
                share = ratio(rows["bare step"].get("ms"), found["ms"])
                row |= {"clips/s": 1e3 * clips / found["ms"], "of the bare step %": share and 100 * share}
        yield row


# Joint blocks


def joint(job: Job) -> Iterator[Row]:
    """A joint block of each stage against a parallel one, in bf16, and the sum over all blocks of the model."""
    variant, clips = model_variant(job.sizes.model), max(1, job.clips // 2)
    totals: dict[str, float | None] = {}
    for i, (depth, dim, groups, window) in enumerate(
        zip(variant.depths, variant.dims, variant.groups, variant.full_windows(), strict=True)
    ):
        side = variant.image_size >> (i + 2)
        tokens = to_windows(torch.randn(clips, dim, variant.frames, side, side, device=job.device), window)
        row: Row = {"blocks": f"{' x '.join(map(str, window))}, {dim} channels", "clips": clips, "errors": {}}
        for mode, with_step in (("forward", False), ("step", True)):
            runs = {}
            for kind in ("parallel", "joint"):
                block = Block(kind, dim, groups, window, 0.0).to(job.device)
                runs[f"{kind} {mode} ms"] = run_of(block, tokens, window, with_step)
            found, errors = medians(runs, job, share=0.1)
            row["errors"] |= errors
            row |= found | {f"joint / parallel {mode}": ratio(found[f"joint {mode} ms"], found[f"parallel {mode} ms"])}
            for name, value in found.items():
                before = totals.get(name, 0.0)
                totals[name] = None if value is None or before is None else before + depth * value
        yield row
        free_memory(job.device)
    row = {"blocks": f"all of {job.sizes.model}", "clips": clips}
    for mode in ("forward", "step"):
        row |= {name: value for name, value in totals.items() if mode in name}
        row[f"joint / parallel {mode}"] = ratio(totals[f"joint {mode} ms"], totals[f"parallel {mode} ms"])
    yield row


def run_of(block: nn.Module, tokens: Tensor, window: Window, step: bool) -> Run:
    """A run of a block on tokens in window order."""
    return lambda: run_block(block, tokens, (window, None), torch.bfloat16, step)


def ratio(a: float | None, b: float | None) -> float | None:
    """``a / b``; None if either is unknown."""
    return a / b if a and b else None


# Inference


def inference(job: Job) -> Iterator[Row]:
    """A forward pass of normalised clips: eager, with compiled blocks, and both replayed from a CUDA graph."""
    variant = model_variant(job.sizes.model)
    torch.manual_seed(0)
    eager = create_model(job.sizes.model).eval().to(job.device)
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled, job.device)
    few, many = job.sizes.served
    cases = [(many, torch.bfloat16), (few, torch.bfloat16), (few, torch.float32), (many, torch.float32)]
    if job.tiny:
        cases = cases[:2]
    for done, (clips, dtype) in enumerate(cases):
        torch._dynamo.reset()
        clip = random_clip(variant, clips, job.device)
        runs: dict[str, Run] = {
            "eager ms": make_forward(eager, clip, dtype),
            "compiled ms": make_forward(compiled, clip, dtype),
        }
        errors: dict[str, str] = {}
        if job.device.type == "cuda":
            for name, label in (("eager ms", "eager graph ms"), ("compiled ms", "compiled graph ms")):
                try:
                    runs[label] = captured(runs[name])
                except Exception as error:
                    errors[label] = short(error)
        found, failed = medians(runs, job, share=0.5 / (len(cases) - done))
        best = min((ms for ms in found.values() if ms), default=None)
        row: Row = {"inference": f"{NAMES[dtype]}, batch {clips}", **found}
        yield row | {"most clips/s": best and 1e3 * clips / best, "errors": errors | failed}
        del runs
        free_memory(job.device)


def make_forward(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> Run:
    """A forward pass without gradients; in bf16 under autocast."""

    def forward() -> Tensor:
        with torch.no_grad(), torch.autocast(clip.device.type, dtype, enabled=dtype != torch.float32):
            return model(clip)

    return forward


def captured(run: Run) -> Run:
    """Capture a run as a CUDA graph, after calls that compile and allocate; returns what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def fp8_products(job: Job) -> Iterator[Row]:
    """The linear layers of parallel blocks in fp8 against bf16, alone and with the conversion of their input.

    The products of fp8 want the channels of a token next to each other. The model stores a channel's tokens next to
    each other. So the conversion, with a scale that is known before, transposes as well.
    """
    if job.device.type == "cuda" and torch.cuda.get_device_capability(job.device) < (8, 9):
        raise SkippedError("products of fp8 need compute capability 8.9")
    variant, clips = model_variant(job.sizes.model), job.sizes.served[1]
    one = torch.ones((), device=job.device)
    convert = torch.compile(to_fp8, dynamic=False, backend=compiler(job.device))
    for i, dim in enumerate(variant.dims):
        tokens = clips * variant.frames * (variant.image_size >> (i + 2)) ** 2
        for layer, (outputs, inputs) in (("fc1", (4 * dim, dim)), ("fc2", (dim, 2 * dim))):
            row: Row = {"product": f"stage {i + 1} {layer}, {outputs} x {inputs} x {tokens}", "errors": {}}
            if outputs % 16 or inputs % 16:
                yield row | {"note": "fp8 needs multiples of 16"}
                continue
            torch.manual_seed(0)
            weight = torch.randn(outputs, inputs, device=job.device, dtype=torch.bfloat16)
            x = torch.randn(inputs, tokens, device=job.device, dtype=torch.bfloat16)
            weight8, x8 = to_fp8(weight.mT), to_fp8(x)

            def product(x8: Tensor, weight8: Tensor = weight8) -> Tensor:
                return torch._scaled_mm(weight8, x8.mT, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

            runs: dict[str, Run] = {
                "bf16 ms": lambda weight=weight, x=x: weight @ x,
                "fp8 ms": lambda product=product, x8=x8: product(x8),
                "fp8 with conversion ms": lambda product=product, x=x: product(convert(x)),
            }
            found, row["errors"] = medians(runs, job, share=0.1)
            if found["fp8 ms"]:
                truth = weight.float() @ x[:, :CHECKED_TOKENS].float()
                error = product(x8[:CHECKED_TOKENS]) - truth
                row["error %"] = 100 * (error.norm() / truth.norm()).item()
            gain = ratio(found["bf16 ms"], found["fp8 with conversion ms"])
            yield row | found | {"bf16 / fp8 with conversion": gain, "pays": gain and gain > 1}
            free_memory(job.device)


def to_fp8(x: Tensor) -> Tensor:
    """Transpose ``[a, b]`` and convert it to fp8: ``[b, a]``, contiguous."""
    return x.mT.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).contiguous()


# Name, measurement, and the largest share of the time left that it may take; the most important first.
MEASUREMENTS: dict[str, tuple[Callable[[Job], Iterator[Row]], float]] = {
    "device": (device_rates, 0.2),
    "gates": (gates, 0.4),
    "step": (step, 0.4),
    "compiled step": (compiled_step, 0.5),
    "loop": (loop, 0.5),
    "parts of a step": (parts_of_a_step, 0.3),
    "joint": (joint, 0.4),
    "inference": (inference, 0.7),
    "fp8": (fp8_products, 0.4),
    "compiled loop": (compiled_loop, 0.5),
    "compiled whole": (compiled_model_step, 1.0),
}
