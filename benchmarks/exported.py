"""Do exported files score a run's validation videos as the model does? Accuracy, agreement and size, int8 among them.

python benchmarks/exported.py runs/demo
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from pipelines.runs.models import find_checkpoint, trained_model
from posmlp.export import export, load
from posmlp.model.cost import device_name
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips
from posmlp.video.manifest import read_split

TOGETHER = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's name or folder, or a checkpoint's")
    args = parser.parse_args()
    model, about = trained_model(find_checkpoint(args.run))
    config = about.recipe()
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"clips": 1, "crops": 1})})
    rows = read_split(config.data, "val").rows.to_pylist()
    read = (load_clips(row["uri"], row["sample_id"], config, epoch=0, train=False)[0] for row in rows)
    clips = torch.from_numpy(np.concatenate(list(read))).split(TOGETHER)
    labels = torch.tensor([row["label"] for row in rows])

    def eager(some: Tensor) -> Tensor:
        with torch.no_grad():
            return model(to_input(some, config))

    runs = {"the model": (eager, None)}
    for label, suffix, int8 in ((".pt2", ".pt2", False), (".onnx", ".onnx", False), (".onnx, int8", ".onnx", True)):
        content = export(model, config, {}, suffix, int8=int8).content
        runs[label] = load(content, suffix), len(content) / 1e6
    print(
        f"{args.run}, {len(rows)} videos, a clip each; {device_name(torch.device('cpu'))}; torch {torch.__version__}\n"
    )
    print("| | top-1 | same class as the model | largest difference of logits | file, MB |")
    print("|---|---:|---:|---:|---:|")
    own = None
    for label, (run, size) in runs.items():
        logits = torch.cat([run(some) for some in clips])
        own = logits if own is None else own
        top1, same = ((logits.argmax(1) == of).double().mean() for of in (labels, own.argmax(1)))
        difference = (logits - own).abs().max()
        print(f"| {label} | {top1:.1%} | {same:.1%} | {difference:.2g} | {'-' if size is None else f'{size:.2f}'} |")


if __name__ == "__main__":
    main()
