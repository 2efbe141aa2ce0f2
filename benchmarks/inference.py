"""Measure a model on the CPU: eager, compiled, and from its exported files in ONNX Runtime and OpenVINO.

    python benchmarks/inference.py s16 [b16 tiny] [--repeats 7 --batches 1 2 4]

Speed is that of a model with random weights on clips of noise, uint8, normalisation included. All runners run in turn,
round by round, so that other load on the machine affects all of them; a time is the best of the rounds. A pause before
each call lets the threads of the last runner, which wait actively for a while, go to sleep. Eager models are frozen
(``PosMLPVideo.freeze``; ``benchmarks/frozen.py`` measures what that gains).

Accuracy is that of the package's weights (``posmlp/weights``) in each runner, on drawn strokes that they were not
trained on: how many clips have the class that eager fp32 finds, the largest difference of a probability from it, and
top-1. "int8, calibrated" has the ranges of activations from clips of the training split (for the speed: from noise).

OpenVINO is left out if it is not installed (``pip install -c constraints.txt -e '.[benchmarks]'``). A runner
that fails is left out, and its error is printed.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from safetensors import safe_open
from torch import Tensor

from posmlp import create_model, load_published
from posmlp.config import Config, load_recipe
from posmlp.export import Runner, export, load_exported, quantise, silence_exporters
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.cost import device_name, seconds
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_split
from posmlp.video.motion import make_motion_set
from posmlp.weights import packaged_file

try:
    import openvino
except ImportError:
    openvino = None

CPU = torch.device("cpu")
PAUSE = 0.05  # seconds
CALIBRATION_CLIPS, TEST_CLIPS = 84, 210  # two and five of each class
PACKAGED = packaged_file("posmlp:motion")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


class Candidate(NamedTuple):
    """A way to run a model, and the megabytes of its file if it needs one."""

    run: Runner
    megabytes: float | None = None


class Accuracy(NamedTuple):
    """Share of clips with the class of eager fp32, largest difference of a probability from it, and top-1."""

    same: float
    difference: float
    top1: float


def cpu_features() -> str:
    """Return those of the processor's features that decide on the speed of bf16 and int8 products."""
    file = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", file.read_text())) if file.exists() else set()
    return ", ".join(feature for feature in FEATURES if feature in flags) or "features unknown"


def in_bf16(run: Runner) -> Runner:
    """Return the runner under bf16 autocast."""

    def run_in_bf16(clips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(clips)

    return run_in_bf16


def make_candidates(
    model: PosMLPVideo, config: Config, calibration: Tensor, compiled: bool
) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    """Yield the name of each way to run a model, and what makes it.

    Args:
        calibration: uint8 ``[clips, T, H, W, 3]``.
        compiled: whether to compile with ``torch.compile``.
    """
    whole = export(model, config, {}, ".onnx").content
    model = model.freeze()

    def eager(clips: Tensor) -> Tensor:
        with torch.no_grad():
            return model(to_input(clips, config))

    def in_file(content: bytes, suffix: str = ".onnx") -> Candidate:
        return Candidate(load_exported(content, suffix), len(content) / 1e6)

    yield "eager fp32", lambda: Candidate(eager)
    yield "eager bf16", lambda: Candidate(in_bf16(eager))
    if compiled:
        yield "torch.compile fp32", lambda: Candidate(torch.compile(eager, dynamic=False))
        yield "torch.compile bf16", lambda: Candidate(torch.compile(in_bf16(eager), dynamic=False))
    yield ".pt2 fp32", lambda: in_file(export(model, config, {}, ".pt2").content, ".pt2")
    yield "ONNX Runtime fp32", lambda: in_file(whole)
    yield "ONNX Runtime int8 (`posmlp export --int8`)", lambda: in_file(quantise_dynamic(whole))
    calibrated = quantise_static(whole, calibration)
    yield "ONNX Runtime int8, calibrated", lambda: in_file(calibrated)
    if openvino is not None:
        yield "OpenVINO fp32", lambda: in_openvino(whole, "f32")
        yield "OpenVINO bf16", lambda: in_openvino(whole, "bf16")
        yield "OpenVINO int8, calibrated", lambda: in_openvino(calibrated, "f32")
        yield "OpenVINO int8, calibrated, the rest bf16", lambda: in_openvino(calibrated, "bf16")


def quantise_dynamic(content: bytes) -> bytes:
    """Return an ONNX model as ``posmlp export --int8`` writes it."""
    with silence_exporters():
        return quantise(onnx.load_from_string(content)).SerializeToString()


def quantise_static(content: bytes, clips: Tensor) -> bytes:
    """Return an ONNX model whose convolutions and matrix products take 8-bit integers, with ranges from clips."""

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(clips.split(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            clip = next(self.left, None)
            return None if clip is None else {"clips": clip.numpy()}

    with tempfile.TemporaryDirectory() as folder, silence_exporters():
        simple, quantised = (str(Path(folder, name)) for name in ("simple.onnx", "quantised.onnx"))
        options = onnxruntime.SessionOptions()  # constants are folded first: quantisation needs weights as constants
        options.optimized_model_filepath = simple
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        kinds = ["MatMul", "Conv"]
        quantize_static(simple, quantised, Reader(), QuantFormat.QDQ, op_types_to_quantize=kinds, per_channel=True)
        return Path(quantised).read_bytes()


def in_openvino(content: bytes, precision: str) -> Candidate:
    """Load an ONNX model in OpenVINO; ``precision`` is that of what is not quantised, ``f32`` or ``bf16``."""
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(io.BytesIO(content)), "CPU", options | {"PERFORMANCE_HINT": "LATENCY"}
    )
    request = compiled.create_infer_request()

    def run(clips: Tensor) -> Tensor:
        found = request.infer({0: clips.numpy()}, share_inputs=True)
        return torch.from_numpy(found[compiled.output(0)].copy())

    return Candidate(run, len(content) / 1e6)


def call(label: str, what: Callable[[], Any]) -> Any:
    """Return the result, or print the error and return None. Compilers raise many kinds of errors."""
    try:
        return what()
    except Exception as error:
        print(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def random_clips(config: Config, batch: int) -> Tensor:
    """Return noise, uint8 ``[B, T, H, W, 3]``."""
    variant = config.model.variant()
    return torch.randint(256, (batch, variant.frames, variant.image_size, variant.image_size, 3), dtype=torch.uint8)


def stroke_clips(config: Config, split: str) -> tuple[Tensor, Tensor]:
    """Return the clips of a split, uint8 ``[clips, T, H, W, 3]``, and their labels."""
    rows = read_split(config.data, split).rows.to_pylist()
    clips = [load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False)[0] for row in rows]
    return torch.from_numpy(np.concatenate(clips)), torch.tensor([row["label"] for row in rows])


def measure_accuracy(compiled: bool) -> dict[str, Accuracy]:
    """Return the accuracy of the package's weights in each runner, by name."""
    with safe_open(PACKAGED, "pt") as file:
        section = json.loads(file.metadata()["model"])
    with tempfile.TemporaryDirectory() as folder:
        drawn = make_motion_set(Path(folder, "strokes"), kind="strokes", train=CALIBRATION_CLIPS, val=TEST_CLIPS)
        overrides = [f"data.{split}.path={drawn / split}.csv" for split in ("train", "val")]
        overrides += ["data.full_frame=false", "data.short_side=64", "data.cache_dir=null", "model.weights=null"]
        config = load_recipe("small_data", [*overrides, f"model.num_classes={section['num_classes']}"])
        (calibration, _), (clips, labels) = stroke_clips(config, "train"), stroke_clips(config, "val")
    model = create_model(config.model.name, **config.model.overrides())
    load_published(model, PACKAGED)
    exact, found = None, {}
    for label, make in make_candidates(model.eval(), config, calibration, compiled):
        candidate = call(label, make)
        logits = candidate and call(label, lambda run=candidate.run: torch.cat([run(clip) for clip in clips.split(1)]))
        if logits is None:
            continue
        exact = logits if exact is None else exact
        same, top1 = ((logits.argmax(1) == other).double().mean().item() for other in (exact.argmax(1), labels))
        found[label] = Accuracy(same, (logits.softmax(1) - exact.softmax(1)).abs().max().item(), top1)
    return found


def measure_speed(
    candidates: dict[str, Candidate], config: Config, batches: list[int], repeats: int
) -> dict[str, dict[int, float]]:
    """Return the best seconds of each candidate by batch size; the candidates run in turn."""
    best: dict[str, dict[int, float]] = {label: {} for label in candidates}
    for batch in batches:
        clips = random_clips(config, batch)
        running = [label for label, each in candidates.items() if call(label, partial(each.run, clips)) is not None]
        for _ in range(repeats):
            for label in running:
                time.sleep(PAUSE)
                took = seconds(partial(candidates[label].run, clips), CPU)
                best[label][batch] = min(took, best[label].get(batch, took))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["s16"], help="tiny, s16 or b16 (default: s16)")
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="batch sizes (default: 1 2 4); the latency is that of the first",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes per row"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    versions += ", no OpenVINO" if openvino is None else f", openvino {openvino.__version__.split('-')[0]}"
    print(f"{device_name(CPU)} ({cpu_features()}), {args.threads} threads; {versions}")
    print(f"best of {args.repeats} interleaved rounds; best clips/s over the batches {args.batches}")
    accuracies = measure_accuracy(not args.no_compile)
    for name in args.models:
        torch.manual_seed(0)
        config = load_recipe("demo" if name == "tiny" else f"k400_{name}")
        model = create_model(config.model.name, **config.model.overrides()).eval()
        made = {
            label: call(label, make)
            for label, make in make_candidates(model, config, random_clips(config, 4), not args.no_compile)
        }
        candidates = {label: candidate for label, candidate in made.items() if candidate}
        best = measure_speed(candidates, config, args.batches, args.repeats)
        print(f"\n| {name} | ms at batch {args.batches[0]} | best clips/s | at batch | file, MB", end="")
        print(" | same class as fp32 | largest difference of a probability | top-1 |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for label, times in best.items():
            if not times:
                continue
            first = args.batches[0]
            latency = f"{1e3 * times[first]:.0f}" if first in times else "-"
            rate, batch = max((batch / took, batch) for batch, took in times.items())
            megabytes, accuracy = candidates[label].megabytes, accuracies.get(label)
            size = "-" if megabytes is None else f"{megabytes:.1f}"
            cells = (
                f"{accuracy.same:.1%} | {accuracy.difference:.4f} | {accuracy.top1:.1%}" if accuracy else "- | - | -"
            )
            print(f"| {label} | {latency} | {rate:.2f} | {batch} | {size} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
