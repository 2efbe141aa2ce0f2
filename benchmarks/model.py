"""How fast the model is against the same model written the plain way (``benchmarks/plain.py``).

    python benchmarks/model.py --model s16 --batch 1 --repeats 9 [--no-compile] [--record]

Both have the same parameters and give the same logits and gradients, which is checked first. Then one process times
them in turn, round by round, so that whatever else the machine does meets both alike. The model runs a third time as
its reference, without ``posmlp/model/cpu.py`` and ``posmlp/model/gpu.py``: what is gained there is the layout's, the
rest is that of those files; where blocks are compiled, a third time in eager mode. Eager runs are taken apart, each
part beside its floor (``benchmarks/floors.py``), and ratios are compared with those last recorded
(``benchmarks/guard.py``).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable

import torch
from floors import print_parts
from guard import finish
from plain import PlainBlock, PlainModel
from torch import Tensor, nn
from torch._inductor.exc import InductorError

import posmlp
from posmlp.model import cpu, gpu
from posmlp.model.backbone import Block
from posmlp.model.cost import device_name, peak_mb, seconds
from posmlp.model.spec import model_variant


def check_equal(ours: nn.Module, plain: nn.Module, clip: Tensor) -> None:
    """Fail unless both give the same logits and the same gradient of the stem (fp32, to rounding)."""
    results = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions of GPUs round to TF32 otherwise
        for model in (ours, plain):
            logits = model.eval()(clip)
            weight = next(ours.parameters())  # shared by both
            results.append((logits.detach(), torch.autograd.grad(logits.square().sum(), weight)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def passes(model: nn.Module, clip: Tensor, dtype: torch.dtype, step: bool) -> Callable[[], None]:
    """A function that runs one forward pass in eval mode, or one training step (forward and backward)."""

    def run() -> None:
        model.train(step)
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(step), torch.autocast(clip.device.type, dtype, enabled=dtype != torch.float32):
            loss = model(clip).float().square().mean()
        if step:
            loss.backward()

    return run


def none(*_: Tensor) -> bool:
    """Serves nothing; one function for all calls, so that what was compiled with it is found again."""
    return False


def as_reference(run: Callable[[], None]) -> Callable[[], None]:
    """The same without the fast paths for CPUs and GPUs."""

    def run_reference() -> None:
        serve = cpu.serves, gpu.serves
        cpu.serves, gpu.serves = none, none
        try:
            run()
        finally:
            cpu.serves, gpu.serves = serve

    return run_reference


def eagerly(run: Callable[[], None]) -> Callable[[], None]:
    """The same as if nothing were compiled."""

    def run_eagerly() -> None:
        with torch.compiler.set_stance("force_eager"):
            run()

    return run_eagerly


def interleaved(runs: list[Callable[[], None]], device: torch.device, repeats: int) -> list[float]:
    """Median milliseconds of each, timed in turn after two calls that warm up; NaN for one that does not compile."""
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


def print_head(title: str, third: str) -> None:
    labels = ("plain", "ours", "plain/ours", third, "plain/that", "plain, MB", "ours, MB")
    print(f"{title:<24}{''.join(f'{label:>12}' for label in labels)}")


def print_row(label: str, runs: list[Callable[[], None]], device: torch.device, repeats: int) -> float:
    """Time plain, ours and a third way in turn; returns plain / ours."""
    plain, ours, third = interleaved(runs, device, repeats)
    memory = [
        math.nan if math.isnan(ms) else peak_mb(run, device) for run, ms in zip(runs, (plain, ours), strict=False)
    ]
    cells = [f"{plain:.1f}", f"{ours:.1f}", f"{plain / ours:.2f}x", f"{third:.1f}", f"{plain / third:.2f}x"]
    cells += ["" if mb is None else f"{mb:.0f}" for mb in memory]
    print(f"{label:<24}{''.join(f'{cell:>12}' for cell in cells)}", flush=True)
    return plain / ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--no-compile", action="store_true", help="eager only; to compile the blocks takes minutes a row"
    )
    parser.add_argument("--forward-only", action="store_true", help="no training steps")
    parser.add_argument("--record", action="store_true", help="keep the ratios, for later runs to be compared with")
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
    print(f"median of {args.repeats}, ms; a step is forward and backward; MB: most in use on top\n")
    print_head("eager", "reference")
    for dtype, step in kinds:
        runs = [passes(model, clip, dtype, step) for model in (plain, ours)]
        label = f"{dtype} {'step' if step else 'forward'}".removeprefix("torch.")
        ratios[label] = print_row(label, [*runs, as_reference(runs[1])], device, args.repeats)
    for dtype, step in kinds:
        print_parts(variant, passes(ours, clip, dtype, step), clip, dtype, step)
    if not args.no_compile:
        print()
        print_head("blocks compiled", "ours, eager")
        for dtype, step in kinds:
            torch._dynamo.reset()
            for model in (plain, ours):
                for block in model.modules():
                    if isinstance(block, (PlainBlock, Block)):
                        block.compile(dynamic=False)
            runs = [passes(model, clip, dtype, step) for model in (plain, ours)]
            label = f"{dtype} {'step' if step else 'forward'}, compiled".removeprefix("torch.")
            ratios[label] = print_row(label, [*runs, eagerly(runs[1])], device, args.repeats)
    finish(f"{args.model}, batch {args.batch}, {device_name(device)}, {args.threads} threads", ratios, args.record)


if __name__ == "__main__":
    main()
