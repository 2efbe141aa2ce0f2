"""The embedded set of drawn faces: slight movements whose order alone tells the class, in the layouts of three sets.

In each clip the brows rise, the eyes and the nose tighten, and the corners of the mouth rise: each part once, one after
the other, by a pixel or two, and back to rest. The class is the part that moves first: the brows in a surprise, the
mouth in a positive expression, eyes and nose in a negative one. The other two follow in random order.

What can be known without the order of frames: nothing. A clip is three acts of the same length, one for each part. An
act starts and ends at rest, and holds all else that changes too: a small movement of the head, the flicker of the
light, the noise of the camera. The class only says in which order the acts are joined, so the frames of a clip are the
same whatever its class (``tests/unit/video/test_faces.py``). If the number of sampled frames is a multiple of three,
this holds for the sampled frames too, and a model that sees them in random order is at chance. A mirrored clip has the
same class.

The set has three parts, in the layouts of CASME II (``CASME2``), SAMM (``SAMM``, grey) and the cut clips of SMIC-HS
(``SMIC/HS``), with a few subjects each. A subject has a face, skin, hair and light of its own. Folders of the first two
begin before the onset and end after the offset. There all parts move at once, by more, as a reader that does not keep
to onset and offset would find. Clips of emotions that the composite of three classes leaves out have a random order.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import tau
from pathlib import Path

import numpy as np
import openpyxl
from PIL import Image

from posmlp.errors import UserError
from posmlp.video.motion import complete_set, is_complete_set

PARTS = ("brows", "eyes", "mouth")
FIRST_PART = {"surprise": "brows", "negative": "eyes", "positive": "mouth"}
CLASS_CYCLE = ("negative", "positive", "negative", "surprise")  # of a subject's clips: as in the real sets, unequal
SET_VERSION = 1  # increase it when a change alters the set

ACT_FRAMES = (8, 12)  # fewest and most frames of an act, the movement of one part
REST = (0.35, 0.5)  # of an act, before the movement
HOLD = 1.6  # a movement is half a wave of this height, cut off at 1
AROUND = (3, 6)  # frames before the onset and after the offset
# Lengths are in frame sizes.
RISE = np.array([0.025, 0.018, 0.028])  # typical movement of brows, eyelids and nose, corners of the mouth
STRENGTH = (0.75, 1.25)  # of a movement, relative to the typical one
OUTSIDE = 2.5  # strength of the movements outside onset and offset
SWAY = 0.002  # largest movement of the head in an act
FLICKER = 0.004  # standard deviation of a frame's light
NOISE = (0.5, 2.0)  # standard deviation of the camera's noise, in grey levels


@dataclass(frozen=True)
class Pose:
    """What moves in each frame.

    Attributes:
        parts: float32 ``[T, 3]``, movement of ``PARTS``.
        sway: float32 ``[T, 2]``, movement of the head to the right and down.
    """

    parts: np.ndarray
    sway: np.ndarray


@dataclass(frozen=True)
class Face:
    """A subject's face. Colours are RGB in 0..1; the centre of the frame is the centre of the face."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lips: np.ndarray
    shirt: np.ndarray
    background: np.ndarray
    width: float  # half of the face's width, as for other widths
    height: float
    hairline: float  # share of the face above the brows that the hair covers
    eye_distance: float
    eye_width: float
    eye_opening: float
    brow_height: float
    brow_thickness: float
    brow_arch: float
    nose_length: float
    nose_width: float
    mouth_height: float
    mouth_width: float
    mouth_bend: float
    lip_thickness: float
    light: float  # from the left (below 0) or the right

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Face:
        dark = rng.random()
        skin = np.array([0.93, 0.76, 0.65]) * (1 - dark) + np.array([0.50, 0.34, 0.26]) * dark
        hair = np.array([0.16, 0.11, 0.09]) + rng.random() ** 2 * np.array([0.50, 0.36, 0.20])
        return cls(
            skin=skin,
            hair=hair,
            iris=np.array([0.25, 0.17, 0.10]) + rng.random() * np.array([0.05, 0.15, 0.25]),
            lips=skin * [0.85, 0.58, 0.58],
            shirt=rng.uniform(0.15, 0.7, 3),
            background=np.full(3, rng.uniform(0.35, 0.8)) + rng.uniform(-0.08, 0.08, 3),
            width=rng.uniform(0.29, 0.34),
            height=rng.uniform(0.39, 0.44),
            hairline=rng.uniform(0.3, 0.7),
            eye_distance=rng.uniform(0.125, 0.15),
            eye_width=rng.uniform(0.055, 0.07),
            eye_opening=rng.uniform(0.028, 0.038),
            brow_height=rng.uniform(0.075, 0.095),
            brow_thickness=rng.uniform(0.008, 0.014),
            brow_arch=rng.uniform(0.01, 0.03),
            nose_length=rng.uniform(0.13, 0.16),
            nose_width=rng.uniform(0.03, 0.045),
            mouth_height=rng.uniform(0.22, 0.25),
            mouth_width=rng.uniform(0.09, 0.12),
            mouth_bend=rng.uniform(-0.01, 0.01),
            lip_thickness=rng.uniform(0.014, 0.022),
            light=rng.uniform(-0.2, 0.2),
        )

    def paint(self, pose: Pose, size: int) -> np.ndarray:
        """The face in each pose: float32 ``[T, H, W, 3]``, 0..1. Edges are anti-aliased by their distance."""
        grid = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        x = (grid - pose.sway[:, :1])[:, None, :]  # [T, 1, W]
        every_y = (grid - pose.sway[:, 1:])[:, :, None]  # [T, H, 1]
        brows, eyes, mouth = (pose.parts[:, i, None, None] for i in range(len(PARTS)))
        clip = np.empty((len(pose.parts), size, size, 3), np.float32)
        clip[:] = self.background * (1 - 0.3 * grid[:, None, None])

        def rows(top: float, bottom: float) -> tuple[np.ndarray, Callable[[np.ndarray, np.ndarray], None]]:
            """The rows of pixels between two heights: their y, and what paints them."""
            margin = OUTSIDE * STRENGTH[1] * float(RISE.max()) + SWAY + 2 / size
            first, last = np.searchsorted(grid, [top - margin, bottom + margin])
            band = clip[:, first:last]

            def put(colour: np.ndarray, inside: np.ndarray) -> None:
                """Paint where the signed distance from the edge, ``[T, rows, W]``, is positive."""
                cover = np.clip(0.5 + inside * size, 0, 1)[..., None]
                band[:] += cover * (colour.astype(np.float32) - band)

            return every_y[:, first:last], put

        y, put = rows(-0.5, 0.5)
        put(self.hair, ellipse(x, y + 0.04, self.width * 1.12, self.height * 1.05))
        face = ellipse(x, y, self.width, self.height)
        shade = 1 + self.light * x / self.width - 0.25 * ((x / self.width) ** 2 + (y / self.height) ** 2)
        y, put_low = rows(0.2, 0.5)
        put_low(self.skin * 0.75, np.minimum(0.5 * self.width - np.abs(x), y - 0.2))
        put_low(self.shirt, y - 0.45 * self.height - 0.22 - 0.25 * x**2)
        put(self.skin * np.clip(shade, 0.4, 1.2)[..., None], face)

        brow_line = -self.brow_height  # the eyes are at height 0
        hairline = -self.height + self.hairline * (self.height + brow_line - 0.05)
        y, put = rows(-0.5, 0)
        face = ellipse(x, y, self.width, self.height)
        put(self.hair, np.minimum(face + 0.01, hairline + 0.9 * x**2 / self.width - y))

        y, put = rows(-self.eye_opening, self.eye_opening)
        side = np.abs(x) - self.eye_distance  # paints both eyes at once
        arc = np.maximum(1 - (side / self.eye_width) ** 2, -1)
        upper = self.eye_opening * arc - eyes  # lids; the lower one moves half as far
        lower = 0.8 * self.eye_opening * arc - 0.5 * eyes
        opening = np.minimum(y + upper, lower - y)
        put(np.array([0.93, 0.92, 0.90]), opening)
        put(self.iris, np.minimum(opening, 0.7 * self.eye_width - 0.01 - np.hypot(side, y)))
        put(self.iris * 0.2, np.minimum(opening, 0.25 * self.eye_width - np.hypot(side, y)))
        put(self.skin * 0.35, np.minimum(0.006 - np.abs(y + upper), self.eye_width - np.abs(side)))

        y, put = rows(brow_line - self.brow_arch, brow_line)
        side = side / (1.25 * self.eye_width)
        line = brow_line - self.brow_arch * (1 - side**2) - brows * (1 - 0.3 * side)
        thickness = self.brow_thickness * (1.2 - 0.5 * side)
        put(self.hair * 0.8, np.minimum(thickness - np.abs(y - line), (1 - np.abs(side)) * 0.1))

        y, put = rows(self.nose_length - 0.03, self.nose_length)
        y = y - self.nose_length + 0.8 * eyes
        put(self.skin * 0.55, ellipse(np.abs(x) - 0.6 * self.nose_width, y, 0.4 * self.nose_width, 0.009))
        wing = np.maximum(np.abs(np.abs(x) - self.nose_width) - 0.004, np.abs(y + 0.012) - 0.016)
        put(self.skin * 0.72, -wing)

        y, put = rows(self.mouth_height - 0.02, self.mouth_height + 0.03)
        side = x / self.mouth_width
        arc = np.maximum(1 - side**2, -1)
        line = self.mouth_height + self.mouth_bend * arc - mouth * (1 - arc)
        put(self.lips, np.minimum(y - line + 0.8 * self.lip_thickness * arc, line + 1.2 * self.lip_thickness * arc - y))
        put(self.lips * 0.4, np.minimum(0.005 - np.abs(y - line), self.mouth_width - np.abs(x)))
        return clip


def ellipse(x: np.ndarray, y: np.ndarray, width: float, height: float) -> np.ndarray:
    """About the distance from the edge of an ellipse at the origin, positive inside; half its width and height."""
    return (1 - np.hypot(x / width, y / height)) * min(width, height)


@dataclass(frozen=True)
class FaceClip:
    """A drawn clip.

    Attributes:
        frames: uint8 ``[T, H, W, 3]``, RGB.
        onset, apex, offset: the first frame of the expression, that of its largest movement and the last one, from 0.
    """

    frames: np.ndarray
    onset: int
    apex: int
    offset: int


def render_face(
    face: Face,
    order: Sequence[str],
    rng: np.random.Generator,
    *,
    size: int = 64,
    act: int = 10,
    around: tuple[int, int] = (0, 0),
) -> FaceClip:
    """Draw a clip whose parts move in the given order.

    Every order draws the same numbers from ``rng``: the frames from onset to offset are the same, in another order.

    Args:
        act: frames of each part's movement.
        around: frames before the onset and after the offset.

    Raises:
        ValueError: ``order`` does not have each of ``PARTS`` once.
    """
    if sorted(order) != sorted(PARTS):
        raise ValueError(f"order {', '.join(order)} must have each of {', '.join(PARTS)} once")
    strengths = rng.uniform(*STRENGTH, len(PARTS))
    acts = [draw_act(rng, act, movement) for movement in np.diag(RISE * strengths)]
    outside = [draw_act(rng, count, RISE * OUTSIDE) for count in around]
    poses = [outside[0], *acts, outside[1]]
    pose = Pose(np.concatenate([each.parts for each in poses]), np.concatenate([each.sway for each in poses]))

    frames = face.paint(pose, size)
    light = rng.uniform(0.9, 1.05) + rng.normal(0, FLICKER, len(frames))
    noise = rng.standard_normal(frames.shape[:3], dtype=np.float32) * np.float32(rng.uniform(*NOISE))
    frames = frames * (255 * light).astype(np.float32)[:, None, None, None] + noise[..., None]
    frames = np.clip(np.rint(frames), 0, 255).astype(np.uint8)

    onset, places = around[0], [PARTS.index(part) for part in order]
    joined = [frames[onset + act * place :][:act] for place in places]
    strongest = int(np.argmax(strengths))
    return FaceClip(
        frames=np.concatenate([frames[:onset], *joined, frames[onset + len(PARTS) * act :]]),
        onset=onset,
        apex=onset + places.index(strongest) * act + int(acts[strongest].parts.max(1).argmax()),
        offset=onset + len(PARTS) * act - 1,
    )


def draw_act(rng: np.random.Generator, frames: int, strength: np.ndarray) -> Pose:
    """A movement of the parts by ``strength`` ``[3]`` and back, after a rest, with a small one of the head.

    The frames before the first and after the last one would be at rest.
    """
    time, start = (np.arange(frames) + 0.5) / max(frames, 1), rng.uniform(*REST)
    moved = np.minimum(HOLD * np.sin(math.pi * np.clip((time - start) / (1 - start), 0, 1)), 1)
    heading, loop = rng.uniform(0, tau), rng.choice([1, 2])
    sway = rng.uniform(0, SWAY) * np.sin(math.pi * loop * time)
    return Pose(
        (moved[:, None] * strength).astype(np.float32),
        (sway[:, None] * [math.cos(heading), math.sin(heading)]).astype(np.float32),
    )


# The files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The files of one of the three parts. Formats have the fields of ``Clip``, and ``n``, ``a``, ``b``: numbers.

    Attributes:
        subject, first: format and smallest number of the subjects' names.
        name: format of a clip's name.
        path: format of a frame's path, relative to the set's folder; its number remains to be filled in.
        emotions: as the coding file or the folders have them, of each class of the composite, which take turns. None:
            those that the composite leaves out, each once a subject.
        numbers: range of the first frames' numbers.
        cut: whether the folders hold the frames from onset to offset alone.
        grey: whether the frames are.
    """

    subject: str
    first: int
    name: str
    path: str
    emotions: Mapping[str | None, Sequence[str]]
    numbers: int
    cut: bool = False
    grey: bool = False


CASME2 = Layout(
    subject="{:02d}",
    first=1,
    name="EP{a:02d}_{b:02d}f",
    path="CASME2/Cropped/sub{subject}/{name}/reg_img{{}}.jpg",
    emotions={
        "negative": ("disgust", "repression"),
        "positive": ("happiness",),
        "surprise": ("surprise",),
        None: ("others", "others", "sadness", "fear"),
    },
    numbers=90,
)
SAMM = Layout(
    subject="{:03d}",
    first=6,
    name="{subject}_{a}_{b}",
    path="SAMM/{subject}/{name}/{subject}_{{:05d}}.jpg",
    emotions={
        "negative": ("Anger", "Contempt", "Disgust", "Fear", "Sadness"),
        "positive": ("Happiness",),
        "surprise": ("Surprise",),
        None: ("Other", "Other"),
    },
    numbers=9000,
    grey=True,
)
SMIC = Layout(
    subject="s{}",
    first=1,
    name="{subject}_{emotion:.2}_{n:02d}",
    path="SMIC/HS/{subject}/micro/{emotion}/{name}/image{{:06d}}.jpg",
    emotions={name: (name,) for name in ("negative", "positive", "surprise")},
    numbers=900_000,
    cut=True,
)
LAYOUTS = (CASME2, SAMM, SMIC)
CASME2_CODING = "CASME2/CASME2-coding-20140508.xlsx"
SAMM_CODING = "SAMM/SAMM_Micro_FACS_Codes_v2.xlsx"
SAMM_HEADER_ROW = 14
ACTION_UNITS = "2+7+12"  # outer brows, lids, corners of the mouth


@dataclass(frozen=True)
class Clip:
    """A clip of the set, to be drawn.

    Attributes:
        face: of the subject.
        emotion: as its ``Layout`` has it.
        kind: its class in the composite; None: the composite leaves it out.
        order: of the parts. The first is that of the class; the order is random otherwise.
        path: of a frame, with its number to be filled in.
        first: number of the first frame.
        act, around: as for ``render_face``.
        rng: its random stream.
    """

    subject: str
    face: Face
    name: str
    emotion: str
    kind: str | None
    order: tuple[str, ...]
    path: str
    first: int
    act: int
    around: tuple[int, int]
    rng: np.random.Generator

    def files(self) -> list[str]:
        """The paths of its frames, relative to the set's folder."""
        count = sum(self.around) + len(PARTS) * self.act
        return [self.path.format(number) for number in range(self.first, self.first + count)]

    def draw(self, size: int) -> FaceClip:
        """Draw it; once, as it uses up random numbers."""
        return render_face(self.face, self.order, self.rng, size=size, act=self.act, around=self.around)


def plan_clips(layout: Layout, seed: Sequence[int], subjects: int, clips: int) -> Iterator[Clip]:
    """The clips of a part: of each subject ``clips`` of the composite's classes, and those that it leaves out."""
    for number in range(subjects):
        face = Face.draw(stream(*seed, number))
        subject = layout.subject.format(layout.first + number)
        turns = {kind: itertools.cycle(emotions) for kind, emotions in layout.emotions.items()}
        kinds = [CLASS_CYCLE[i % len(CLASS_CYCLE)] for i in range(clips)]
        for i, kind in enumerate([*kinds, *(None for _ in layout.emotions.get(None, ()))]):
            rng, emotion = stream(*seed, number, i), next(turns[kind])
            fields = {"subject": subject, "emotion": emotion, "n": i + 1, "a": i // 4 + 1, "b": i % 4 + 1}
            name = layout.name.format(**fields)
            order = sorted(rng.permutation(PARTS).tolist(), key=lambda part: part != FIRST_PART.get(kind or ""))
            before, after = (0, 0) if layout.cut else rng.integers(*AROUND, 2, endpoint=True).tolist()
            yield Clip(
                subject=subject,
                face=face,
                name=name,
                emotion=emotion,
                kind=kind,
                order=tuple(order),
                path=layout.path.format(name=name, **fields),
                first=int(rng.integers(1, layout.numbers)),
                act=int(rng.integers(*ACT_FRAMES, endpoint=True)),
                around=(before, after),
                rng=rng,
            )


def stream(seed: int, *key: int) -> np.random.Generator:
    """The random numbers of a part of the set."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def make_face_set(folder: str | Path, *, subjects: int = 3, clips: int = 24, size: int = 64, seed: int = 0) -> Path:
    """Write the embedded set of drawn faces; return the folder.

    ``CASME2`` has ``CASME2-coding-20140508.xlsx`` and ``Cropped/sub01/EP01_01f/reg_img46.jpg``; ``SAMM`` has
    ``SAMM_Micro_FACS_Codes_v2.xlsx`` and ``006/006_1_1/006_05562.jpg``; ``SMIC`` has
    ``HS/s1/micro/negative/s1_ne_01/image175810.jpg``. A folder that already holds the same set is left unchanged.
    ``faces.json`` is written last: a folder without it comes from a killed run, and is drawn again.

    Args:
        subjects: of each of the three parts.
        clips: of each subject, in the classes of the composite. CASME II has four more, SAMM two.
        size: height and width of the frames in pixels.

    Raises:
        UserError: too few or too many clips, too small a size, or a folder that holds anything else.
    """
    if size < 32:
        raise UserError(f"size must be at least 32, not {size}")
    if not 1 <= subjects <= 90 or not len(CLASS_CYCLE) <= clips <= 90:
        raise UserError(
            f"each part needs 1 to 90 subjects with {len(CLASS_CYCLE)} to 90 clips each, not {subjects} with {clips}"
        )
    folder = Path(folder)
    settings = {"version": SET_VERSION, "subjects": subjects, "clips": clips, "size": size, "seed": seed}
    record = json.dumps(settings, indent=2) + "\n"
    parts = [(layout, list(plan_clips(layout, (seed, i), subjects, clips))) for i, layout in enumerate(LAYOUTS)]
    files = {file for _, planned in parts for clip in planned for file in clip.files()}
    if is_complete_set(folder, files | {CASME2_CODING, SAMM_CODING}, "faces", record):
        return folder

    (folder / "faces.json").unlink(missing_ok=True)
    for layout, planned in parts:
        drawn = [write_frames(folder, clip, layout.grey, size) for clip in planned]
        if layout is not SMIC:
            write_coding(folder, layout, zip(planned, drawn, strict=True))
    complete_set(folder, "faces", record)
    return folder


def write_frames(folder: Path, clip: Clip, grey: bool, size: int) -> FaceClip:
    """Draw a clip and write its frames as JPEG files; return what was drawn."""
    drawn, files = clip.draw(size), clip.files()
    (folder / files[0]).parent.mkdir(parents=True, exist_ok=True)
    for file, frame in zip(files, drawn.frames, strict=True):
        image = Image.fromarray(frame)
        (image.convert("L") if grey else image).save(folder / file, quality=92, subsampling=0)
    return drawn


def write_coding(folder: Path, layout: Layout, clips: Iterable[tuple[Clip, FaceClip]]) -> None:
    """Write the coding file of CASME II or SAMM, with the sheet's columns and header row of the published one."""
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    if layout is CASME2:
        sheet.append(
            [
                *("Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None),
                "Action Units",
                "Estimated Emotion",
            ]
        )
    else:
        sheet.cell(SAMM_HEADER_ROW - 1, 1, "Drawn faces")  # rows are appended after the last one in use
        sheet.append(
            [
                *("Subject", "Filename", "Onset Frame", "Apex Frame", "Offset Frame", "Duration"),
                "Micro",
                "Action Units",
                "Estimated Emotion",
                "Objective Classes",
            ]
        )
    for clip, drawn in clips:
        onset, apex, offset = (clip.first + frame for frame in (drawn.onset, drawn.apex, drawn.offset))
        if layout is CASME2:
            apex_or_none = "/" if clip.emotion == "sadness" else apex
            sheet.append([clip.subject, clip.name, None, onset, apex_or_none, offset, None, ACTION_UNITS, clip.emotion])
        else:
            row = [clip.subject, clip.name, onset, apex, offset, offset - onset + 1, "Micro", ACTION_UNITS]
            sheet.append([*row, clip.emotion, None])
    workbook.save(folder / (CASME2_CODING if layout is CASME2 else SAMM_CODING))
