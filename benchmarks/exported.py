"""Compare exported files (.pt2, .onnx, int8) with a run's model on its validation videos: top-1, agreement and size.

python benchmarks/exported.py runs/demo
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from pipelines.runs.models import find_checkpoint, load_trained_model
from posmlp.export import export, load_exported
from posmlp.model.cost import device_name
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_split

BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="name or folder of a run, or folder of a checkpoint")
    args = parser.parse_args()
    model, info = load_trained_model(find_checkpoint(args.run))
    config = info.recipe()
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"clips": 1, "crops": 1})})
    rows = read_split(config.data, "val").rows.to_pylist()
    decoded = (load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False)[0] for row in rows)
    clips = torch.from_numpy(np.concatenate(list(decoded))).split(BATCH_SIZE)
    labels = torch.tensor([row["label"] for row in rows])

    def eager(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(to_input(batch, config))

    runners = {"the model": (eager, None)}
    for label, suffix, int8 in ((".pt2", ".pt2", False), (".onnx", ".onnx", False), (".onnx, int8", ".onnx", True)):
        content = export(model, config, {}, suffix, int8=int8).content
        runners[label] = load_exported(content, suffix), len(content) / 1e6
    device = device_name(torch.device("cpu"))
    print(f"{args.run}, {len(rows)} videos, one clip each; {device}; torch {torch.__version__}\n")
    print("| | top-1 | same class as the model | largest difference of logits | file, MB |")
    print("|---|---:|---:|---:|---:|")
    model_logits = None
    for label, (run, megabytes) in runners.items():
        logits = torch.cat([run(batch) for batch in clips])
        model_logits = logits if model_logits is None else model_logits
        predicted = logits.argmax(1)
        top1, same = ((predicted == other).double().mean() for other in (labels, model_logits.argmax(1)))
        difference = (logits - model_logits).abs().max()
        size = "-" if megabytes is None else f"{megabytes:.2f}"
        print(f"| {label} | {top1:.1%} | {same:.1%} | {difference:.2g} | {size} |")


if __name__ == "__main__":
    main()
