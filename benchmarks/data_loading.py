"""Measure the data loader: throughput against a torch DataLoader, decode times, memory of a long list, small clips.

Also the conversion of decoded frames to RGB, on the scaler of the thread and on one for each frame.

    python benchmarks/data_loading.py throughput      # clips/s with 1 and 2 decoding processes
    python benchmarks/data_loading.py settings        # ms per clip, by decoder, sampling, scale and key frames
    python benchmarks/data_loading.py memory          # MB for a manifest of 100,000 rows
    python benchmarks/data_loading.py small           # clips/s of cached small clips, by tasks and in the worker
    python benchmarks/data_loading.py conversion      # ms to convert the frames of a clip

Without ``--manifest`` the script first makes H.264 videos of 340x256 (``data/ingest``); ``small`` draws embedded sets.
All loaders call the same function for the same clips and take turns in one process. The figures are medians over the
turns.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow as pa
import ray
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.cluster.session import start_ray
from pipelines.data.loader import SplitLoader, global_order
from pipelines.data.object_store import object_store_usage
from pipelines.data.shard import ShardSettings, shard
from posmlp.config import Config, load_recipe
from posmlp.model.cost import device_name
from posmlp.video.clip import load_clips
from posmlp.video.decode import convert, scaled_size
from posmlp.video.manifest import read_manifest
from posmlp.video.motion import make_motion_set

CPU = device_name(torch.device("cpu"))
FRAMES, WIDTH, HEIGHT, FPS = 300, 340, 256, 30  # of the videos that the script makes: the usual size of Kinetics


def make_videos(folder: Path, count: int) -> Path:
    """Make H.264 videos of moving textures with noise, and return the path of their list.

    They are encoded with x264's defaults (a key frame every 250 frames), as most users' videos are.
    """
    manifest = folder / "list.csv"
    if manifest.exists() and len(manifest.read_text().splitlines()) == count + 1:
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = torch.from_numpy(rng.random((1, 3, 24, 32), dtype=np.float32))
        texture = torch.nn.functional.interpolate(coarse, (2 * HEIGHT, 2 * WIDTH), mode="bicubic")[0].clamp(0, 1)
        texture = (texture.permute(1, 2, 0).numpy() * 200).astype(np.uint8)
        noise = rng.integers(0, 24, (HEIGHT + 64, WIDTH + 64, 1), np.uint8)
        with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "23"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for frame in range(FRAMES):
                y = int(HEIGHT / 2 * (1 + np.sin(frame / 40 + number)))
                x = int(WIDTH / 2 * (1 + np.cos(frame / 50 + number)))
                dy, dx = rng.integers(0, 64, 2)
                grain = noise[dy : dy + HEIGHT, dx : dx + WIDTH]
                picture = texture[y : y + HEIGHT, x : x + WIDTH] + grain
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    rows = "".join(f"{number:03d}.mp4,{number % 4}\n" for number in range(count))
    manifest.write_text("path,label\n" + rows)
    return manifest


def s16_recipe(manifest: Path | str, *overrides: str) -> Config:
    """Return a recipe for S/16 on the published clip: 16 frames of 224x224, from a short side of 256; batch 8."""
    keys = ["model.name=s16", "model.frames=16", "model.image_size=224", "data.short_side=256", "data.cache_dir=null"]
    keys += [
        f"data.train.path={manifest}",
        f"data.val.path={manifest}",
        "train.global_batch=8",
    ]
    return load_recipe("demo", [*keys, *overrides])


# --- throughput ------------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """The clips of one epoch, in the data loader's order, for a torch DataLoader."""

    def __init__(self, rows: pa.Table, config: Config):
        order = global_order(len(rows), config, 0, train=True)
        self.rows, self.config = rows.take(order).to_pylist(), config

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        row = self.rows[index]
        clips, _ = load_clips(row["uri"], row["sample_id"], self.config, epoch=0, train=True)
        return clips, row["label"]


def decode_in_loop(rows: pa.Table, config: Config, processes: int) -> Iterator[int]:
    """Yield the number of clips of each batch: decoding alone, in this process."""
    del processes
    clips = ClipDataset(rows, config)
    for first in range(0, len(clips), 8):
        yield sum(len(clips[i][0]) for i in range(first, first + 8))


def load_with_torch(rows: pa.Table, config: Config, processes: int) -> Iterator[int]:
    """Yield the number of clips of each batch of a torch DataLoader."""
    for clips, _ in DataLoader(ClipDataset(rows, config), batch_size=8, num_workers=processes, prefetch_factor=2):
        yield len(clips)


def load_with_ray(rows: pa.Table, config: Config, processes: int) -> Iterator[int]:
    """Yield the number of clips of each batch of the data loader; ``processes`` of the cluster's 3 CPUs decode."""
    holder = CpuHolder.options(num_cpus=3 - processes).remote()
    ray.get(holder.ready.remote())
    scaling = config.scaling.model_copy(update={"cpus_per_worker": 3 - processes})
    for batch in SplitLoader(rows, config.model_copy(update={"scaling": scaling}), True).batches(0):
        yield len(batch.labels)


@ray.remote
class CpuHolder:
    """Reserves its CPUs, as a training worker does, and does nothing."""

    def ready(self) -> None:
        pass


def measure_rate(run: Callable[..., Iterator[int]], rows: pa.Table, config: Config, processes: int) -> float:
    """Return clips per second, from the difference between a long and a short epoch.

    Both epochs start processes, fill buffers and drain them, so the difference has only the steady state.
    """
    clips, seconds = [], []
    for part in (rows.slice(0, len(rows) // 4), rows):
        start = time.perf_counter()
        clips.append(sum(run(part, config, processes)))
        seconds.append(time.perf_counter() - start)
    return (clips[1] - clips[0]) / (seconds[1] - seconds[0])


def measure_throughput(manifest_path: Path, repeats: int) -> None:
    """Print clips/s of the loaders, and ratios between them."""
    rows, config = pa.concat_tables([read_manifest(manifest_path).rows] * 4).combine_chunks(), s16_recipe(manifest_path)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    start_ray(num_cpus=3)
    loaders: dict[str, tuple[Callable[..., Iterator[int]], int]] = {
        "decoding alone, 1 process": (decode_in_loop, 1),
        "DataLoader, 1 worker": (load_with_torch, 1),
        "Ray Data, 1 worker": (load_with_ray, 1),
        "DataLoader, 2 workers": (load_with_torch, 2),
        "Ray Data, 2 workers": (load_with_ray, 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(1, repeats + 1):
        for name, (run, processes) in loaders.items():
            rates[name].append(measure_rate(run, rows, config, processes))
            print(f"  turn {turn}  {name:<28}{rates[name][-1]:7.1f} clips/s", flush=True)
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{len(rows)} videos of {FRAMES} frames, {config.data.sampling} sampling, on {CPU}")
    for name, value in median.items():
        print(f"  {name:<28}{value:7.1f} clips/s  ({min(rates[name]):.1f} to {max(rates[name]):.1f})")
    ratios = [
        ("Ray Data / DataLoader, 1 worker", "Ray Data, 1 worker", "DataLoader, 1 worker"),
        ("Ray Data / DataLoader, 2 workers", "Ray Data, 2 workers", "DataLoader, 2 workers"),
        ("Ray Data, 2 workers / 1", "Ray Data, 2 workers", "Ray Data, 1 worker"),
        ("DataLoader, 2 workers / 1", "DataLoader, 2 workers", "DataLoader, 1 worker"),
        ("Ray Data, 1 worker / decoding alone", "Ray Data, 1 worker", "decoding alone, 1 process"),
    ]
    for text, above, below in ratios:
        print(f"  {text:<40}{median[above] / median[below]:.2f}")
    print_copies(config)


def print_copies(config: Config) -> None:
    """Print the megabytes that are written for one clip, counted by hand from the code."""
    variant, side = config.model.variant(), config.data.short_side or 0
    scaled = variant.frames * side * round(side * WIDTH / HEIGHT) * 3 / 1e6
    clip = variant.frames * variant.image_size**2 * 3 / 1e6
    print(f"\nMB written per clip: {scaled:.1f} by FFmpeg's scaler (short side {side}, into shared memory)")
    print(f"  {clip:.1f} each for crop and resize, for Ray's object store, and for the batch")


# --- settings --------------------------------------------------------------------------------------------------------


def measure_settings(manifest_path: Path, repeats: int) -> None:
    """Print the milliseconds per clip and KB per video, by how videos are stored and read."""
    start_ray()
    manifest = read_manifest(manifest_path)
    sources = {"original files": manifest}
    stored = {"original files": sum(Path(uri).stat().st_size for uri in manifest.rows["uri"].to_pylist())}
    shards: list[tuple[int | None, int | None]] = [(None, None), (256, 250), (256, 32), (256, 12), (256, 4), (128, 12)]
    for short_side, interval in shards:
        name = f"shards, {short_side} px, key frame every {interval}" if interval else "shards, not re-encoded"
        out = manifest_path.parent / f"shards-{short_side}-{interval}"
        result = shard(manifest, str(out), ShardSettings(16, short_side, interval))
        sources[name], stored[name] = read_manifest(result.manifest), result.bytes
    ray.shutdown()
    readers = {
        "uniform": [],
        "dense": ["data.sampling=dense", "data.stride=2"],
        "uniform, 112 px": ["model.image_size=112", "data.short_side=128"],
        "dense, decord": ["data.sampling=dense", "data.stride=2", "data.decoder=decord"],
        "uniform, decord": ["data.decoder=decord"],
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in itertools.product(sources, readers)}
    for turn in range(repeats + 1):
        for source, reader in times:
            config, rows = s16_recipe(manifest_path, *readers[reader]), sources[source].rows.to_pylist()[:16]
            start = time.perf_counter()
            for row in rows:
                load_clips(row["uri"], row["sample_id"], config, epoch=turn, train=True)
            if turn:
                times[source, reader].append((time.perf_counter() - start) / len(rows) * 1000)
    print(f"\nms per clip (16 frames), one process, on {CPU}")
    print(f"{'':<38}{'KB per video':>13}" + "".join(f"{reader:>17}" for reader in readers))
    for source, table in sources.items():
        cells = "".join(f"{statistics.median(times[source, reader]):>17.1f}" for reader in readers)
        print(f"{source:<38}{stored[source] / len(table.rows) / 1000:>13.0f}{cells}")


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(manifest_path: Path, rows: int) -> None:
    """Print the memory that a manifest of many rows needs in the worker and in the object store."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    start_ray(num_cpus=3)
    few = read_manifest(manifest_path).rows
    many = pa.concat_tables([few] * (rows // len(few) + 1)).slice(0, rows).combine_chunks()
    for name, table in (("few", few), ("many", many)):
        loader = SplitLoader(table, s16_recipe(manifest_path), True)
        process, peak, store = psutil.Process(), 0, 0.0
        start = time.perf_counter()
        for count, _ in enumerate(loader.batches(0, until=4)):
            if not count:
                first = time.perf_counter() - start
            peak, store = max(peak, process.memory_info().rss), max(store, object_store_usage()[0])
            if count == 40:
                break
        print(
            f"{name:<5}{len(table):>8} rows: first batch after {first:.1f} s; peak {peak / 2**20:.0f} MB resident in"
            f" the worker, peak {store:.0f} MB in the object store, table {table.nbytes / 2**20:.1f} MB",
            flush=True,
        )


# --- small clips -----------------------------------------------------------------------------------------------------


def measure_small(repeats: int) -> None:
    """Print clips/s of an epoch of cached clips: by decode tasks on two CPUs, and on a thread of the worker."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    start_ray(num_cpus=3)  # one is the worker's
    print(f"cached clips per second, median of {repeats} epochs that take turns, on {CPU}\n")
    print(f"{'recipe':<12}{'frames':>7}{'pixels':>8}{'decode tasks':>14}{'in the worker':>15}{'ratio':>7}")
    for name, kind, size in (("reference", "turns", 24), ("demo", "motion", 64)):
        folder = make_motion_set(Path("data", f"small-{kind}"), kind=kind, train=1280, val=16, size=size)
        lists = [f"data.{split}.path={folder}/{split}.csv" for split in ("train", "val")]
        ways = [
            load_recipe(name, [*lists, "data.cache_dir=data/small-cache", f"scaling.decode_in_worker={own}"])
            for own in ("false", "true")
        ]
        rows = read_manifest(folder / "train.csv").rows
        rates: tuple[list[float], list[float]] = ([], [])
        for epoch in range(repeats + 1):
            for config, own_rates in zip(ways, rates, strict=True):
                start = time.perf_counter()
                clips = sum(len(batch.clips) for batch in SplitLoader(rows, config, True).batches(epoch))
                if epoch:  # the first one decodes the videos
                    own_rates.append(clips / (time.perf_counter() - start))
        tasks, worker = map(statistics.median, rates)
        variant = ways[0].model.variant()
        print(
            f"{name:<12}{variant.frames:>7}{variant.image_size:>8}{tasks:>14.0f}{worker:>15.0f}{worker / tasks:>7.1f}",
            flush=True,
        )


# --- conversion ------------------------------------------------------------------------------------------------------


def measure_conversion(repeats: int) -> None:
    """Print the time to convert 16 frames to RGB, by ``convert`` and by PyAV's own call, which take turns."""
    noise = np.random.default_rng(0).integers(256, size=(HEIGHT, WIDTH, 3), dtype=np.uint8)
    ways: dict[str, Callable[[av.VideoFrame, int, int], object]] = {
        "of the thread": lambda frame, height, width: convert(frame, height, width, "rgb24").to_ndarray(),
        "for each frame": lambda frame, height, width: frame.to_ndarray(
            format="rgb24", height=height, width=width, interpolation="BILINEAR"
        ),
    }
    print(f"ms for 16 frames of {WIDTH}x{HEIGHT}, median of {repeats} turns, on {CPU}\n")
    print(f"{'short side':>10}" + "".join(f"{name:>18}" for name in ways) + f"{'ratio':>8}")
    for short_side in (256, 128, 24):
        size = scaled_size(HEIGHT, WIDTH, short_side)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _, (name, way) in itertools.product(range(repeats + 1), ways.items()):
            picture = av.VideoFrame.from_ndarray(noise, format="rgb24")
            frames = [picture.reformat(format="yuv420p", threads=1) for _ in range(16)]  # each without a scaler
            start = time.perf_counter()
            for frame in frames:
                way(frame, *size)
            times[name].append(1000 * (time.perf_counter() - start))
        ours, own = (statistics.median(each[1:]) for each in times.values())
        print(f"{short_side:>10}{ours:>18.2f}{own:>18.2f}{own / ours:>8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("throughput", "settings", "memory", "small", "conversion"))
    parser.add_argument("--manifest", type=Path, help="a list of videos (default: videos that the script makes)")
    parser.add_argument(
        "--videos", type=int, default=64, help="number of videos that the script makes (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.part == "small":
        measure_small(args.repeats)
        return
    if args.part == "conversion":
        measure_conversion(args.repeats)
        return
    manifest = args.manifest or make_videos(Path("data/ingest"), args.videos)
    if args.part == "throughput":
        measure_throughput(manifest, args.repeats)
    elif args.part == "settings":
        measure_settings(manifest, args.repeats)
    else:
        measure_memory(manifest, 100_000)


if __name__ == "__main__":
    main()
