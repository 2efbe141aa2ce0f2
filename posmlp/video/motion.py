"""The embedded motion set: drawn shapes in eight classes that only motion tells apart.

In each clip one textured shape moves over a soft, slowly drifting background. In half of the clips a second shape
stands still. The classes are four pairs, and the second class of a pair is the first played backwards. So, as drawn, a
model that ignores the order of frames cannot tell the two apart.

Across pairs, size and angle in a random frame tell nothing about the class. The position tells only that a shape in a
corner does not rotate, because rotating shapes circle a point near the middle. Angles start anywhere and the picture
wraps round (a shape that leaves on one side returns on the other), so angles and positions are uniform at every moment.
A shape of constant size has the size of a random moment of an approach. A frame whose time is known tells a little
more: an approaching shape starts smaller than a receding one. There is no motion blur, because a blurred frame would
show its direction.

A mirrored clip belongs to another class, so train on this set without flips.

Two more sets have longer motions: in the turns of ``render_turn`` a shape moves in one direction and then in another;
``posmlp.video.strokes`` draws the gestures of an arm. ``make_motion_set`` writes any of them.
"""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import tau
from pathlib import Path
from typing import Any

import av
import numpy as np

from posmlp.errors import UserError
from posmlp.video.strokes import STROKE_CLASSES, render_stroke

MOTION_CLASSES: tuple[str, ...] = ("left", "right", "up", "down", "approach", "recede", "clockwise", "counterclockwise")
DIRECTIONS = ("e", "s", "w", "n")  # clockwise on the screen; south is down
TURN_CLASSES: tuple[str, ...] = tuple(f"{first}-{second}" for first in DIRECTIONS for second in DIRECTIONS)
SPLITS = ("train", "val")
FRAME_RANGE = (20, 28)  # fewest and most frames of a clip in the set
SET_VERSIONS = {"motion": 1, "strokes": 2, "turns": 1}  # increase one when a change alters the clips of that set

TRAVEL = (0.25, 0.6)  # distance that a moving shape covers in a clip, in frame sizes
ZOOM = (1.6, 2.3)  # last size over first size of an approaching shape
SPIN = (math.radians(120), math.radians(270))  # rotation of a rotating shape in a clip
ARM = (0.15, 0.25)  # distance from the pivot of a rotating shape to its centre, in frame sizes
PIVOT = 0.15  # side of the central square that holds the pivot, in frame sizes
RADIUS = (0.12, 0.48)  # range of the circumradius, in frame sizes; from 0.5 on, a shape would wrap into itself
STRAY_DRIFT, STRAY_TURN, STRAY_AIM = 0.03, math.radians(8), math.radians(12)  # motion in addition to that of the class
CAMERA_DRIFT = 0.05  # largest distance that the background drifts in a clip, in frame sizes
RIM = 0.02  # width of the rim of a shape, in frame sizes
SPOT_PLACE, SPOT_RADIUS = 0.3, 0.2  # in radii; the spot lies inside every outline

TURN_TIME = (0.4, 0.6)  # when a turning shape turns, as a share of the clip
LEG = (0.25, 0.4)  # distance that it covers before and after the turn, in frame sizes
LEG_AIM = 0.75  # largest angle between a leg and its nominal direction, in radians: nearly up to the next direction
TURN_RADIUS = (0.1, 0.22)  # its circumradius, in frame sizes
TURN_SPIN = 0.3  # largest angle by which it rotates in a clip, in radians

PART_SUFFIX = ".part"  # of a file that is being written


def render_motion(label: int, rng: np.random.Generator, *, size: int = 64, frames: int = 24) -> np.ndarray:
    """Draw one clip: uint8 [T, H, W, 3], RGB.

    Every class draws the same numbers from `rng`: one seed gives one scene for any label, and the two clips of a pair
    are exact reversals of each other.

    Raises:
        ValueError: `label` is not a class.
    """
    if not 0 <= label < len(MOTION_CLASSES):
        names = ", ".join(MOTION_CLASSES)
        raise ValueError(f"label {label} is not a motion class (0 to {len(MOTION_CLASSES) - 1}: {names})")
    pair, backwards = divmod(label, 2)
    clip = draw_background(rng, size, frames)
    bystander, rest = Shape.draw(rng), _draw_trajectory(0, rng, frames).frozen_at(0)
    mover, trajectory = Shape.draw(rng), _draw_trajectory(pair, rng, frames)
    if rng.random() < 0.5:
        bystander.paint(clip, rest)
    mover.paint(clip, trajectory)
    clip = expose(clip, rng)
    return np.ascontiguousarray(clip[::-1]) if backwards else clip


def render_turn(label: int, rng: np.random.Generator, *, size: int = 64, frames: int = 24) -> np.ndarray:
    """Draw one clip of a shape that moves in one direction and then in another: uint8 [T, H, W, 3], RGB.

    Its whole path lies in the picture. So where the shape is in early and late frames tells the class roughly, and its
    motion tells it exactly. In half of the clips a second shape stands still.

    Raises:
        ValueError: `label` is not a class.
    """
    if not 0 <= label < len(TURN_CLASSES):
        raise ValueError(f"label {label} is not a class of turns (0 to {len(TURN_CLASSES) - 1})")
    clip = draw_background(rng, size, frames)
    bystander, mover = Shape.draw(rng), Shape.draw(rng)
    path = _draw_turn(label, rng, frames)
    if rng.random() < 0.5:
        pose = rng.random(), rng.random(), rng.uniform(*TURN_RADIUS), rng.uniform(0, tau)
        bystander.paint(clip, Trajectory(*(np.full(frames, value, np.float32) for value in pose)))
    mover.paint(clip, path, wraps=False)
    return expose(clip, rng)


def _draw_turn(label: int, rng: np.random.Generator, frames: int) -> "Trajectory":
    """Trajectory of a shape that moves in the first direction of a class and then in the second."""
    time, turn, radius = np.linspace(0, 1, frames), rng.uniform(*TURN_TIME), rng.uniform(*TURN_RADIUS)
    legs = np.clip([time / turn, (time - turn) / (1 - turn)], 0, 1)  # [leg, T]: the share that is covered
    aims = np.array(divmod(label, len(DIRECTIONS))) * tau / len(DIRECTIONS) + rng.uniform(-LEG_AIM, LEG_AIM, 2)
    path = np.stack([np.cos(aims), np.sin(aims)]) * rng.uniform(*LEG, 2) @ legs  # [x and y, T]; y points down
    margin = 0.7 * radius
    ends = np.sort([margin - path.min(1), 1 - margin - path.max(1)], axis=0)
    x, y = path + rng.uniform(*ends)[:, None]
    angle = rng.uniform(0, tau) + rng.uniform(-TURN_SPIN, TURN_SPIN) * time
    return Trajectory(*(value.astype(np.float32) for value in (x, y, np.full(frames, radius), angle)))


@dataclass(frozen=True)
class Trajectory:
    """The pose of a shape in each frame; all float32 [T]. Lengths are in frame sizes, y points down."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray  # radians, clockwise as seen on the screen

    def frozen_at(self, frame: int) -> "Trajectory":
        """The pose of one frame, for the whole clip."""
        return Trajectory(*(np.full_like(value, value[frame]) for value in (self.x, self.y, self.radius, self.angle)))


def _draw_trajectory(pair: int, rng: np.random.Generator, frames: int) -> Trajectory:
    """Trajectory of a shape that moves left (pair 0) or up (1), approaches (2) or rotates clockwise (3)."""
    time = np.linspace(0, 1, frames, dtype=np.float32)
    progress = time + rng.uniform(-0.6, 0.6) * np.sin(tau * time) / tau  # [T], 0 to 1, never decreases: varied speed
    frozen = np.full_like(progress, progress[rng.integers(frames)])

    x, y, angle = rng.random(), rng.random(), rng.uniform(0, tau)
    if pair == 3:
        x, y = 0.5 + PIVOT * (x - 0.5), 0.5 + PIVOT * (y - 0.5)
    travel, aim = rng.uniform(*TRAVEL), rng.uniform(-STRAY_AIM, STRAY_AIM)
    drift, drift_aim = rng.uniform(0, STRAY_DRIFT), rng.uniform(0, tau)
    spin, stray_turn = rng.uniform(*SPIN), rng.uniform(-STRAY_TURN, STRAY_TURN)
    arm, side = rng.uniform(*ARM) * (pair == 3), rng.uniform(0, tau)
    zoom = math.log(rng.uniform(*ZOOM))
    smallest = rng.uniform(math.log(RADIUS[0]), math.log(RADIUS[1]) - zoom)

    distance, heading = (travel, aim - (math.pi, math.pi / 2)[pair]) if pair < 2 else (drift, drift_aim)
    turned = (spin if pair == 3 else stray_turn) * progress
    return Trajectory(
        x=x + distance * math.cos(heading) * progress + arm * np.cos(side + turned),
        y=y + distance * math.sin(heading) * progress + arm * np.sin(side + turned),
        radius=np.exp(smallest + zoom * (progress if pair == 2 else frozen)),
        angle=angle + turned,
    )


ANGLES = np.arange(1024) * tau / 1024  # a power of two: a bit mask wraps an index


def _star(points: int, notch: float) -> np.ndarray:
    """Outline of a star with tips at radius 1 and notches at `notch`; cos(pi / points) makes it a polygon."""
    half = math.pi / points
    from_tip = half - np.abs(ANGLES % (2 * half) - half)
    return notch * math.sin(half) / (np.sin(from_tip) + notch * np.sin(half - from_tip))


def _cross(width: float) -> np.ndarray:
    """Outline of two crossed bars."""
    c, s = np.abs(np.cos(ANGLES)) + 1e-9, np.abs(np.sin(ANGLES)) + 1e-9
    return np.maximum(np.minimum(1 / c, width / s), np.minimum(1 / s, width / c)) / math.hypot(1, width)


OUTLINES = np.stack(  # [kind, angle]: distance from centre to edge, 1 at most
    [
        0.6 / np.hypot(0.6 * np.cos(ANGLES), np.sin(ANGLES)),  # ellipse
        _star(3, 0.5),  # triangle
        _star(4, math.cos(math.pi / 4)),  # square
        _star(6, math.cos(math.pi / 6)),  # hexagon
        _star(4, 0.45),
        _star(5, 0.5),
        _cross(0.4),
        0.78 + 0.22 * np.cos(3 * ANGLES),  # clover
    ]
).astype(np.float32)
# [kind, angle]: distance to the edge / distance along the radius; below 1 where the edge is not at right angles to it.
_SLANTS = 1 / np.hypot(1, (np.roll(OUTLINES, -1, 1) - np.roll(OUTLINES, 1, 1)) / (2 * ANGLES[1] * OUTLINES))
_SLANTS = _SLANTS.astype(np.float32)


@dataclass(frozen=True)
class Shape:
    """Appearance of a shape: an outline, two-coloured stripes and an off-centre spot that shows its angle."""

    kind: int
    colours: np.ndarray  # [stripe, other stripe, spot, rim] x RGB, 0 to 1
    stripes: float  # per radius
    phase: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Shape":
        hue = rng.random() + np.array([0, rng.uniform(0.1, 0.3), rng.uniform(0.4, 0.6), 0])
        saturation = np.array([*rng.uniform(0.55, 0.9, 3), 0.3])
        bright = rng.uniform(0.8, 1.0)
        value = np.array([bright, bright - rng.uniform(0.25, 0.45), 0.95, rng.choice([0.08, 0.95])])
        kind, stripes, phase = int(rng.integers(len(OUTLINES))), rng.uniform(0.7, 1.3), rng.uniform(0, tau)
        return cls(kind, _rgb(hue, saturation, value), stripes, phase)

    def paint(self, clip: np.ndarray, pose: Trajectory, wraps: bool = True) -> None:
        """Paint the shape over `clip`, float32 [T, H, W, 3], anti-aliased by the distance to each edge.

        What leaves the picture on one side returns on the other if it `wraps`.
        """
        size = clip.shape[1]
        grid = (np.arange(size, dtype=np.float32) + 0.5) / size
        x, y = grid - pose.x[:, None], grid - pose.y[:, None]  # from the shape's centre
        if wraps:
            x, y = _wrap(x), _wrap(y)
        x, y = x[:, None, :], y[:, :, None]  # [T, 1, W], [T, H, 1]
        t, i, j = np.nonzero(x * x + y * y < (pose.radius[:, None, None] + 1 / size) ** 2)  # [N]: pixels it may change
        x, y = x[t, 0, j], y[t, i, 0]
        cos, sin = np.cos(pose.angle) / pose.radius, np.sin(pose.angle) / pose.radius
        x, y = cos[t] * x + sin[t] * y, cos[t] * y - sin[t] * x  # [N], in the shape's own axes, in radii
        pixels = pose.radius[t] * size  # pixels in a radius

        bearing = (np.arctan2(y, x) * (len(ANGLES) / tau)).astype(np.int32) & (len(ANGLES) - 1)
        # Pixels from the edge, positive inside. An edge pixel is covered by about 0.5 + this, clipped to 0..1.
        inside = (OUTLINES[self.kind, bearing] - np.hypot(x, y)) * _SLANTS[self.kind, bearing] * pixels
        one, other, spot, rim = self.colours
        colour = _blend(one, other, 0.5 + 1.5 * np.sin(tau * self.stripes * x + self.phase))
        colour = _blend(colour, spot, 0.5 + (SPOT_RADIUS - np.hypot(x - SPOT_PLACE, y)) * pixels)
        colour = _blend(colour, rim, 0.5 + RIM * size - inside)
        clip[t, i, j] = _blend(clip[t, i, j], colour, 0.5 + inside)


def _blend(lower: np.ndarray, upper: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Blend `upper` over `lower` ([N, 3] or [3]) with opacity `cover` [N], clipped to 0..1."""
    return lower + np.clip(cover, 0, 1)[:, None] * (upper - lower)


def _wrap(offset: np.ndarray) -> np.ndarray:
    """The shortest signed distance on a circle of length 1: -0.5 to 0.5."""
    return offset - np.round(offset)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """RGB colours of a smooth colour wheel (hue in turns, [N]): float32 [N, 3], 0 to 1."""
    wheel = 0.5 + 0.5 * np.cos(tau * (hue[:, None] - np.array([0, 1, 2]) / 3))
    return (value[:, None] * (1 - saturation[:, None] * (1 - wheel))).astype(np.float32)


def draw_background(rng: np.random.Generator, size: int, frames: int) -> np.ndarray:
    """A soft coloured texture that drifts a little, as under a hand-held camera: float32 [T, H, W, 3], about 0 to 1.

    It is a sum of waves, sum over k of Re tint_k exp(i (kx x + ky y - kt time)). Each wave factors into time and
    position, so the whole clip is one small matrix product.
    """
    waves = 6
    cycles, heading, phase = rng.uniform(0.3, 3.0, waves), rng.uniform(0, tau, waves), rng.uniform(0, tau, waves)
    kx, ky = tau * cycles * np.cos(heading), tau * cycles * np.sin(heading)
    drift, aim = rng.uniform(0, CAMERA_DRIFT), rng.uniform(0, tau)
    kt = drift * (kx * math.cos(aim) + ky * math.sin(aim))
    tint = rng.normal(size=(waves, 1)) * 0.07 + rng.normal(size=(waves, 3)) * 0.03  # more grey than colour
    tint = tint / np.sqrt(1 + cycles)[:, None] * np.exp(1j * phase)[:, None]  # finer waves are fainter, as in nature
    base = _rgb(rng.random(1), rng.uniform(0, 0.4, 1), rng.uniform(0.3, 0.75, 1))

    grid = np.arange(size) / size
    place = np.einsum("ky,kx,kc->kyxc", np.exp(1j * np.outer(ky, grid)), np.exp(1j * np.outer(kx, grid)), tint)
    time = np.exp(-1j * np.outer(np.linspace(0, 1, frames), kt))  # [T, waves]
    texture = (time @ place.reshape(waves, -1)).real.astype(np.float32)  # [T, H*W*3]
    return base + texture.reshape(frames, size, size, 3)


def expose(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Simulate a camera: the light changes over the clip, the sensor adds noise. float32 [T, H, W, 3] to uint8."""
    change = rng.uniform(-0.15, 0.15)
    light = rng.uniform(0.85, 1.1) + change * np.linspace(-1, 1, len(clip), dtype=np.float32)
    noise = rng.standard_normal(clip.shape[:3], dtype=np.float32) * rng.uniform(1, 6)  # grey: 4:2:0 keeps little else
    clip = clip * (255 * light)[:, None, None, None] + noise[..., None]
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8)


def write_video(path: str | Path, clip: np.ndarray, fps: int = 12) -> None:
    """Encode uint8 [T, H, W, 3] RGB as an H.264 MP4 (yuv420p). `path` appears only when the file is complete.

    Raises:
        ValueError: another dtype or shape, no frames, or an odd height or width.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not len(clip):
        raise ValueError(f"a clip is uint8 [T, H, W, 3] with T > 0, not {clip.dtype} {list(clip.shape)}")
    _, height, width, _ = clip.shape
    if height % 2 or width % 2:
        raise ValueError(f"H.264 in yuv420p needs an even height and width, not {height}x{width}")
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        with av.open(str(part), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps, width=width, height=height, pix_fmt="yuv420p")
            # The same clip must give the same bytes. x264's output depends on its number of threads and, with mbtree
            # on and frames narrower than 64 pixels, on uninitialised memory. Without mbtree and B-frames it also
            # spends its bits more evenly over time, so the encoding tells less about the direction of time.
            stream.options = {"crf": "20", "preset": "veryfast", "g": "12", "bf": "0", "x264-params": "mbtree=0"}
            stream.codec_context.thread_count = 1
            for image in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


EMBEDDED_SETS: dict[str, tuple[tuple[str, ...], Callable[..., np.ndarray]]] = {  # classes, function that draws a clip
    "motion": (MOTION_CLASSES, render_motion),
    "strokes": (STROKE_CLASSES, render_stroke),
    "turns": (TURN_CLASSES, render_turn),
}


def make_motion_set(
    out: str | Path,
    *,
    kind: str = "motion",
    train: int = 640,
    val: int = 160,
    size: int = 64,
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Write `train` + `val` labelled videos, `out`/train.csv and `out`/val.csv (path, label, class); return `out`.

    `kind` is a key of `EMBEDDED_SETS`. Clip i of a split has label i mod the number of classes and its own random
    stream, so the set is the same for any number of processes. A folder that already holds the same set is left
    unchanged. `out`/motion.json is written last: a folder without it comes from a killed run, and is drawn again.

    Raises:
        UserError: an odd or too small size, a split without clips, or a folder that holds anything else.
    """
    if size < 16 or size % 2:
        raise UserError(f"size must be even and at least 16, not {size}")
    if train < 1 or val < 1:
        raise UserError(f"each split needs at least one clip, not train={train}, val={val}")
    out = Path(out)
    classes, counts = EMBEDDED_SETS[kind][0], {"train": train, "val": val}
    settings: dict[str, int | str] = {"version": SET_VERSIONS[kind], **counts, "size": size, "seed": seed}
    if kind != "motion":
        settings["kind"] = kind
    record = json.dumps(settings, indent=2) + "\n"
    wanted = {f"{split}.csv" for split in counts}
    wanted |= {_clip_name(classes, split, i) for split, count in counts.items() for i in range(count)}
    if is_complete_set(out, wanted, "motion", record):
        return out

    (out / "motion.json").unlink(missing_ok=True)
    for split, count in counts.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        with open(out / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["path", "label", "class"])
            labels = [i % len(classes) for i in range(count)]
            writer.writerows([_clip_name(classes, split, i), label, classes[label]] for i, label in enumerate(labels))

    keys = [(split, i) for split, count in counts.items() for i in range(count)]
    workers = processes or min(os.cpu_count() or 1, len(keys) // 256)  # starting a process costs more than fewer clips
    if workers > 1 and sys.executable:  # an embedded interpreter has no executable
        _draw_in_processes(kind, out, size, seed, counts, workers)
    else:
        for key in keys:
            _write_clip(kind, out, size, seed, key)

    complete_set(out, "motion", record)
    return out


def _draw_in_processes(kind: str, out: Path, size: int, seed: int, counts: dict[str, int], workers: int) -> None:
    """Draw all clips of a set in processes, each of which takes every `workers`-th clip.

    They are commands of their own, not children of `multiprocessing`: those import the script that called, which is
    impossible if Python reads it from a pipe, and starts them again without end if it has no `__name__` guard.

    Raises:
        OSError: a process cannot write a clip, or fails otherwise.
    """
    code = "import sys, posmlp.video.motion as m; m._draw_share(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    command = [sys.executable, "-P", "-c", code, kind, os.path.abspath(out), size, seed, *counts.values()]
    # One OpenBLAS thread per process, because its threads wait for each other in a busy loop.
    search = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
    environment = os.environ | search | {"OPENBLAS_NUM_THREADS": "1"}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    drawing = []
    try:
        for share in range(workers):
            words = [str(word) for word in (*command, share, workers, os.getpid())]
            drawing.append(subprocess.Popen(words, env=environment, text=True, **streams))
        for process in drawing:
            _, text = process.communicate()
            if process.returncode:
                last = (text.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                raise OSError(f"the clips of {out} cannot be drawn: {last}")
    finally:
        for process in drawing:
            process.kill()
            process.wait()


def _draw_share(kind: str, out: str, size: int, seed: int, train: int, val: int, share: int, of: int, pid: int) -> None:
    """Draw every clip whose number is `share` modulo `of`; stop if the process `pid` that asked for it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked handles Ctrl-C, and kills this one
    keys = [(split, i) for split, count in zip(SPLITS, (train, val), strict=True) for i in range(count)]
    for key in keys[share::of]:
        if os.getppid() != pid:
            return
        _write_clip(kind, Path(out), size, seed, key)


def is_complete_set(out: Path, files: set[str], name: str, record: str) -> bool:
    """Return whether a folder holds a complete embedded set.

    Args:
        files: paths of the set's files, relative to `out`, without its record.
        name: of the set; its record is `name`.json.
        record: the text that says which set it is.

    Raises:
        UserError: the folder holds something else.
    """
    advice = "choose another folder, or delete this one"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder")
    recorded = out / f"{name}.json"
    if recorded.exists() and recorded.read_text() != record:
        was, asked = (" ".join(text.split()) for text in (recorded.read_text(), record))
        raise UserError(f"{out} holds another {name} set, {was} instead of {asked}: {advice}")
    wanted = files | {recorded.name}
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and p.suffix != PART_SUFFIX}
    if foreign := sorted(found - wanted):
        names = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise UserError(f"{out} holds files that do not belong to this {name} set ({names}): {advice}")
    return found == wanted


def complete_set(out: Path, name: str, record: str) -> None:
    """Write the record of a set, whose files are all there, and remove what a killed run has left."""
    for leftover in out.rglob(f"*.mp4.*{PART_SUFFIX}"):
        leftover.unlink(missing_ok=True)
    part = out / f"{name}.json{PART_SUFFIX}"
    part.write_text(record)
    os.replace(part, out / f"{name}.json")


def _clip_name(classes: tuple[str, ...], split: str, index: int) -> str:
    """Path of a clip, relative to the set's folder."""
    return f"{split}/{classes[index % len(classes)]}_{index:05d}.mp4"


def _write_clip(kind: str, out: Path, size: int, seed: int, key: tuple[str, int]) -> None:
    """Draw and encode clip `key` = (split, index) of the set. Its random stream depends on `seed` and `key` alone."""
    (classes, render), (split, index) = EMBEDDED_SETS[kind], key
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))
    frames = int(rng.integers(*FRAME_RANGE, endpoint=True))
    write_video(out / _clip_name(classes, split, index), render(index % len(classes), rng, size=size, frames=frames))
