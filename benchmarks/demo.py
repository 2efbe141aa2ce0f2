"""Train the demo with several seeds, and print its validation top-1, also with shuffled frames, and its time.

    python benchmarks/demo.py --seeds 3

The runs are ``runs/demo-seed-0`` and so on. A finished run is not repeated, so the same command resumes after a stop;
the time of such a run is missing. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from frame_order import validation_logits

from pipelines.runs import checkpoints
from pipelines.runs.record import read_record, run_folder
from pipelines.training.train import train
from posmlp.config import load_recipe
from posmlp.metrics import VAL_TOP1
from posmlp.video.motion import make_motion_set

Row = tuple[float, float, float, float]  # top-1 of the last epoch, of the best checkpoint, shuffled; seconds


def measure(seed: int) -> Row:
    """Train one run unless it is finished, and test its best checkpoint."""
    config = load_recipe("demo", [f"train.seed={seed}", f"name=demo-seed-{seed}"])
    make_motion_set(Path(config.data.train.path).parent)
    run, seconds = run_folder(config), float("nan")
    record = read_record(run)
    if record is None or record["metrics"] is None:
        start = time.perf_counter()
        train(config)
        seconds = time.perf_counter() - start
        record = read_record(run)
    assert record is not None
    (best,) = checkpoints.best(checkpoints.find(run), 1)
    assert best.info is not None
    logits, labels, _ = validation_logits(run, "shuffled")
    shuffled = float((logits.argmax(1) == labels).double().mean())
    return record["metrics"][VAL_TOP1], best.info.metrics[VAL_TOP1], shuffled, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    args = parser.parse_args()
    rows = [measure(seed) for seed in range(args.seeds)]
    print("| seed | last epoch | best checkpoint | best, frames shuffled | time |\n|---|---|---|---|---|")
    for seed, (last, best, shuffled, seconds) in enumerate(rows):
        print(f"| {seed} | {last:.1%} | {best:.1%} | {shuffled:.1%} | {seconds:.0f} s |")
    columns = list(zip(*rows, strict=True))
    ranges = [f"{min(column):.1%} to {max(column):.1%}" for column in columns[:3]]
    print(f"| range | {' | '.join(ranges)} | {min(columns[3]):.0f} to {max(columns[3]):.0f} s |")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
