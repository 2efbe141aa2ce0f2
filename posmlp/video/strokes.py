"""Drawn clips of strokes, to pretrain on before a small set of gestures: an arm draws a path in the air.

A path is one straight stroke in one of eight directions, two strokes with a clear bend between them, three strokes that
turn to one side or zigzag, or a circle. So a class is a sequence of motions; a class of ``posmlp.video.motion`` is a
single motion.

All else varies, as between people, rooms and cameras. Strokes are slightly bent and tilted, of unequal length and
speed. The arm may rest before, between and after them, come into the picture first, and leave it in the end; it also
leaves where its path does. Hands have several forms, and a second arm may be there. The camera shakes and turns. Other
things move behind the arm and in front of it. Fast motion may be blurred. Light and colours vary.
"""

from __future__ import annotations

import math
from math import tau

import numpy as np

COMPASS = ("e", "se", "s", "sw", "w", "nw", "n", "ne")  # clockwise on the screen; south is down
BENDS = (2, 3, 4, -3, -2)  # between two strokes, in eighths of a turn
TURNS = ((2, 2), (-2, -2), (3, -3), (-3, 3))  # between three strokes: to one side, or a zigzag
PATHS: tuple[tuple[int, ...], ...] = (
    *((d,) for d in range(8)),
    *((d, (d + bend) % 8) for d in range(8) for bend in BENDS),
    *((d, (d + first) % 8, (d + first + second) % 8) for d in range(8) for first, second in TURNS),
)
CIRCLES = ("clockwise", "counterclockwise")
STROKE_CLASSES: tuple[str, ...] = (*("-".join(COMPASS[d] for d in path) for path in PATHS), *CIRCLES)

TILT = 0.25  # largest angle between a stroke and its nominal direction, in radians
BEND = 0.15  # largest height of a stroke's arc above its chord, as a share of the chord
LENGTH = (0.18, 0.65)  # of a stroke, in frame sizes
UNEQUAL = (-0.9, 0.4)  # log of the share of this length that a stroke of a path has
CIRCLE_RADIUS = (0.1, 0.32)
REST = (-0.15, 0.35)  # rest before and after the path, as a share of the clip; negative: the path's end is cut off
PAUSE = 0.15  # longest rest between two strokes, as a share of the path's time
COMING = (0.3, 1.0)  # distance from which an arm comes, and to which it leaves, in frame sizes
MARGIN = 0.05  # distance of the path from the border, in frame sizes, where it fits
TREMBLE = 0.006  # standard deviation of the finger tip's position in a frame, in frame sizes
SHAKE = 0.5 / 64  # largest standard deviation of the camera's movement between two frames, in frame sizes
PAN = 0.3  # largest distance that the camera turns to one side in a clip, in frame sizes
ROAM = 0.35  # largest distance of the camera from its start, in frame sizes
GRAIN = (40, 16, 6, 2)  # cell sizes of the background's textures, in pixels of a 64-pixel frame
BYSTANDER = (0.03, 0.2)  # half the width and height of a thing that moves behind or in front of the arm
TRAVEL = 0.8  # largest distance that such a thing moves in a clip, in frame sizes
# Half the width of an arm along it, both in frame sizes: finger tip, finger, knuckles, hand, wrist, forearm.
ALONG = np.array([0, 0.02, 0.10, 0.13, 0.25, 0.32, 1.5])
HALF_WIDTHS = np.array(
    [
        [0.012, 0.018, 0.02, 0.06, 0.065, 0.045, 0.055],  # a finger points
        [0.012, 0.018, 0.02, 0.06, 0.065, 0.045, 0.055],
        [0.02, 0.04, 0.045, 0.06, 0.065, 0.045, 0.055],  # several fingers together
        [0.03, 0.055, 0.06, 0.065, 0.065, 0.045, 0.055],  # a flat hand
        [0.05, 0.065, 0.07, 0.07, 0.06, 0.045, 0.055],  # a fist
        [0.006, 0.008, 0.009, 0.04, 0.065, 0.045, 0.055],  # a pen
    ]
)
SKIN = np.array([0.75, 0.55, 0.42])


def render_stroke(label: int, rng: np.random.Generator, *, size: int = 64, frames: int = 24) -> np.ndarray:
    """Draw one clip: uint8 [T, H, W, 3], RGB.

    Raises:
        ValueError: ``label`` is not a class.
    """
    if not 0 <= label < len(STROKE_CLASSES):
        raise ValueError(f"label {label} is not a class of strokes (0 to {len(STROKE_CLASSES) - 1})")
    exposures = 2 if rng.random() < 0.5 else 1  # of a frame: their mean is its motion blur
    clip = _draw_scene(label, rng, size, frames * exposures).reshape(frames, exposures, size, size, 3).mean(1)
    change = rng.uniform(-0.1, 0.1) * np.linspace(-1, 1, frames) + rng.normal(0, 0.01, frames)
    light = (rng.uniform(0.4, 1.1) * (1 + change)).astype(np.float32)
    noise = rng.standard_normal((frames, size, size, 1), dtype=np.float32) * rng.uniform(0.5, 4)
    return np.clip(np.rint(clip * (255 * light)[:, None, None, None] + noise), 0, 255).astype(np.uint8)


def _draw_scene(label: int, rng: np.random.Generator, size: int, frames: int) -> np.ndarray:
    """What a camera sees, before light and noise: float32 [T, H, W, 3], about 0 to 1."""
    clip = _film_shaking(_draw_background(rng, size), rng, size, frames)
    path, rested = _draw_path(label, rng, frames)
    low, high = path.min(0), path.max(0)
    ends = np.sort([MARGIN - low, 1 - MARGIN - high], axis=0)
    tip = path + rng.uniform(ends[0], ends[1]) + rng.normal(0, TREMBLE, (frames, 2))
    for _ in range(rng.integers(3)):
        _draw_bystander(clip, rng)
    if rng.random() < 0.25:
        still = rng.uniform(0, 1, 2) + np.cumsum(rng.normal(0, TREMBLE, (frames, 2)), 0)
        _draw_arm(clip, still, np.zeros(frames), rng)
    _draw_arm(clip, tip, rested, rng)
    if rng.random() < 0.25:
        _draw_bystander(clip, rng)
    return clip


def _draw_path(label: int, rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The path of the finger tip.

    Returns:
        [T, (x, y)] in frame sizes, relative to its start; y points down. And [T]: how far the arm is away in the rests
        before and after the path, 0 (as on the path) to 1.
    """
    start, rest = rng.uniform(*REST, 2)
    time = np.linspace(0, 1, frames)
    progress = np.clip((time - start) / (1 - rest - start), 0, 1)  # [T]
    away = np.zeros(frames)
    if start > 0.1 and rng.random() < 0.5:
        away = np.clip(1 - time / start, 0, 1)
    if rest > 0.1 and rng.random() < 0.5:
        away = away + np.clip(1 - (1 - time) / rest, 0, 1)
    if label >= len(PATHS):
        turn = rng.uniform(0.8, 1.2) * tau * (1 if STROKE_CLASSES[label] == "clockwise" else -1)
        angle = rng.uniform(0, tau) + turn * progress
        width = rng.uniform(0.8, 1.25)
        return rng.uniform(*CIRCLE_RADIUS) * np.stack([width * np.cos(angle), np.sin(angle)], axis=1), away
    count = len(PATHS[label])
    times = np.cumsum(rng.uniform(0.6, 1.4, count))
    times = np.concatenate([[0], times / times[-1]])
    pauses = rng.uniform(0, PAUSE, count) * (rng.random(count) < 0.5)
    length, path = rng.uniform(*LENGTH), np.zeros((frames, 2))
    for direction, begin, end, pause in zip(PATHS[label], times, times[1:], pauses, strict=False):
        angle = direction * tau / 8 + rng.uniform(-TILT, TILT)
        done, ease = np.clip((progress - begin) / ((end - begin) * (1 - pause)), 0, 1), rng.random()
        done = (1 - ease) * done + ease * (0.5 - 0.5 * np.cos(math.pi * done))
        chord, bow = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        bent = rng.uniform(-BEND, BEND) * np.sin(math.pi * done)
        path += length * math.exp(rng.uniform(*UNEQUAL)) * (done[:, None] * chord + bent[:, None] * bow)
    return path, away


def _draw_arm(clip: np.ndarray, tip: np.ndarray, away: np.ndarray, rng: np.random.Generator) -> None:
    """Draw an arm over a clip, in place.

    Args:
        clip: float32 [T, H, W, 3].
        tip: [T, (x, y)], its finger tip, in frame sizes.
        away: [T], how far it is drawn back: 0, not at all, to 1.
    """
    size = clip.shape[1]
    scale = rng.uniform(0.6, 1.9)
    angle = math.pi / 2 + 0.2 - (rng.uniform(0, 1.2) if rng.random() < 0.7 else rng.uniform(0, tau))  # tip to elbow
    back = angle + rng.uniform(-0.5, 0.5)
    tip = tip + (away * rng.uniform(*COMING))[:, None] * np.array([math.cos(back), math.sin(back)])
    angles = angle + np.cumsum(rng.normal(0, 0.03, len(tip)))
    cos, sin = (f(angles).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x = grid[None, None, :] - tip[:, 0, None, None].astype(np.float32)  # [T, 1, W]
    y = grid[None, :, None] - tip[:, 1, None, None].astype(np.float32)  # [T, H, 1]
    along, aside = x * cos + y * sin, y * cos - x * sin  # [T, H, W], from the tip
    widths = rng.choice(HALF_WIDTHS) * np.exp(rng.normal(0, 0.2, len(ALONG)))
    half = np.interp(along, ALONG * scale, widths * scale).astype(np.float32)
    inside = np.where(along < 0, widths[0] * scale - np.hypot(along, aside), half - np.abs(aside))
    stripes = rng.uniform(0.1, 0.4) * np.sin(tau * (along * rng.uniform(1, 4) + rng.random()))
    shade = 1 + stripes + rng.uniform(-4, 4) * aside  # light from one side
    colour = SKIN * rng.uniform(0.3, 1.25) + rng.uniform(-0.12, 0.12, 3)
    colours = np.broadcast_to(colour.astype(np.float32), (*along.shape, 3))
    if rng.random() < 0.6:
        sleeve = (along > scale * rng.uniform(0.28, 0.6))[..., None]
        colours = np.where(sleeve, rng.uniform(0.05, 0.95, 3).astype(np.float32), colours)
    cover = np.clip(0.5 + inside * size, 0, 1)[..., None].astype(np.float32)
    clip += (shade[..., None].astype(np.float32) * colours - clip) * cover


def _draw_bystander(clip: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a rectangle or ellipse that moves on its own over a clip [T, H, W, 3], in place."""
    frames, size = clip.shape[:2]
    start, stop = np.sort(rng.uniform(-0.5, 1.5, 2))
    moved = np.clip((np.linspace(0, 1, frames) - start) / (stop - start + 0.1), 0, 1)
    heading, travel = rng.uniform(0, tau), rng.uniform(0, TRAVEL)
    place = rng.uniform(0, 1, 2) + (moved - 0.5)[:, None] * travel * np.array([math.cos(heading), math.sin(heading)])
    grid = (np.arange(size) + 0.5) / size
    half = rng.uniform(*BYSTANDER, 2)
    x, y = (np.abs(grid - place[:, axis, None]) for axis in (0, 1))  # [T, W], [T, H]
    if rng.random() < 0.5:
        x, y = (np.clip(0.5 + (edge - distance) * size, 0, 1) for edge, distance in zip(half, (x, y), strict=True))
        cover = y[:, :, None] * x[:, None]
    else:
        distance = np.hypot((x / half[0])[:, None], (y / half[1])[:, :, None])
        cover = np.clip(0.5 + (1 - distance) * half.min() * size, 0, 1)
    shade = 1 + rng.uniform(0, 0.4) * np.sin(tau * rng.uniform(0, 10) * (grid - place[:, :1]))  # [T, W]
    colours = shade[:, None, :, None] * rng.uniform(0.05, 0.95, 3)
    clip += ((colours - clip) * cover[..., None]).astype(np.float32)


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
    moves = rng.normal(0, rng.uniform(0, SHAKE) * size * math.sqrt(24 / frames), (frames, 2))
    begin, end = rng.uniform(-math.pi / 2, math.pi / 2, 2)
    turn = np.sin(np.linspace(begin, end, frames))[:, None]
    heading = rng.uniform(0, tau)
    pan = turn * rng.uniform(0, PAN) * size * np.array([math.sin(heading), math.cos(heading)])
    positions = np.clip(np.cumsum(moves, 0) + pan + room / 2, 0, room - 1e-3)
    clip = np.empty((frames, size, size, 3), np.float32)
    for frame, (top, left) in zip(clip, positions, strict=True):
        (y, down), (x, right) = ((int(value), np.float32(value % 1)) for value in (top, left))
        seen = picture[y : y + size + 1, x : x + size + 1]
        seen = seen[:-1] + down * (seen[1:] - seen[:-1])
        frame[:] = seen[:, :-1] + right * (seen[:, 1:] - seen[:, :-1])
    return clip
