"""The joint unit's cost by window: a joint block beside a parallel one, and beside itself written the plain way.

    python benchmarks/joint.py [--frames 4 8 16 32 --repeats 7] [--record]

A block of each stage of s, on the tokens that one clip of 224 x 224 has there, with windows over all its frames. The
plain way makes the whole map of a window, (thw)^2 entries a group, and multiplies with it (``benchmarks/plain.py``); it
is left out where that map would be beyond 1 GB. All are timed in turn, round by round; the median counts. All blocks of
the model are reckoned from the single ones.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from guard import finish
from model import interleaved
from plain import PlainBlock
from torch import Tensor, nn

from posmlp.model.backbone import Block, to_windows
from posmlp.model.cost import device_name
from posmlp.model.spec import Window, model_variant

LARGEST = 1e9  # bytes


def run_once(block: nn.Module, x: Tensor, args: tuple[object, ...], dtype: torch.dtype, step: bool) -> None:
    """A block forward, or forward and backward."""
    block.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(step)  # without gradients a block may work in place
    with torch.set_grad_enabled(step), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = block(x, *args)
    if step:
        y.backward(torch.ones_like(y))


def runs_of_stage(dim: int, groups: int, window: Window, side: int, device: torch.device) -> list[Callable[..., None]]:
    """What runs the parallel, the joint and, if that is not too large, the plain joint block on side x side tokens."""
    x = torch.randn(1, dim, window[0], side, side, device=device)
    tokens = to_windows(x, window)
    blocks = [Block(kind, dim, groups, window, 0.0).to(device) for kind in ("parallel", "joint")]
    runs = [partial(run_once, block, tokens, (window, None)) for block in blocks]
    if 4 * groups * math.prod(window) ** 2 <= LARGEST:
        last = x.permute(0, 2, 3, 4, 1).contiguous()
        runs.append(partial(run_once, PlainBlock(blocks[1]).to(device), last, ()))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="keep the ratios, for later runs to be compared with")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    print(f"{device_name(device)}, {args.threads} threads; torch {torch.__version__}; median of {args.repeats}, ms")
    ratios = {}
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for step in (False, True):
            what = f"{precision} {'step' if step else 'forward'}"
            print(f"\n| {what}: window, channels | parallel | joint | joint / parallel | plain joint | plain / ours |")
            print("|---|---:|---:|---:|---:|---:|")
            for frames in args.frames:
                variant = model_variant("s", frames=frames)
                stages = zip(variant.depths, variant.dims, variant.groups, variant.full_windows(), strict=True)
                whole = torch.zeros(2)
                for i, (depth, dim, groups, window) in enumerate(stages):
                    runs = runs_of_stage(dim, groups, window, variant.image_size >> (i + 2), device)
                    timed = [partial(run, dtype, step) for run in runs]
                    parallel, joint, *plain = interleaved(timed, device, args.repeats)
                    whole += depth * torch.tensor([parallel, joint])
                    label = f"{' x '.join(map(str, window))}, {dim}"
                    beside = f"{plain[0]:.1f} | {plain[0] / joint:.1f}" if plain else "- | -"
                    print(f"| {label} | {parallel:.1f} | {joint:.1f} | {joint / parallel:.2f} | {beside} |", flush=True)
                parallel, joint = whole.tolist()
                ratios[f"{what}: {frames} frames, parallel / joint"] = parallel / joint
                ending = f"{parallel:.0f} | {joint:.0f} | {joint / parallel:.2f} | - | -"
                print(f"| all blocks of s, {frames} frames | {ending} |", flush=True)
    finish(f"joint blocks of s, {device_name(device)}, {args.threads} threads", ratios, args.record)


if __name__ == "__main__":
    main()
