"""Measure what a key frame costs to decode: from a 15-minute film, and from the segment that is packed for it.

    python benchmarks/key_frames.py

The film is drawn once (``data/film``): H.264 of 340x256 at 30 frames a second, a key frame every 250 frames. The same
key frames are decoded from both in turns, in random order, for training clips of the recipe ava_s16. The figures are
medians, on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.data.shard import SEGMENTS, ShardSettings, pack_key_frames
from posmlp.config import Config, load_recipe
from posmlp.detection.clips import load_key_clip
from posmlp.detection.segments import SegmentClip
from posmlp.model.cost import device_name
from posmlp.video.isolated import open_isolated

WIDTH, HEIGHT, FPS, SECONDS = 340, 256, 30, 900


def draw_film(path: Path) -> None:
    """Draw a film whose texture drifts, with noise; a cut every 5 s."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, partial = np.random.default_rng(0), path.with_suffix(".tmp")
    noise = rng.integers(0, 24, (HEIGHT + 64, WIDTH + 64, 1), np.uint8)
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * FPS):
            if number % (5 * FPS) == 0:
                coarse = torch.from_numpy(rng.random((1, 3, 24, 32), dtype=np.float32))
                fine = torch.nn.functional.interpolate(coarse, (HEIGHT + 160, WIDTH + 160), mode="bicubic")[0]
                texture = (fine.clamp(0, 1).permute(1, 2, 0).numpy() * 200).astype(np.uint8)
            shift, (dy, dx) = number % (5 * FPS), rng.integers(0, 64, 2)
            grain = noise[dy : dy + HEIGHT, dx : dx + WIDTH]
            picture = texture[shift : shift + HEIGHT, shift : shift + WIDTH] + grain
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)


def pack_film(film: Path, seconds: list[int], config: Config, path: Path) -> list[float]:
    """Pack the key frames as ``posmlp data shard`` does. Returns their times in the segments."""
    rows = [{"sample_id": f"f,{s:04d}", "uri": str(film), "frames": None, "label": None, "time": s} for s in seconds]
    settings = ShardSettings(clip=SegmentClip.of_recipe(config))
    times = []
    with pq.ParquetWriter(path, SEGMENTS, compression="none") as writer:
        for row, packed in pack_key_frames(rows, settings):
            if isinstance(packed, str):
                raise SystemExit(f"{film}: {packed}")
            times.append(packed["time"])
            named = {"sample_id": row["sample_id"], "label": None}
            writer.write_table(pa.Table.from_pylist([named | packed], schema=SEGMENTS))
    return times


def milliseconds(work: Callable[[], object]) -> float:
    """Time of a call."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def open_film(film: Path) -> None:
    with open_isolated(str(film), timeout_s=60):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key-frames", type=int, default=60, help="number of key frames (default: %(default)s)")
    args = parser.parse_args()
    film, shard = Path("data/film/film.mp4").absolute(), Path("data/film/segments.parquet").absolute()
    draw_film(film)
    config = load_recipe("ava_s16", ["data.decode_timeout_s=60"])
    rng = np.random.default_rng(0)
    seconds = sorted(rng.choice(np.arange(2, SECONDS - 2), args.key_frames, replace=False).tolist())
    start = time.perf_counter()
    times = pack_film(film, seconds, config, shard)
    packing = 1e3 * (time.perf_counter() - start) / len(seconds)

    def load(uri: str, number: int, when: float) -> float:
        sample = f"f,{seconds[number]:04d}"
        return milliseconds(lambda: load_key_clip(uri, sample, when, config, epoch=0, train=True))

    of_film, of_segment, of_open = ([] for _ in range(3))
    for number in rng.permutation(len(seconds)).tolist():
        of_film.append(load(str(film), number, seconds[number]))
        of_segment.append(load(f"{shard}#{number}", number, times[number]))
        of_open.append(milliseconds(lambda: open_film(film)))
    size = f"{film.stat().st_size / 1e6:.0f} MB"
    print(
        f"{device_name(torch.device('cpu'))}; {SegmentClip.of_recipe(config)}, film of {SECONDS / 60:.0f} min, {size}"
    )
    opening = f"(opening it: {statistics.median(of_open):.1f})"
    print(f"from the film     {statistics.median(of_film):7.1f} ms per key frame {opening}")
    print(f"from its segment  {statistics.median(of_segment):7.1f} ms per key frame")
    print(f"packing           {packing:7.1f} ms and {shard.stat().st_size / len(seconds) / 1e3:.0f} KB per key frame")


if __name__ == "__main__":
    main()
