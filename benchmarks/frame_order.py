"""Measure a run's validation top-1 with the frames of each clip in order and shuffled.

    python benchmarks/frame_order.py runs/demo

In each pair of classes of the embedded motion set, the second class is the first played backwards. For each pair the
script also prints how often the model prefers the right class of the two; chance is 50 %.
"""

from __future__ import annotations

import argparse

import torch

from pipelines.runs.models import load_trained_model
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_split


def validation_logits(run: str, frame_order: str) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Return the logits ``[N, classes]`` of a run's validation videos, their labels ``[N]``, and the class names.

    A plain loop on the CPU, without Ray.

    Args:
        run: the run's folder.
        frame_order: ``ordered`` or ``shuffled``.
    """
    model, info = load_trained_model(run)
    config = info.recipe()
    config = config.model_copy(update={"data": config.data.model_copy(update={"frame_order": frame_order})})
    manifest = read_split(config.data, "val")
    logits = []
    for row in manifest.rows.to_pylist():
        clips, _ = load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False)
        with torch.no_grad():
            logits.append(model(to_input(torch.from_numpy(clips), config)).mean(0))
    return torch.stack(logits), torch.tensor(manifest.rows["label"].to_pylist()), manifest.classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a run on the embedded motion set, such as runs/demo")
    args = parser.parse_args()
    results = [validation_logits(args.run, order) for order in ("ordered", "shuffled")]
    print(f"{'':<30}{'ordered':>9}{'shuffled':>10}")
    accuracies = [(logits.argmax(1) == labels).double().mean() for logits, labels, _ in results]
    print(f"{'top-1':<30}" + "".join(f"{a:>9.1%} " for a in accuracies))
    _, labels, classes = results[0]
    for first in range(0, len(classes), 2):
        pair = (labels == first) | (labels == first + 1)
        hits = [
            ((x[pair, first + 1] > x[pair, first]) == (labels[pair] > first)).double().mean() for x, _, _ in results
        ]
        print(f"{classes[first] + ' or ' + classes[first + 1]:<30}" + "".join(f"{h:>9.1%} " for h in hits))


if __name__ == "__main__":
    main()
