"""Measure the time and memory of frame mAP with the key frames of AVA's validation set.

    python benchmarks/frame_map.py
    python benchmarks/frame_map.py --key-frames 228000 --evaluated 80

Each key frame has two or three persons, and each person one to four actions. The persons are found with small errors,
some twice, some not at all, and all classes have a score of each. Time and memory are those of ``frame_map`` alone.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from posmlp.detection.frame_map import FrameMap, Scored, Truth, frame_map
from posmlp.model.cost import peak_mb


def random_boxes(key_frames: int, classes: int) -> tuple[Truth, Scored]:
    """Ground truth, and the boxes and scores of a model that is often right."""
    rng = np.random.default_rng(0)
    key = np.repeat(np.arange(key_frames), rng.integers(2, 4, key_frames))
    corner, size = rng.uniform(0, 0.6, (len(key), 2)), rng.uniform(0.1, 0.4, (len(key), 2))
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    box = np.repeat(np.arange(len(key)), rng.integers(1, 5, len(key)))
    share = 1 / np.arange(1, classes + 1)  # classes are as unequal as those of AVA
    action = rng.choice(classes, len(box), p=share / share.sum())
    truth = Truth(key[box], boxes[box], action)

    logits = rng.normal(-4, 2, (len(key), classes)).astype(np.float32)
    np.add.at(logits, (box, action), 3)
    found = np.sort(rng.choice(len(key), len(key)))
    moved = boxes[found] + rng.normal(0, 0.02, (len(found), 4)).astype(np.float32)
    return truth, Scored(key[found], moved, 1 / (1 + np.exp(-logits[found])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key-frames", type=int, default=57_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--evaluated", type=int, default=60, help="number of classes that are evaluated")
    parser.add_argument("--repeats", type=int, default=5, help="number of runs; medians are printed")
    args = parser.parse_args()
    truth, scored = random_boxes(args.key_frames, args.classes)
    print(f"{args.key_frames:,} key frames, {len(scored.key):,} scored boxes, {len(truth.key):,} actions")
    rules = {"ActivityNet": {}, "SlowFast": {"most": None, "by_score": False}}
    for name, options in rules.items():
        seconds, found = [], list[FrameMap]()

        def run(options: dict = options, seconds: list = seconds, found: list = found) -> None:
            start = time.perf_counter()
            found.append(frame_map(truth, scored, args.classes, range(args.evaluated), **options))
            seconds.append(time.perf_counter() - start)

        megabytes = [peak_mb(run, torch.device("cpu")) or 0.0 for _ in range(args.repeats)]
        time_used, memory = statistics.median(seconds), max(megabytes)
        print(f"{name:<12} mAP {found[0].map:.4f}  {time_used:6.2f} s  {memory:6.0f} MB")


if __name__ == "__main__":
    main()
