"""Leave one group out, both ways: train on one group of a manifest, validate on the other; frames ordered and shuffled.

    python benchmarks/small_data.py MANIFEST A C

Each of the four runs is a ``posmlp train`` of the recipe ``small_data``, in MLflow as any other. The manifest needs a
column ``group``. "ordered" models are also tested on shuffled frames: what they then lose is what they knew of motion.
"shuffled" models were trained on shuffled frames too: what they reach is what the set of frames tells without order.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from order import validation_logits

from pipelines.train import train
from posmlp.config import load_recipe


def top1(run: Path, frame_order: str) -> float:
    """A run's validation top-1 in a plain loop."""
    logits, labels, _ = validation_logits(run, frame_order)
    return float((logits.argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("groups", nargs=2, metavar="GROUP")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe")
    args = parser.parse_args()
    rows = []
    for order in ("ordered", "shuffled"):
        for source, target in (args.groups, args.groups[::-1]):
            config = load_recipe(
                "small_data",
                [
                    f"data.train.path={args.manifest}",
                    f"data.val.path={args.manifest}",
                    f"data.train.where.group={source}",
                    f"data.val.where.group={target}",
                    f"data.frame_order={order}",
                    f"name={source}-to-{target}-{order}",
                    "eval.every=10",
                    *args.overrides,
                ],
            )
            start = time.perf_counter()
            result = train(config, echo=lambda line: print(line, flush=True))
            seconds = time.perf_counter() - start
            tested = [top1(result.path, frames) for frames in ("ordered", "shuffled")]
            rows.append((order, source, target, result.metrics["val/top1"], *tested, seconds))
    print("\ntop-1 of the run; of its model in a plain loop, on ordered and on shuffled frames")
    print(f"{'trained on':<12}{'group':<7}{'validated on':<14}{'top-1':>7}{'ordered':>9}{'shuffled':>10}{'seconds':>9}")
    for order, source, target, *accuracies, seconds in rows:
        own, ordered, shuffled = accuracies
        print(f"{order:<12}{source:<7}{target:<14}{own:>7.1%}{ordered:>9.1%}{shuffled:>10.1%}{seconds:>9.0f}")
    for order in ("ordered", "shuffled"):
        own, ordered, shuffled = (sum(r[i] for r in rows if r[0] == order) / 2 for i in (3, 4, 5))
        print(f"{order:<12}mean of both directions {own:>7.1%}{ordered:>9.1%}{shuffled:>10.1%}")


if __name__ == "__main__":
    main()
