"""Draw a folder of videos as people have them: of mixed sizes, frame rates and lengths, one folder per class.

    python benchmarks/mixed_videos.py clips

The classes are those of the embedded motion set. One class is rare, and one file is cut off. The folder is the example
of docs/own_videos.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import numpy as np

from posmlp.video.motion import MOTION_CLASSES, render_motion, write_video

SIZES = ((160, 120), (128, 96), (96, 128), (112, 112), (176, 100))  # width and height in pixels
RATES = (10, 12, 15, 25, 30)  # frames per second
SECONDS = (1.5, 3.0)
RARE = 4  # the last class has this part of the videos of the others


def draw_folder(out: Path, per_class: int, seed: int = 0) -> int:
    """Draw the videos ``out/CLASS/000.mp4``, ...; returns their number."""
    count = 0
    for label, name in enumerate(MOTION_CLASSES):
        folder = out / name
        folder.mkdir(parents=True)
        number = per_class if label < len(MOTION_CLASSES) - 1 else max(2, per_class // RARE)
        for index in range(number):
            (width, height), rate = SIZES[(index + label) % len(SIZES)], RATES[(index + 2 * label) % len(RATES)]
            rng = np.random.default_rng([seed, label, index])
            frames = round(rng.uniform(*SECONDS) * rate)
            clip = render_motion(label, rng, size=96, frames=frames)
            images = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in clip]
            scaled = [image.reformat(width=width, height=height).to_ndarray() for image in images]
            write_video(folder / f"{index:03d}.mp4", np.stack(scaled), rate)
            count += 1
    cut = out / MOTION_CLASSES[0] / "000.mp4"
    cut.write_bytes(cut.read_bytes()[:300])
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder; it must not exist")
    parser.add_argument("--per-class", type=int, default=24, help="videos of a class (default: %(default)s)")
    args = parser.parse_args()
    print(f"{draw_folder(args.out, args.per_class)} videos of {len(MOTION_CLASSES)} classes in {args.out}")


if __name__ == "__main__":
    main()
