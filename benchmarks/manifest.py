"""What a long list of videos costs a run before its first clip: the driver's way and a worker's, step by step.

    python benchmarks/manifest.py                                   # 1,000, 100,000 and 1,000,000 rows, all formats
    python benchmarks/manifest.py --rows 1000000 --formats csv      # one of each
    python benchmarks/manifest.py --code OLD --code . --repeats 3   # two checkouts, in turns

Makes the lists and a folder of empty files that they name, once (``data/manifest``). Each list goes through what
``posmlp train`` calls, in a fresh process: read and checked, fingerprinted, fitted to the recipe, put into Ray's object
store; then what a worker does with it: its split, an epoch's order, the rows of the first decode task. Nothing is
decoded. For each step: its seconds, and how far the process grew during it at most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = ("csv", "names", "parquet", "kinetics", "ssv2")
CLASSES = 400
CHILD = "POSMLP_MANIFEST_CHILD"  # marks a process that measures


def make_lists(folder: Path, rows: int) -> None:
    """The same videos and labels in each format; ``names`` is CSV with class names in place of numbers."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    files = [f"{number:08d}.webm" for number in range(rows)]
    for name in files[len(os.listdir(videos)) :]:  # of a list with more rows, all are there
        (videos / name).touch()
    if ready(folder, rows):
        return
    labels = np.random.default_rng(0).integers(0, CLASSES, rows)
    labels[:CLASSES] = np.arange(CLASSES)
    names = [f"doing [something] of kind {label}" for label in range(CLASSES)]
    plain = [name.replace("[", "").replace("]", "") for name in names]
    pairs = list(zip(files, labels.tolist(), strict=True))
    table = pa.table({"uri": [f"videos/{name}" for name in files], "label": labels})
    pq.write_table(table, folder / f"{rows}.parquet")
    content = {
        "csv": "path,label\n" + "".join(f"videos/{name},{label}\n" for name, label in pairs),
        "names": "path,label\n" + "".join(f"videos/{name},{plain[label]}\n" for name, label in pairs),
        "kinetics": "".join(f"videos/{name} {label}\n" for name, label in pairs),
        "ssv2": json.dumps(
            [
                {"id": Path(name).stem, "label": plain[k], "template": names[k], "placeholders": ["something"]}
                for name, k in pairs
            ]
        ),
    }
    (folder / "labels.json").write_text(json.dumps({name: str(k) for k, name in enumerate(plain)}))
    for kind, text in content.items():
        (folder / f"{rows}.{kind}").write_text(text)


def ready(folder: Path, rows: int) -> bool:
    return all((folder / f"{rows}.{kind}").exists() for kind in FORMATS)


def measure(folder: Path, kind: str, rows: int) -> dict[str, tuple[float, float]]:
    """Seconds and megabytes of each step, in this process.

    What the process has once all is imported and Ray is started counts for none of them.
    """
    import ray
    import torch

    from pipelines.cluster.session import start_ray
    from pipelines.data.loader import Split, global_order, rows_per_block
    from pipelines.training.preflight import check_data, fingerprint
    from posmlp.config import load_recipe
    from posmlp.model.cost import peak_mb
    from posmlp.video.manifest import read_split

    path = folder / f"{rows}.{kind}"
    overrides = [f"data.train.path={path}", f"data.val.path={path}", "model.num_classes=null", "train.global_batch=128"]
    overrides.append(f"data.format={'csv' if kind == 'names' else kind}")
    if kind == "ssv2":
        overrides += [f"data.classes={folder / 'labels.json'}", f"data.train.root={folder / 'videos'}"]
    config = load_recipe("demo", overrides)
    start_ray(address="local", num_cpus=1, include_dashboard=False)
    found: dict[str, tuple[float, float]] = {}

    def step(name: str, run: Callable[[], Any]) -> Any:
        result, taken = [], []

        def timed() -> None:
            begun = time.perf_counter()
            result.append(run())
            taken.append(time.perf_counter() - begun)

        megabytes = peak_mb(timed, torch.device("cpu"))
        found[name] = taken[0], megabytes or 0.0
        return result[0]

    manifest = step("read and check", lambda: read_split(config.data, "train"))
    assert len(manifest.rows) == rows and len(manifest.classes) == CLASSES
    step("fingerprint", lambda: fingerprint(manifest))
    config = step("fit to the recipe", lambda: check_data(config, manifest, manifest))
    reference = step("into the object store", lambda: ray.put(manifest.rows))
    split = step("a worker's split", lambda: Split(reference, config, True))
    step("an epoch's order", lambda: global_order(rows, config, 1, train=True))
    first = step("its first part", lambda: next(split.segments(1, 0)))
    task = first[: rows_per_block(config, True)]
    step("rows of a decode task", lambda: ray.get(reference).take(task).to_pylist())
    ray.shutdown()
    return found


def run_child(code: Path, folder: Path, kind: str, rows: int) -> dict[str, tuple[float, float]]:
    """``measure`` in a fresh process, with the code of a checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--formats", kind]
    env = os.environ | {"PYTHONPATH": str(code.resolve()), CHILD: "1"}
    out = subprocess.run([*command, "--rows", str(rows)], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--code", type=Path, action="append", help="a checkout to measure; more than one take turns")
    parser.add_argument("--repeats", type=int, default=1, help="turns, of which the medians are shown")
    parser.add_argument("--folder", type=Path, default=Path("data/manifest"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    if os.environ.get(CHILD):
        print(json.dumps(measure(folder, args.formats[0], args.rows[0])))
        return
    codes = args.code or [Path(__file__).parents[1]]
    for rows in args.rows:
        make_lists(folder, rows)
    for kind in args.formats:
        found = {(code, rows): [] for code in codes for rows in args.rows}
        for _ in range(args.repeats):
            for code, rows in found:
                found[code, rows].append(run_child(code, folder, kind, rows))
        for code in codes:
            print(f"\n{kind}, {code}" if args.code else f"\n{kind}")
            print(f"{'':<22}" + "".join(f"{rows:>17,} rows  " for rows in args.rows))
            for name in found[code, args.rows[0]][0]:
                cells = ""
                for rows in args.rows:
                    turns = [turn[name] for turn in found[code, rows]]
                    seconds, megabytes = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
                    cells += f"{seconds:>11.3f} s{megabytes:>8.1f} MB"
                print(f"{name:<22}{cells}", flush=True)


if __name__ == "__main__":
    main()
