"""How fast the model is against the same model written the plain way (``benchmarks/plain.py``).

    python benchmarks/model.py --model s16 --batch 1 --repeats 9 [--no-compile] [--record]

Both have the same parameters and give the same logits and gradients, which is checked first. Then one process times
them in turn, round by round, so that whatever else the machine does meets both alike. The model runs a third time as
its reference, without ``posmlp/model/cpu.py`` and ``posmlp/model/gpu.py``: what is gained there is the layout's, the
rest is that of those files. Eager runs are then taken apart, each part beside its floor (``benchmarks/floors.py``), and
the ratios compared with those last recorded (``benchmarks/guard.py``).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable

import torch
from floors import print_parts
from guard import finish
from plain import PlainModel
from torch import Tensor, nn
from torch._inductor.exc import InductorError

import posmlp
from posmlp.model import cpu, gpu
from posmlp.model.cost import device_name, peak_mb, seconds
from posmlp.model.variants import model_variant


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--no-compile", action="store_true", help="eager only; compiling s16 takes several minutes a row"
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
    eager = copy.copy(ours)  # stays eager
    plain = PlainModel(ours).to(device)
    check_equal(ours, plain, clip)

    print(f"{args.model}, batch {args.batch}; {device_name(device)}, {args.threads} threads; torch {torch.__version__}")
    print(
        f"median of {args.repeats}, ms; a step is forward and backward; nan: does not compile; MB: most in use on top\n"
    )
    labels = ("plain", "ours", "plain/ours", "reference", "plain/that", "plain, MB", "ours, MB")
    print(f"{'':<24}{''.join(f'{label:>12}' for label in labels)}")
    ratios = {}
    for compiled in (False,) if args.no_compile else (False, True):
        for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            for step in (False,) if args.forward_only else (False, True):
                if compiled:
                    torch._dynamo.reset()
                    plain.compile(dynamic=False)
                    ours.compile(dynamic=False)
                runs = [passes(m, clip, dtype, step) for m in (plain, ours)]
                if device.type == "cuda" or not compiled:  # compiled for CPUs it is the reference already
                    runs.append(as_reference(runs[1]))
                base, own, *others = interleaved(runs, device, args.repeats)
                compiles = [not math.isnan(ms) for ms in (base, own)]
                memory = [peak_mb(run, device) if ok else None for run, ok in zip(runs, compiles, strict=False)]
                reference = others[0] if others else math.nan
                label = f"{'compiled' if compiled else 'eager'} {precision} {'step' if step else 'forward'}"
                ratios[label] = base / own
                cells = [
                    f"{base:.1f}",
                    f"{own:.1f}",
                    f"{base / own:.2f}x",
                    f"{reference:.1f}",
                    f"{base / reference:.2f}x",
                ]
                cells += ["" if mb is None else f"{mb:.0f}" for mb in memory]
                print(f"{label:<24}{''.join(f'{cell:>12}' for cell in cells)}", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        for step in (False,) if args.forward_only else (False, True):
            print_parts(variant, passes(eager, clip, dtype, step), args.batch, dtype, step)
    finish(f"{args.model}, batch {args.batch}, {device_name(device)}, {args.threads} threads", ratios, args.record)


if __name__ == "__main__":
    main()
