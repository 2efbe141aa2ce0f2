"""Drawn clips of strokes, to pretrain on before a small set of gestures: an arm draws a path in the air.

A path is one straight stroke, two or three strokes at right angles that turn to the same side (each in eight
directions), or a circle. So a class is a sequence of motions; a class of ``posmlp.video.motion`` is a single motion.
Strokes are slightly bent and tilted and vary in speed, and the arm may rest before and after. The arm leaves the
picture where its path does. The camera shakes, and light and colours vary as between rooms, day and night.
"""

from __future__ import annotations

import math
from math import tau

import numpy as np

COMPASS = ("e", "se", "s", "sw", "w", "nw", "n", "ne")  # clockwise on the screen; south is down
RIGHT_ANGLES = (2, -2)  # in eighths of a turn
PATHS: tuple[tuple[int, ...], ...] = (
    *((d,) for d in range(8)),
    *((d, (d + turn) % 8) for d in range(8) for turn in RIGHT_ANGLES),
    *((d, (d + turn) % 8, (d + 2 * turn) % 8) for d in range(8) for turn in RIGHT_ANGLES),
)
CIRCLES = ("clockwise", "counterclockwise")
STROKE_CLASSES: tuple[str, ...] = (*("-".join(COMPASS[d] for d in path) for path in PATHS), *CIRCLES)

TILT = 0.3  # largest angle between a stroke and its nominal direction, in radians
BEND = 0.15  # largest height of a stroke's arc above its chord, as a share of the chord
LENGTH = (0.25, 0.6)  # of a stroke, in frame sizes
CIRCLE_RADIUS = (0.12, 0.32)
REST = (-0.15, 0.3)  # rest before and after the path, as a share of the clip; negative: that end of the path is cut off
MARGIN = 0.05  # distance of the path from the border, in frame sizes, where it fits
TREMBLE = 0.006  # standard deviation of the finger tip's position in a frame, in frame sizes
SHAKE = 0.5 / 64  # largest standard deviation of the camera's movement between two frames, in frame sizes
ROAM = 1 / 8  # largest distance of the camera from its start, in frame sizes
GRAIN = (40, 16, 6, 2)  # cell sizes of the background's textures, in pixels of a 64-pixel frame
# Half the width of an arm along it, both in frame sizes: finger tip, finger, knuckles, hand, wrist, forearm.
ALONG = np.array([0, 0.02, 0.10, 0.13, 0.25, 0.32, 1.5])
HALF_WIDTH = np.array([0.012, 0.018, 0.02, 0.06, 0.065, 0.045, 0.055])
SKIN = np.array([0.75, 0.55, 0.42])


def render_stroke(label: int, rng: np.random.Generator, *, size: int = 64, frames: int = 24) -> np.ndarray:
    """Draw one clip: uint8 [T, H, W, 3], RGB.

    Raises:
        ValueError: ``label`` is not a class.
    """
    if not 0 <= label < len(STROKE_CLASSES):
        raise ValueError(f"label {label} is not a class of strokes (0 to {len(STROKE_CLASSES) - 1})")
    clip = _film_shaking(_draw_background(rng, size), rng, size, frames)
    path = _draw_path(label, rng, frames)
    low, high = path.min(0), path.max(0)
    ends = np.sort([MARGIN - low, 1 - MARGIN - high], axis=0)
    tip = path + rng.uniform(ends[0], ends[1]) + rng.normal(0, TREMBLE, (frames, 2))
    arm, cover = _draw_arm(tip, rng, size)
    clip += (arm - clip) * cover
    change = rng.uniform(-0.1, 0.1) * np.linspace(-1, 1, frames) + rng.normal(0, 0.01, frames)
    light = (rng.uniform(0.4, 1.1) * (1 + change)).astype(np.float32)
    noise = rng.standard_normal((frames, size, size, 1), dtype=np.float32) * rng.uniform(0.5, 4)
    return np.clip(np.rint(clip * (255 * light)[:, None, None, None] + noise), 0, 255).astype(np.uint8)


def _draw_path(label: int, rng: np.random.Generator, frames: int) -> np.ndarray:
    """Path of the finger tip relative to its start: [T, (x, y)] in frame sizes; y points down."""
    start, rest = rng.uniform(*REST, 2)
    progress = np.clip((np.linspace(0, 1, frames) - start) / (1 - rest - start), 0, 1)  # [T]
    if label >= len(PATHS):
        turn = rng.uniform(0.8, 1.2) * tau * (1 if STROKE_CLASSES[label] == "clockwise" else -1)
        angle = rng.uniform(0, tau) + turn * progress
        width = rng.uniform(0.8, 1.25)
        return rng.uniform(*CIRCLE_RADIUS) * np.stack([width * np.cos(angle), np.sin(angle)], axis=1)
    times = np.cumsum(rng.uniform(0.6, 1.4, len(PATHS[label])))
    times = np.concatenate([[0], times / times[-1]])
    length, path = rng.uniform(*LENGTH), np.zeros((frames, 2))
    for direction, begin, end in zip(PATHS[label], times, times[1:], strict=False):
        angle = direction * tau / 8 + rng.uniform(-TILT, TILT)
        done, ease = np.clip((progress - begin) / (end - begin), 0, 1), rng.random()
        done = (1 - ease) * done + ease * (0.5 - 0.5 * np.cos(math.pi * done))
        chord, bow = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        bent = rng.uniform(-BEND, BEND) * np.sin(math.pi * done)
        path += length * rng.uniform(0.75, 1.3) * (done[:, None] * chord + bent[:, None] * bow)
    return path


def _draw_arm(tip: np.ndarray, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An arm with its finger tip at ``tip`` [T, 2].

    Returns:
        float32 [T, H, W, 3], its colours, and float32 [T, H, W, 1], the share of each pixel that it covers.
    """
    scale = rng.uniform(0.6, 1.9)
    angle = math.pi / 2 + 0.2 - (rng.uniform(0, 1.2) if rng.random() < 0.7 else rng.uniform(0, tau))  # tip to elbow
    angles = angle + np.cumsum(rng.normal(0, 0.03, len(tip)))
    cos, sin = (f(angles).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = grid[None, None, :] - tip[:, 0, None, None].astype(np.float32)  # [T, 1, W]
    y = grid[None, :, None] - tip[:, 1, None, None].astype(np.float32)  # [T, H, 1]
    along, aside = x * cos + y * sin, y * cos - x * sin  # [T, H, W], from the tip
    half = np.interp(along, ALONG * scale, HALF_WIDTH * scale).astype(np.float32)
    inside = np.where(along < 0, HALF_WIDTH[0] * scale - np.hypot(along, aside), half - np.abs(aside))
    stripes = rng.uniform(0.1, 0.4) * np.sin(tau * (along * rng.uniform(1, 4) + rng.random()))
    shade = 1 + stripes + rng.uniform(-4, 4) * aside  # light from one side
    colour = SKIN * rng.uniform(0.3, 1.25) + rng.uniform(-0.12, 0.12, 3)
    cover = np.clip(0.5 + inside * size, 0, 1)
    return (shade[..., None] * colour).astype(np.float32), cover[..., None].astype(np.float32)


def _draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Textures of several cell sizes, smooth or in squares: float32 [N, N, 3], with room for the camera to move."""
    side = size + 2 * math.ceil(ROAM * size)
    strength = rng.uniform(0, 0.4)
    picture = np.full((side, side, 3), rng.uniform(0.15, 0.85), np.float32)
    picture += rng.uniform(-0.15, 0.15, 3).astype(np.float32)
    for grain in GRAIN:
        cells = max(2, round(side * 64 / (grain * size)))
        values = rng.random((cells + 1, cells + 1, 3), dtype=np.float32) - 0.5
        if rng.random() < 0.7:
            values = values.mean(-1, keepdims=True)  # more grey than colour
        position = np.arange(side) * cells / side
        low, part = position.astype(int), (position % 1).astype(np.float32) * (rng.random() < 0.6)  # part 0: squares
        rows = values[low] + part[:, None, None] * (values[low + 1] - values[low])
        texture = rows[:, low] + part[:, None] * (rows[:, low + 1] - rows[:, low])
        picture += np.float32(strength * rng.random()) * texture
    return picture


def _film_shaking(picture: np.ndarray, rng: np.random.Generator, size: int, frames: int) -> np.ndarray:
    """A picture as a shaking camera films it: float32 [T, H, W, 3]."""
    room = len(picture) - size - 1
    moves = rng.normal(0, rng.uniform(0, SHAKE) * size, (frames, 2))
    positions = np.clip(np.cumsum(moves, 0) + room / 2, 0, room - 1e-3)
    clip = np.empty((frames, size, size, 3), np.float32)
    for frame, (top, left) in zip(clip, positions, strict=True):
        (y, down), (x, right) = ((int(value), np.float32(value % 1)) for value in (top, left))
        seen = picture[y : y + size + 1, x : x + size + 1]
        seen = seen[:-1] + down * (seen[1:] - seen[:-1])
        frame[:] = seen[:, :-1] + right * (seen[:, 1:] - seen[:, :-1])
    return clip
