"""Show frames of a video side by side, as PNG.

``python benchmarks/film_strip.py VIDEO OUT.png SECOND [SECOND ...]``
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image

from posmlp.video.decode import open_video


def main() -> None:
    """Write the frames that are shown at the seconds, from the start of the video."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video")
    parser.add_argument("out")
    parser.add_argument("seconds", type=float, nargs="+")
    args = parser.parse_args()
    video = open_video(args.video)
    times = video.info.times
    numbers = [int(np.searchsorted(times, second + 1e-3, side="right")) - 1 for second in args.seconds]
    frames = dict(zip(sorted(set(numbers)), video.read(sorted(set(numbers))), strict=True))
    Image.fromarray(np.concatenate([frames[number] for number in numbers], axis=1)).save(args.out)


if __name__ == "__main__":
    main()
