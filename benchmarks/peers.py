"""Compare PosMLP-Video with other models of its class: parameters, GMACs, time, clips/s, GMAC/s and memory.

    python benchmarks/peers.py [--device cuda --batch 8 --repeats 20]

The other models are in ``peer_models.py``. All models run in turn, round by round, so that a busy machine affects all
of them. Times are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from model import make_pass
from peer_models import R2Plus1D, VideoSwin, count_torch_macs
from torch import Tensor, nn

import posmlp
from posmlp.model.cost import count_macs, count_params, device_name, peak_mb, seconds
from posmlp.model.spec import model_variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forward-only", action="store_true", help="leave out training steps")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)

    rows: list[tuple[str, nn.Module, int, Tensor]] = []  # label, model, MACs per clip, clips
    clip = torch.randn(args.batch, 3, 16, 224, 224, device=device)
    small = torch.randn(args.batch, 3, 16, 112, 112, device=device)
    for name in ("s16", "b16"):
        rows.append((f"{name} 224", posmlp.create_model(name).to(device), count_macs(model_variant(name)), clip))
    peers = (("Video Swin-T 224", VideoSwin(), clip), ("R(2+1)D-18 224", R2Plus1D(), clip))
    for label, peer, clips in (*peers, ("R(2+1)D-18 112", R2Plus1D(), small)):
        rows.append((label, peer.to(device), count_torch_macs(peer, clips[:1]), clips))

    print(f"batch {args.batch}, 16 frames; {device_name(device)}, {args.threads} threads; torch {torch.__version__}")
    print(f"medians of {args.repeats} interleaved rounds, eager; a step is forward and backward")
    for dtype, precision in ((torch.float32, "fp32"), (torch.bfloat16, "bf16 autocast")):
        for step in (False,) if args.forward_only else (False, True):
            runs = [make_pass(model, clips, dtype, step) for _, model, _, clips in rows]
            peaks = [(run(), peak_mb(run, device))[1] for run in runs]  # the first call is a warm-up
            rounds = [[seconds(run, device) for run in runs] for _ in range(args.repeats)]
            print(f"\n| {precision} {'step' if step else 'forward'} | M params | GMACs | ms | clips/s | GMAC/s | MB |")
            print("|---|---:|---:|---:|---:|---:|---:|")
            for (label, model, macs, _), times, peak in zip(rows, zip(*rounds, strict=True), peaks, strict=True):
                clip_s = statistics.median(times) / args.batch
                gmacs = macs / 1e9
                memory = "-" if peak is None else f"{peak:.0f}"
                cells = f"{count_params(model) / 1e6:.1f} | {gmacs:.1f} | {1e3 * clip_s:.0f} | {1 / clip_s:.2f}"
                print(f"| {label} | {cells} | {gmacs / clip_s:.0f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
