"""Measure the time of joint blocks, by window, against parallel blocks and against a plain joint block.

    python benchmarks/joint.py [--frames 4 8 16 32 --repeats 7] [--record]

Times one block of each stage of ``s``, on the tokens that a clip of 224 x 224 has there, with windows over all frames.
The plain block (``benchmarks/plain.py``) makes the whole map of a window, (thw)^2 entries per group, and multiplies
with it. It is left out where the map would be larger than 1 GB. The blocks run in turn, round by round; the table has
medians. The time of all blocks of the model is estimated from the single blocks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import torch
from model import interleaved_medians
from plain import PlainBlock
from ratios import record_or_compare
from torch import Tensor, nn

from posmlp.model.backbone import Block, to_windows
from posmlp.model.cost import device_name
from posmlp.model.spec import Window, model_variant

MAX_MAP_BYTES = 1e9


def run_block(block: nn.Module, x: Tensor, args: tuple[object, ...], dtype: torch.dtype, step: bool) -> None:
    """Run a block forward, or forward and backward."""
    block.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(step)  # without gradients a block may work in place
    with torch.set_grad_enabled(step), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        y = block(x, *args)
    if step:
        y.backward(torch.ones_like(y))


def make_stage_runs(
    dim: int, groups: int, window: Window, side: int, device: torch.device
) -> list[Callable[..., None]]:
    """Return functions that run the parallel, the joint and the plain joint block on side x side tokens.

    The plain joint block is left out if its map is too large.
    """
    x = torch.randn(1, dim, window[0], side, side, device=device)
    tokens = to_windows(x, window)
    blocks = [Block(kind, dim, groups, window, 0.0).to(device) for kind in ("parallel", "joint")]
    runs = [partial(run_block, block, tokens, (window, None)) for block in blocks]
    if 4 * groups * math.prod(window) ** 2 <= MAX_MAP_BYTES:
        last = x.permute(0, 2, 3, 4, 1).contiguous()
        runs.append(partial(run_block, PlainBlock(blocks[1]).to(device), last, ()))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", action="store_true", help="store the ratios, for comparison with later runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    print(f"{device_name(device)}, {args.threads} threads; torch {torch.__version__}")
    print(f"ms, medians of {args.repeats} rounds")
    ratios = {}
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for step in (False, True):
            mode = f"{precision} {'step' if step else 'forward'}"
            print(f"\n| {mode}: window, channels | parallel | joint | joint / parallel | plain joint | plain / ours |")
            print("|---|---:|---:|---:|---:|---:|")
            for frames in args.frames:
                variant = model_variant("s", frames=frames)
                stages = zip(variant.depths, variant.dims, variant.groups, variant.full_windows(), strict=True)
                all_blocks = torch.zeros(2)
                for i, (depth, dim, groups, window) in enumerate(stages):
                    runs = make_stage_runs(dim, groups, window, variant.image_size >> (i + 2), device)
                    timed = [partial(run, dtype, step) for run in runs]
                    parallel, joint, *plain = interleaved_medians(timed, device, args.repeats)
                    all_blocks += depth * torch.tensor([parallel, joint])
                    label = f"{' x '.join(map(str, window))}, {dim}"
                    plain_cells = f"{plain[0]:.1f} | {plain[0] / joint:.1f}" if plain else "- | -"
                    print(
                        f"| {label} | {parallel:.1f} | {joint:.1f} | {joint / parallel:.2f} | {plain_cells} |",
                        flush=True,
                    )
                parallel, joint = all_blocks.tolist()
                ratios[f"{mode}: {frames} frames, parallel / joint"] = parallel / joint
                cells = f"{parallel:.0f} | {joint:.0f} | {joint / parallel:.2f} | - | -"
                print(f"| all blocks of s, {frames} frames | {cells} |", flush=True)
    record_or_compare(f"joint blocks of s, {device_name(device)}, {args.threads} threads", ratios, args.record)


if __name__ == "__main__":
    main()
