"""Measure the latency and throughput of a model on the CPU: eager, compiled, and from its exported files.

The ONNX files run in ONNX Runtime, and in OpenVINO if it is installed (`pip install openvino`).

    python benchmarks/inference.py s16 [b16 tiny] [--repeats 7 --batches 1 2 4]

Weights are random. Clips are uint8 noise, and the time includes their normalisation. All runners run in turn, round by
round, so that other load on the machine affects all of them; the table has medians over the rounds. A runner that
fails is left out, and its error is printed.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import onnxruntime
import torch
from torch import Tensor

from posmlp import create_model
from posmlp.config import Config, load_recipe
from posmlp.export import Runner, export, load_exported
from posmlp.model.cost import device_name, seconds
from posmlp.video.augment import to_input

CPU = torch.device("cpu")


def in_bf16(run: Runner) -> Runner:
    """Return the runner under bf16 autocast."""

    def run_in_bf16(clips: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(clips)

    return run_in_bf16


def make_runners(config: Config, compiled: bool) -> dict[str, tuple[Runner, float | None]]:
    """Return functions that run the recipe's model, by name, each with the megabytes of its file or None."""
    model = create_model(config.model.name, **config.model.overrides()).eval()

    def eager(clips: Tensor) -> Tensor:
        with torch.no_grad():
            return model(to_input(clips, config))

    found: dict[str, tuple[Runner, float | None]] = {"eager fp32": (eager, None), "eager bf16": (in_bf16(eager), None)}
    if compiled:
        found["torch.compile fp32"] = torch.compile(eager, dynamic=False), None
        found["torch.compile bf16"] = torch.compile(in_bf16(eager), dynamic=False), None
    onnx_files: dict[bool, bytes] = {}
    for label, suffix, int8 in ((".pt2", ".pt2", False), ("ONNX Runtime", ".onnx", False), ("", ".onnx", True)):
        content = export(model, config, {}, suffix, int8=int8).content
        run = load_exported(content, suffix)
        found["ONNX Runtime int8" if int8 else f"{label} fp32"] = run, len(content) / 1e6
        if suffix == ".onnx":
            onnx_files[int8] = content
    return found | openvino_runners(onnx_files, torch.get_num_threads())


def openvino_runners(files: dict[bool, bytes], threads: int) -> dict[str, tuple[Runner, float | None]]:
    """Return functions that run ONNX files in OpenVINO, by name; none if it is not installed.

    Args:
        files: the content of the file, by whether its weights are int8.
        threads: of OpenVINO.
    """
    try:
        import openvino
    except ImportError:
        print("OpenVINO is not installed", file=sys.stderr)
        return {}

    def runner(content: bytes, precision: str) -> Runner:
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        options["PERFORMANCE_HINT"] = "LATENCY"
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", options)
        request = compiled.create_infer_request()

        def run(clips: Tensor) -> Tensor:
            found = request.infer({0: clips.numpy()}, share_inputs=True)
            return torch.from_numpy(found[compiled.output(0)].copy())

        return run

    found: dict[str, tuple[Runner, float | None]] = {}
    for label, int8, precision in (("fp32", False, "f32"), ("bf16", False, "bf16"), ("int8", True, "f32")):
        name = f"OpenVINO {openvino.__version__.split('-')[0]} {label}"
        try:
            found[name] = runner(files[int8], precision), len(files[int8]) / 1e6
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def random_clips(config: Config, batch: int) -> Tensor:
    """Return noise, uint8 ``[B, T, H, W, 3]``."""
    variant = config.model.variant()
    return torch.randint(256, (batch, variant.frames, variant.image_size, variant.image_size, 3), dtype=torch.uint8)


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
    print(
        f"{device_name(CPU)}, {args.threads} threads; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    print(f"medians of {args.repeats} interleaved rounds; best clips/s over the batches {args.batches}")
    for name in args.models:
        torch.manual_seed(0)
        config = load_recipe("demo" if name == "tiny" else f"k400_{name}")
        runners, start = make_runners(config, not args.no_compile), time.perf_counter()
        times: dict[str, dict[int, list[float]]] = {label: {} for label in runners}
        for batch in args.batches:
            clips = random_clips(config, batch)
            calls: dict[str, Callable[[], object]] = {}
            for label, (run, _) in runners.items():
                try:
                    run(clips)  # warm up, compile
                    calls[label], times[label][batch] = partial(run, clips), []
                except Exception as error:  # compilers raise many kinds
                    print(f"{label}, batch {batch}: {str(error).splitlines()[0]}", file=sys.stderr)
            for _ in range(args.repeats):
                for label, call in calls.items():
                    times[label][batch].append(seconds(call, CPU))
        print(f"\n| {name} | ms at batch {args.batches[0]} | best clips/s | at batch | file, MB |")
        print("|---|---:|---:|---:|---:|")
        for label, (_, megabytes) in runners.items():
            medians = {batch: statistics.median(values) for batch, values in times[label].items()}
            if not medians:
                continue
            latency = f"{1e3 * medians[args.batches[0]]:.0f}" if args.batches[0] in medians else "-"
            rate, best = max((batch / median, batch) for batch, median in medians.items())
            size = "-" if megabytes is None else f"{megabytes:.1f}"
            print(f"| {label} | {latency} | {rate:.2f} | {best} | {size} |", flush=True)
        print(f"\n({time.perf_counter() - start:.0f} s after the export)", flush=True)


if __name__ == "__main__":
    main()
