"""Measure what a long list of videos costs a run before the first clip is decoded: seconds and memory of each step.

    python benchmarks/manifest.py                                   # 1,000, 100,000 and 1,000,000 rows, all formats
    python benchmarks/manifest.py --rows 1000000 --formats csv      # one size, one format
    python benchmarks/manifest.py --code OLD --code . --repeats 3   # two checkouts, in turns

The script makes the lists and a folder of the empty files that they name, once (``data/manifest``). Each list goes
through the steps of ``posmlp train`` in a fresh process. The driver reads and checks it, computes its fingerprint,
checks it against the recipe and puts it into Ray's object store. A worker makes its loader, shuffles an epoch and takes
the rows of the first decode task. Nothing is decoded. For each step the script prints the seconds, and the largest
growth of the process's memory.
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
CHILD = "POSMLP_MANIFEST_CHILD"  # environment variable of a process that measures


def make_lists(folder: Path, rows: int) -> None:
    """Write the same videos and labels in each format; ``names`` is CSV with class names instead of numbers."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    files = [f"{number:08d}.webm" for number in range(rows)]
    for name in files[len(os.listdir(videos)) :]:  # files of a longer list are already there
        (videos / name).touch()
    if lists_exist(folder, rows):
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


def lists_exist(folder: Path, rows: int) -> bool:
    """Return whether all lists of this length are in the folder."""
    return all((folder / f"{rows}.{kind}").exists() for kind in FORMATS)


def measure_steps(folder: Path, kind: str, rows: int) -> dict[str, tuple[float, float]]:
    """Return seconds and megabytes of each step, measured in this process.

    The memory after imports and the start of Ray is not counted.
    """
    import ray
    import torch

    from pipelines.cluster.session import start_ray
    from pipelines.data.loader import SplitLoader, global_order, rows_per_block
    from pipelines.training.preflight import check_data, list_fingerprint
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
        result, elapsed = [], []

        def timed() -> None:
            start = time.perf_counter()
            result.append(run())
            elapsed.append(time.perf_counter() - start)

        megabytes = peak_mb(timed, torch.device("cpu"))
        found[name] = elapsed[0], megabytes or 0.0
        return result[0]

    manifest = step("read and check", lambda: read_split(config.data, "train"))
    assert len(manifest.rows) == rows and len(manifest.classes) == CLASSES
    step("fingerprint", lambda: list_fingerprint(manifest))
    config = step("check against the recipe", lambda: check_data(config, manifest, manifest))
    reference = step("put into the object store", lambda: ray.put(manifest.rows))
    loader = step("make a worker's loader", lambda: SplitLoader(reference, config, True))
    step("shuffle an epoch", lambda: global_order(rows, config, 1, train=True))
    first = step("first segment", lambda: next(loader.segments(1, 0)))
    task = first.reshape(-1)[: rows_per_block(config, True)]
    step("rows of a decode task", lambda: ray.get(reference).take(task).to_pylist())
    ray.shutdown()
    return found


def run_child(code: Path, folder: Path, kind: str, rows: int) -> dict[str, tuple[float, float]]:
    """Call ``measure_steps`` in a fresh process, with the code of a checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--folder", str(folder), "--formats", kind]
    env = os.environ | {"PYTHONPATH": str(code.resolve()), CHILD: "1"}
    out = subprocess.run([*command, "--rows", str(rows)], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--code", type=Path, action="append", help="a checkout to measure; several take turns")
    parser.add_argument("--repeats", type=int, default=1, help="number of turns; the medians are printed")
    parser.add_argument("--folder", type=Path, default=Path("data/manifest"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    if os.environ.get(CHILD):
        print(json.dumps(measure_steps(folder, args.formats[0], args.rows[0])))
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
            print(f"{'':<28}" + "".join(f"{rows:>17,} rows  " for rows in args.rows))
            for name in found[code, args.rows[0]][0]:
                cells = ""
                for rows in args.rows:
                    turns = [turn[name] for turn in found[code, rows]]
                    seconds, megabytes = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
                    cells += f"{seconds:>11.3f} s{megabytes:>8.1f} MB"
                print(f"{name:<28}{cells}", flush=True)


if __name__ == "__main__":
    main()
