"""Measure what ``PosMLPVideo.freeze`` gains on a CPU, against the same model in eval mode.

    python benchmarks/frozen.py s16 [--rounds 5 --batch 1]

A frozen model also changes how its process keeps memory, so each measurement has a process of its own. The kinds take
turns, so that other load on the machine affects all of them. A time is the best of a process, and the median of the
processes: whether memory comes back page by page differs between them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from posmlp import create_model
from posmlp.model.backbone import PosMLPVideo
from posmlp.model.cost import device_name, seconds
from posmlp.model.spec import model_variant

CPU = torch.device("cpu")
PASSES = 7  # in each process, after two to warm up
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eval_mode(model: PosMLPVideo) -> PosMLPVideo:
    """Return the model in eval mode, as any PyTorch model."""
    return model.eval().requires_grad_(False)


def with_memory_given_back(model: PosMLPVideo) -> PosMLPVideo:
    """Return the model frozen, in a process that gives memory back as before."""
    from posmlp.model import cpu

    cpu.keep_freed_memory = lambda: None
    return model.freeze()


KINDS = {"eval mode": eval_mode, "frozen, memory given back": with_memory_given_back, "frozen": PosMLPVideo.freeze}


def measure(kind: str, name: str, dtype: str, batch: int, threads: int) -> tuple[float, int]:
    """Return the best milliseconds of a forward pass, and the page faults of the last one."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    variant = model_variant(name)
    model = KINDS[kind](create_model(name))
    clips = torch.randn(batch, 3, variant.frames, variant.image_size, variant.image_size)

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
            model(clips)

    times = []
    for _ in range(2 + PASSES):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times.append(seconds(run, CPU))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return 1e3 * min(times[2:]), faults


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="s16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    print(f"{device_name(CPU)}, {args.threads} threads; torch {torch.__version__}; batch {args.batch}\n")
    cells = [(kind, dtype) for kind in KINDS for dtype in DTYPES]
    found: dict[tuple[str, str], list[tuple[float, int]]] = {cell: [] for cell in cells}
    for _ in range(args.rounds):
        for kind, dtype in cells:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                task = pool.submit(measure, kind, args.model, dtype, args.batch, args.threads)
                found[kind, dtype].append(task.result())
    print(f"| {args.model} | fp32, ms | page faults | bf16, ms | page faults |\n|---|---:|---:|---:|---:|")
    for kind in KINDS:
        middle = [statistics.median_low(found[kind, dtype]) for dtype in DTYPES]
        print(f"| {kind} | {' | '.join(f'{ms:.0f} | {faults:,}' for ms, faults in middle)} |")


if __name__ == "__main__":
    main()
