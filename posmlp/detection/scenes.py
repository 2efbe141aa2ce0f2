"""The embedded detection set: drawn actors whose actions can mostly be told from motion alone.

A video is a row of one-second shots around whole seconds, its key seconds, with a cut half-way between two of them. In
a shot, two or three textured actors move over a soft, slowly drifting background. Each has a box and two or three
actions: it moves left, right, up or down; it turns clockwise, counterclockwise or not at all; and it is round or
angular. At 16 frames a second, a clip of 8 frames x stride 2 around a key second lies within one shot.

What can be known without motion: 2 of the 8 classes, the outlines, which are 38 % of the labels. The place, size and
angle of an actor at the key second, when its box is drawn, do not depend on how it moves. Played backwards, such a clip
is a clip with the same boxes and the opposite actions, as likely as the first. So a model that sees the frames in
random order can tell left or right from up or down, and turning from not turning, but not the two actions of a pair
apart. Ranked at random among what is possible, an action has an average precision of about its share: a model of single
frames reaches a mAP of (2 + 4/4 + 2/3) / 8 = 0.46, one of unordered frames (2 + 6/2) / 8 = 0.63, and a perfect one 1;
with the person boxes in place of the true ones, 0.45, 0.61 and 0.97 (``tests/unit/detection/test_scenes.py``).

The set has AVA's layout (``posmlp.detection.lists``): ``videos/*.mp4``; for each split the ground truth
(``train.csv``), the boxes of a person detector (``train_boxes.csv``) and the key frames to leave out
(``train_excluded.csv``); and the label map ``actions.pbtxt``, whose types put motions, turns and outlines into three
groups. Person boxes are a little off, some actors have none above the usual threshold of 0.8, and some boxes show
nobody. The excluded key frames have wrong actions.

A mirrored clip has other actions, so train on this set without flips, or with ``augment.flip_classes``.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import tau
from pathlib import Path

import numpy as np

from posmlp.errors import UserError
from posmlp.video.motion import (
    ANGLES,
    OUTLINES,
    Shape,
    Trajectory,
    complete_set,
    draw_background,
    expose,
    is_complete_set,
    write_video,
)

MOVES = ("left", "right", "up", "down")
TURNS = ("clockwise", "counterclockwise")
KINDS = {"round": (0,), "angular": (1, 4, 6)}  # outlines of ``motion.OUTLINES``: ellipse; triangle, star, cross
ACTIONS: tuple[tuple[str, str], ...] = (  # name and type of each action, in the order of the ids from 1
    *((f"moves {move}", "PERSON_MOVEMENT") for move in MOVES),
    *((f"turns {turn}", "OBJECT_MANIPULATION") for turn in TURNS),
    *((f"is {kind}", "PERSON_INTERACTION") for kind in KINDS),
)
RATE = 16  # frames per second, and of a shot
FIRST_SECOND = 900  # of the lists, at the start of each video
SET_VERSION = 1  # increase it when a change alters the set

CLIP = 7  # frames before and after the middle of a clip of 8 frames x stride 2, which is a frame before the key second
REST = 1 / CLIP  # the actors rest from a frame before the middle to the key second
ACTORS = (2, 3)
RADIUS = (0.11, 0.14)  # circumradius; lengths are in frame sizes
MARGIN = 0.16  # smallest distance of an actor's centre from the border at the key second
SPACING = 0.34  # smallest distance between the centres of two actors then
TRAVEL = (0.16, 0.26)  # distance that an actor moves in a clip
AIM = math.radians(10)  # largest angle between its path and the nominal direction
SPIN = (math.radians(110), math.radians(220))  # rotation of a turning actor in a clip
STRAY_TURN = math.radians(8)  # largest rotation of another one

JITTER = 0.012  # standard deviation of a person box's corners, in sides of the box
MISSED, MISSED_SCORE, FOUND_SCORE = 0.03, (0.2, 0.79), (0.85, 1.0)  # share of actors with a low score; ranges of scores
FALSE_LOW, FALSE_HIGH = 0.1, 0.03  # boxes a key frame that show nobody, with a low score and with one above 0.8
EXCLUDED_EVERY = 10  # videos; the first key second of each of them is excluded


@dataclass(frozen=True)
class Actor:
    """An actor of a shot. Place and angle are those of the key second.

    Attributes:
        heading, angle: in radians, clockwise as seen on the screen, from the right.
        travel, spin: what it moves and turns in a clip.
        actions: ids.
    """

    shape: Shape
    x: float
    y: float
    radius: float
    angle: float
    heading: float
    travel: float
    spin: float
    actions: tuple[int, ...]

    def opposite(self) -> Actor:
        """The actor that does the same backwards."""
        moves, turns = len(MOVES), len(TURNS)
        pairs = {i + 1: (i ^ 1) + 1 for i in range(moves + turns)}
        actions = tuple(pairs.get(action, action) for action in self.actions)
        return replace(self, travel=-self.travel, spin=-self.spin, actions=actions)

    def path(self, frames: np.ndarray) -> Trajectory:
        """Its poses in frames, which count from the middle of the clip: int ``[T]``."""
        time = frames / CLIP  # -1 to 1 in a clip
        progress = np.sign(time) * np.maximum(np.abs(time) - REST, 0) / (1 - REST) / 2
        progress = progress.astype(np.float32)
        return Trajectory(
            x=self.x + self.travel * math.cos(self.heading) * progress,
            y=self.y + self.travel * math.sin(self.heading) * progress,
            radius=np.full_like(progress, self.radius),
            angle=self.angle + self.spin * progress,
        )

    def box(self) -> tuple[float, float, float, float]:
        """Its bounding box at the key second: x1, y1, x2, y2 as fractions of the frame."""
        reach = self.radius * OUTLINES[self.shape.kind]
        x, y = self.x + reach * np.cos(ANGLES + self.angle), self.y + reach * np.sin(ANGLES + self.angle)
        x1, y1, x2, y2 = (float(min(max(v, 0.0), 1.0)) for v in (x.min(), y.min(), x.max(), y.max()))
        return x1, y1, x2, y2


def draw_actors(rng: np.random.Generator) -> list[Actor]:
    """The actors of a shot: places that do not depend on actions, and actions that do not depend on each other."""
    count = int(rng.integers(*ACTORS, endpoint=True))
    while True:
        places = rng.uniform(MARGIN, 1 - MARGIN, (count, 2))
        distances = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) + np.eye(count)
        if distances.min() >= SPACING:
            break
    return [draw_actor(rng, *place) for place in places.tolist()]


def draw_actor(rng: np.random.Generator, x: float, y: float) -> Actor:
    """An actor at a place."""
    move, turn, kind = int(rng.integers(4)), int(rng.integers(3)), int(rng.integers(2))
    outlines = tuple(KINDS.values())[kind]
    shape = replace(Shape.draw(rng), kind=outlines[rng.integers(len(outlines))])
    spin = (rng.uniform(*SPIN), -rng.uniform(*SPIN), rng.uniform(-STRAY_TURN, STRAY_TURN))[turn]
    actions = (1 + move, *((1 + len(MOVES) + turn,) if turn < len(TURNS) else ()), 1 + len(MOVES) + len(TURNS) + kind)
    return Actor(
        shape=shape,
        x=x,
        y=y,
        radius=rng.uniform(*RADIUS),
        angle=rng.uniform(0, tau),
        heading=(math.pi, 0.0, -math.pi / 2, math.pi / 2)[move] + rng.uniform(-AIM, AIM),
        travel=rng.uniform(*TRAVEL),
        spin=spin,
        actions=actions,
    )


def paint_actors(clip: np.ndarray, actors: Iterable[Actor], frames: np.ndarray) -> None:
    """Paint actors over a background, float32 ``[T, H, W, 3]``; ``frames`` are as for ``Actor.path``."""
    for actor in actors:
        actor.shape.paint(clip, actor.path(frames), wraps=False)


def render_shot(actors: Iterable[Actor], rng: np.random.Generator, size: int) -> np.ndarray:
    """The 16 frames of a shot, uint8 ``[16, H, W, 3]``: from 8 before the key second to 7 after it."""
    clip = draw_background(rng, size, RATE)
    paint_actors(clip, actors, np.arange(RATE) - CLIP)
    return expose(clip, rng)


def make_scene_set(
    folder: str | Path, *, train: int = 40, val: int = 10, seconds: int = 20, size: int = 80, seed: int = 0
) -> Path:
    """Write ``train`` + ``val`` videos of ``seconds`` key seconds each, with their lists; return the folder.

    The key seconds of a list start at ``FIRST_SECOND + 1``, a second after the start of the video
    (``detection.first_second`` 900). Each video has its own random stream. A folder that already holds the same set is
    left unchanged. ``scenes.json`` is written last: a folder without it comes from a killed run, and is drawn again.

    Raises:
        UserError: an odd or too small size, a split without videos, or a folder that holds anything else.
    """
    if size < 32 or size % 2:
        raise UserError(f"size must be even and at least 32, not {size}")
    if min(train, val, seconds) < 1:
        raise UserError(f"a set needs at least one video of one second in each split, not {train}, {val}, {seconds}")
    folder, counts = Path(folder), {"train": train, "val": val}
    settings = {"version": SET_VERSION, **counts, "seconds": seconds, "size": size, "seed": seed}
    record = json.dumps(settings, indent=2) + "\n"
    videos = {split: [f"{split}_{i:03d}" for i in range(count)] for split, count in counts.items()}
    files = {f"videos/{video}.mp4" for names in videos.values() for video in names} | {"actions.pbtxt"}
    files |= {f"{split}{kind}.csv" for split in counts for kind in ("", "_boxes", "_excluded")}
    if is_complete_set(folder, files, "scenes", record):
        return folder

    (folder / "scenes.json").unlink(missing_ok=True)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    blocks = [
        f'label {{\n  name: "{name}"\n  label_id: {number}\n  label_type: {kind}\n}}\n'
        for number, (name, kind) in enumerate(ACTIONS, start=1)
    ]
    (folder / "actions.pbtxt").write_text("".join(blocks))
    for part, (split, names) in enumerate(videos.items()):
        truth, boxes, excluded = ([] for _ in range(3))  # lines
        for number, video in enumerate(names):
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(part, number)))
            shots = [draw_actors(rng) for _ in range(seconds + 2)]  # the first and the last one are cut in half
            frames = np.concatenate([render_shot(actors, rng, size) for actors in shots])
            write_video(folder / "videos" / f"{video}.mp4", frames[RATE // 2 : -RATE // 2], fps=RATE)
            for second, actors in enumerate(shots[1:-1], start=FIRST_SECOND + 1):
                key = [video, f"{second:04d}"]
                if second == FIRST_SECOND + 1 and number % EXCLUDED_EVERY == 0:
                    excluded.append(key)
                    actors = [actor.opposite() for actor in actors]
                for person, actor in enumerate(actors):
                    corners = [f"{value:.3f}" for value in actor.box()]
                    truth += [[*key, *corners, action, person] for action in actor.actions]
                boxes += [[*key, *row] for row in draw_person_boxes(actors, rng, split == "train")]
        for kind, lines in (("", truth), ("_boxes", boxes), ("_excluded", excluded)):
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(lines)
            (folder / f"{split}{kind}.csv").write_text(text.getvalue())
    complete_set(folder, "scenes", record)
    return folder


def draw_person_boxes(
    actors: Iterable[Actor], rng: np.random.Generator, with_actions: bool
) -> list[tuple[str | int, ...]]:
    """The boxes that a person detector finds at a key second: x1, y1, x2, y2, action and score of each line.

    With actions, a box has those of its actor if their intersection over union is at least 0.9, else -1.
    """
    found: list[tuple[str | int, ...]] = []

    def add(box: np.ndarray, actions: Iterable[int | str], low: float, high: float) -> None:
        corners, score = [f"{value:.3f}" for value in box.clip(0, 1)], f"{rng.uniform(low, high):.4f}"
        found.extend((*corners, action, score) for action in actions)

    for actor in actors:
        box = np.array(actor.box())
        near = box + rng.normal(0, JITTER, 4) * np.tile(box[2:] - box[:2], 2)
        labelled = actor.actions if overlap(box, near) >= 0.9 else (-1,)
        missed = rng.random() < MISSED
        add(near, labelled if with_actions else ("",), *(MISSED_SCORE if missed else FOUND_SCORE))
    for share, low, high in ((FALSE_LOW, 0.05, 0.79), (FALSE_HIGH, 0.81, 0.95)):
        if rng.random() < share:
            corner, extent = rng.uniform(0, 0.7, 2), rng.uniform(0.15, 0.3, 2)
            add(np.concatenate([corner, corner + extent]), (-1,) if with_actions else ("",), low, high)
    return found


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes, ``[4]`` each."""
    shared = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
    return float(shared / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared))
