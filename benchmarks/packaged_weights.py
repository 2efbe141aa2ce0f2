"""Make the weights that come with the package, ``posmlp/weights/motion.safetensors``.

    python benchmarks/packaged_weights.py train.storage=runs/packaged
    python benchmarks/packaged_weights.py --further train.storage=runs/packaged

Trains the model of the recipe ``small_data`` on drawn clips of single motions, and then on strokes
(``small_data.pretrain``). With ``--further`` it trains the package's present weights further, on strokes alone. The
overrides are those of ``model.``, ``train.storage``, ``data.cache_dir``, ``tracking.`` and ``scaling.``. The weights of
the last checkpoint are stored in fp16.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_data import FULL, pretrain

from pipelines.runs import checkpoints
from posmlp.metrics import VAL_TOP1
from posmlp.weights import FOLDER

PACKAGED = "posmlp:motion"


def main() -> None:
    """Train, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--further", action="store_true", help="start from the package's present weights")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    args = parser.parse_intermixed_args()
    start = PACKAGED if args.further else None
    run = pretrain(FULL, Path("data"), args.overrides, start)
    write(run, FOLDER / "motion.safetensors", f"python benchmarks/packaged_weights.py{' --further' * args.further}")


def write(run: str, file: Path, command: str) -> None:
    """Write the newest weights of a run as fp16, with the command that made them in the file's metadata."""
    checkpoint, _ = checkpoints.newest(run)
    assert checkpoint is not None
    info = checkpoints.read_info(checkpoint)
    state = load_file(str(Path(checkpoint, checkpoints.WEIGHTS)))
    half = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    model = {key: value for key, value in info.config["model"].items() if key != "weights"}
    metadata = {
        "made by": command,
        "model": json.dumps(model),
        "classes": json.dumps(list(info.classes)),
        "val/top1": f"{info.metrics[VAL_TOP1]:.4f}",
        "torch": torch.__version__,
    }
    save_file(half, str(file), metadata)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, val/top1 {info.metrics[VAL_TOP1]:.1%} on drawn strokes")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
