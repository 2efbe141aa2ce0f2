"""Measure the time and memory of the model and of a plain PyTorch implementation (``benchmarks/plain.py``).

    python benchmarks/model.py --model s16 --batch 1 --repeats 9 [--no-compile] [--record]

Both models have the same parameters. The script first checks that their logits and gradients are equal. Then it times
them in turn, round by round, in one process, so that other load on the machine affects both. A third column times the
reference: the model without the fast paths of ``posmlp/model/cpu.py`` and ``posmlp/model/gpu.py``. It shows what the
memory layout gains alone. With compiled blocks, the third column is the model in eager mode.

Eager runs are also split into parts, each next to its floor (``benchmarks/floors.py``). Ratios are compared with the
recorded ones (``benchmarks/ratios.py``).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable

import torch
from floors import print_parts
from plain import PlainBlock, PlainModel
from ratios import record_or_compare
from torch import Tensor, nn
from torch._inductor.exc import InductorError

import posmlp
from posmlp.model import cpu, gpu
from posmlp.model.backbone import Block
from posmlp.model.cost import device_name, peak_mb, seconds
from posmlp.model.spec import model_variant


def check_equal(ours: nn.Module, plain: nn.Module, clip: Tensor) -> None:
    """Fail unless both models have the same logits and the same gradient of the stem (fp32, up to rounding)."""
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions of GPUs round to TF32 otherwise
        for model in (ours, plain):
            logits = model.eval()(clip)
            weight = next(ours.parameters())  # shared by both
            results.append((logits.detach(), torch.autograd.grad(logits.square().sum(), weight)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def make_pass(model: nn.Module, clip: Tensor, dtype: torch.dtype, step: bool) -> Callable[[], None]:
    """Return a function that runs one forward pass in eval mode, or one training step (forward and backward)."""

    def run() -> None:
        model.train(step)
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(step), torch.autocast(clip.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(clip).float().square().mean()
        if step:
            loss.backward()

    return run


def supports_nothing(*_: Tensor) -> bool:
    """Replace ``supports``. One function for all calls, because the compiler's cache is bound to it."""
    return False


def without_fast_paths(run: Callable[[], None]) -> Callable[[], None]:
    """Return the run without the fast paths for CPUs and GPUs."""

    def run_reference() -> None:
        supports = cpu.supports, gpu.supports
        cpu.supports, gpu.supports = supports_nothing, supports_nothing
        try:
            run()
        finally:
            cpu.supports, gpu.supports = supports

    return run_reference


def in_eager_mode(run: Callable[[], None]) -> Callable[[], None]:
    """Return the run as if nothing were compiled."""

    def run_eagerly() -> None:
        with torch.compiler.set_stance("force_eager"):
            run()

    return run_eagerly


def interleaved_medians(runs: list[Callable[[], None]], device: torch.device, repeats: int) -> list[float]:
    """Return the median milliseconds of each run; NaN if it does not compile.

    Each run is called twice to warm up. Then the runs are timed in turn.
    """
    medians = [math.nan] * len(runs)
    times: dict[int, list[float]] = {}
    for i, run in enumerate(runs):
        try:
            run()
            run()
            times[i] = []
        except InductorError as error:
            print(f"PyTorch's compiler failed: {str(error).splitlines()[0]}", file=sys.stderr)
    for _ in range(repeats):
        for i, collected in times.items():
            collected.append(1e3 * seconds(runs[i], device))
    for i, collected in times.items():
        medians[i] = statistics.median(collected)
    return medians


def print_header(title: str, third: str) -> None:
    """Print the labels of a table's columns."""
    labels = ("plain", "ours", "plain/ours", third, f"plain/{third}", "plain, MB", "ours, MB")
    print(f"{title:<24}{''.join(f'{label:>16}' for label in labels)}")


def print_comparison(label: str, runs: list[Callable[[], None]], device: torch.device, repeats: int) -> float:
    """Time the plain model, ours and a third run in turn. Returns plain / ours."""
    plain, ours, third = interleaved_medians(runs, device, repeats)
    memory = [
        math.nan if math.isnan(ms) else peak_mb(run, device) for run, ms in zip(runs, (plain, ours), strict=False)
    ]
    cells = [f"{plain:.1f}", f"{ours:.1f}", f"{plain / ours:.2f}x", f"{third:.1f}", f"{plain / third:.2f}x"]
    cells += ["" if mb is None else f"{mb:.0f}" for mb in memory]
    print(f"{label:<24}{''.join(f'{cell:>16}' for cell in cells)}", flush=True)
    return plain / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--no-compile", action="store_true", help="eager mode only; compiling the blocks takes minutes per row"
    )
    parser.add_argument("--forward-only", action="store_true", help="leave out training steps")
    parser.add_argument("--record", action="store_true", help="store the ratios, for comparison with later runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    variant = model_variant(args.model)
    clip = torch.randn(args.batch, 3, variant.frames, variant.image_size, variant.image_size, device=device)
    ours = posmlp.create_model(args.model).to(device)
    plain = PlainModel(ours).to(device)
    check_equal(ours, plain, clip)
    steps = (False,) if args.forward_only else (False, True)
    kinds = [(dtype, step) for dtype in (torch.float32, torch.bfloat16) for step in steps]
    ratios = {}

    print(f"{args.model}, batch {args.batch}; {device_name(device)}, {args.threads} threads; torch {torch.__version__}")
    print(
        f"ms, medians of {args.repeats} rounds; a step is forward and backward; MB: peak on top of weights and clip\n"
    )
    print_header("eager", "reference")
    for dtype, step in kinds:
        runs = [make_pass(model, clip, dtype, step) for model in (plain, ours)]
        label = f"{dtype} {'step' if step else 'forward'}".removeprefix("torch.")
        ratios[label] = print_comparison(label, [*runs, without_fast_paths(runs[1])], device, args.repeats)
    for dtype, step in kinds:
        print_parts(variant, make_pass(ours, clip, dtype, step), clip, dtype, step)
    if not args.no_compile:
        print()
        print_header("blocks compiled", "eager")
        for dtype, step in kinds:
            torch._dynamo.reset()
            for model in (plain, ours):
                for block in model.modules():
                    if isinstance(block, (PlainBlock, Block)):
                        block.compile(dynamic=False)
            runs = [make_pass(model, clip, dtype, step) for model in (plain, ours)]
            label = f"{dtype} {'step' if step else 'forward'}, compiled".removeprefix("torch.")
            ratios[label] = print_comparison(label, [*runs, in_eager_mode(runs[1])], device, args.repeats)
    record_or_compare(
        f"{args.model}, batch {args.batch}, {device_name(device)}, {args.threads} threads", ratios, args.record
    )


if __name__ == "__main__":
    main()
