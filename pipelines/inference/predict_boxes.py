"""Predict the actions of people whose boxes are given: ``posmlp predict --boxes``. It needs neither Ray nor MLflow."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePath

import av
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipelines.inference.predict import load_for_prediction
from posmlp import storage
from posmlp.config import Config
from posmlp.detection.clips import load_key_clip
from posmlp.detection.lists import read_person_boxes
from posmlp.errors import UserError
from posmlp.predict import find_frames, most_likely
from posmlp.tasks import task_of
from posmlp.tasks.detection import score_boxes
from posmlp.video.classes import list_names
from posmlp.video.decode import DecodeError, ImageFolder, Video
from posmlp.video.isolated import open_isolated

SHOWN_S = 0.5  # an annotated video shows a box from so long before its second to so long after it
READABLE = 480  # pixels; frames with a shorter side are enlarged by a whole factor, so that labels fit
ANNOTATION_TIMEOUT_S = 24 * 3600.0
TIME_BASE = Fraction(1, 90_000)  # seconds; of an annotated video
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf")


@dataclass(frozen=True)
class BoxPrediction:
    """The predicted actions of one box of one key second of one file.

    Attributes:
        file: as it was given.
        second: as in the list of boxes; None if the error is of the whole file.
        box: x1 y1 x2 y2 as fractions of the frame; empty if there is an error.
        top: class names and probabilities, the most likely first.
        error: why the key second, or the file, cannot be read; empty if it can.
    """

    file: str
    second: int | None
    box: tuple[float, ...] = ()
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""

    @property
    def place(self) -> str:
        """The file and the second, for the user."""
        return self.file if self.second is None else f"{self.file}, second {self.second}"

    def __str__(self) -> str:
        """Format as a line for the box with one line per class below it."""
        width = max((len(name) for name, _ in self.top), default=0)
        head = f"{self.place}, box {' '.join(f'{value:.3f}' for value in self.box)}"
        return "\n".join([head, *(f"  {name:<{width}}  {share:6.1%}" for name, share in self.top)])

    def json(self) -> str:
        """Format as one line of JSON."""
        key = {"file": self.file} | ({} if self.second is None else {"second": self.second})
        if self.error:
            return json.dumps(key | {"error": self.error})
        top = [{"class": name, "probability": share} for name, share in self.top]
        return json.dumps(key | {"box": list(self.box), "top": top})


class BoxPredictor:
    """A detection model with boxes of people.

    Args:
        uri: name or folder of a run (its best checkpoint is used), or folder of a checkpoint.
        boxes: list of boxes, a path or a URI (``posmlp.detection.lists.read_person_boxes``). Those with a score below
            ``detection.min_score`` are left out. Without names of videos, all are of the one file.
        first_second: the list's second at which the files start; None: ``detection.first_second``.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged or is not for detection, or the list is wrong.
    """

    def __init__(self, uri: str, boxes: str, first_second: float | None = None):
        self.model, config, self.names = load_for_prediction(uri, "detection")
        config = task_of(config).for_evaluation(config)
        if first_second is not None:
            section = config.detection.model_copy(update={"first_second": first_second})
            config = config.model_copy(update={"detection": section})
        self.config, self.source = config, boxes
        self.boxes = read_person_boxes(boxes)
        if not (self.boxes.scores >= config.detection.min_score).any():
            raise UserError(f"{boxes}: no box has a score of {config.detection.min_score:g} (detection.min_score)")

    def predict(self, files: Sequence[str], top: int = 5, threshold: float = 0.0) -> Iterator[BoxPrediction]:
        """Yield the most likely actions of each box, by file, second and box, each second as soon as it is ready.

        Args:
            files: videos (paths or URIs), or folders of numbered frames. A file, or a second
                of it, that cannot be read gives a ``BoxPrediction`` with an error.
            top: most actions per box.
            threshold: smallest probability of an action.

        Raises:
            UserError: the list names no videos and there are several files. Raised by the call itself.
        """
        if self.boxes.videos is None and len(files) > 1:
            raise UserError(f"{self.source} names no videos; give one file, or lines of video,second,x1,y1,x2,y2")
        return (found for file in files for found in self.predict_file(file, top, threshold))

    def left_out(self, files: Sequence[str]) -> str:
        """Tell which videos of the list are not among the files; empty if all are."""
        rest = sorted({*(self.boxes.videos or ())} - {video_name(file) for file in files})
        return f"{self.source}: the boxes of other videos are left out: {list_names(rest)}" if rest else ""

    def predict_file(self, file: str, top: int, threshold: float) -> Iterator[BoxPrediction]:
        """Yield the predictions of one file."""
        numbers = self.boxes_of(file)
        if not len(numbers):
            known = sorted({*(self.boxes.videos or ())})
            text = f"{self.source} has no box of {video_name(file)!r}; it has boxes of {list_names(known)}"
            yield BoxPrediction(file, None, error=text)
            return
        device = next(self.model.parameters()).device
        for second in np.unique(self.boxes.seconds[numbers]).tolist():
            corners = self.boxes.corners[numbers[self.boxes.seconds[numbers] == second]]
            try:
                clip = torch.from_numpy(load_second(file, second, self.config)).to(device)
            except DecodeError as error:
                reason = error.reason.replace("; check the path in the manifest", "")
                yield BoxPrediction(file, second, error=reason.replace("detection.first_second", "--first-second"))
                continue
            inside = torch.from_numpy(corners).to(device)
            of_first = torch.zeros(len(corners), dtype=torch.int64, device=device)
            logits = score_boxes(self.model, clip, inside, of_first, self.config)
            for box, shares in zip(corners, logits.sigmoid().cpu(), strict=True):
                likely = tuple(each for each in most_likely(shares, self.names, top) if each[1] >= threshold)
                yield BoxPrediction(file, second, tuple(round(value, 6) for value in box.tolist()), likely)

    def boxes_of(self, file: str) -> NDArray[np.int64]:
        """Numbers of the boxes of a file that score enough."""
        used = self.boxes.scores >= self.config.detection.min_score
        if self.boxes.videos is not None:
            used &= np.array(self.boxes.videos) == video_name(file)
        return np.flatnonzero(used)


def video_name(file: str) -> str:
    """The name of a file's video in a list of boxes."""
    return PurePath(file.rstrip("/")).stem


def load_second(file: str, second: int, config: Config) -> NDArray[np.uint8]:
    """The clip around a second of a file: uint8 ``[1, T, H, W, 3]``.

    Raises:
        DecodeError: it cannot be read, or the file does not reach the second.
    """
    uri, images, span = find_frames(file, config)
    time = second - config.detection.first_second
    try:
        return load_key_clip(uri, file, time, config, epoch=0, train=False, images=images, span=span).clips
    except (DecodeError, UserError):
        raise
    except Exception as error:  # one file must not cost another
        raise DecodeError(file, f"it cannot be read ({type(error).__name__}: {error})") from error


# Annotated videos -----------------------------------------------------------------------------------------------------


def check_output(out: str, file: str) -> None:
    """Raise a UserError if the annotated copy of a file cannot have this name."""
    if storage.is_remote(out) or PurePath(out).suffix.lower() != ".mp4":
        raise UserError(f"--video {out}: expected the path of a file on this machine that ends in .mp4")
    paths = [storage.local_path(uri) for uri in (out, file) if not storage.is_remote(uri)]
    if len(paths) == 2 and all(map(os.path.exists, paths)) and os.path.samefile(*paths):
        raise UserError(f"--video {out} is the file itself, which the copy would replace; give another name")


def annotate(file: str, out: str, predictions: Sequence[BoxPrediction], config: Config) -> None:
    """Write a copy of a file as MP4, with the boxes and their actions around each key second. It has no sound.

    Args:
        out: the MP4 file, a path.
        predictions: of the file.
        config: the recipe, for ``detection.first_second`` and ``data.fps``.

    Raises:
        DecodeError: the file cannot be read.
        UserError: ``out`` cannot be written.
    """
    shown: dict[float, list[tuple[tuple[float, ...], list[str]]]] = defaultdict(list)
    for each in predictions:
        if each.second is not None and not each.error:
            lines = [f"{name} {share:.0%}" for name, share in each.top]
            shown[each.second - config.detection.first_second].append((each.box, lines))
    uri, images, span = find_frames(file, config)
    with open_isolated(uri, images, timeout_s=ANNOTATION_TIMEOUT_S, span=span) as video:
        video.run(write_annotated, out, dict(shown), config.data.fps)


def write_annotated(
    video: Video | ImageFolder,
    out: str,
    shown: Mapping[float, Sequence[tuple[tuple[float, ...], Sequence[str]]]],
    fps: float | None,
) -> None:
    """Write the frames of a video with boxes and their lines of text; small frames are enlarged.

    Args:
        shown: by their time in seconds.
        fps: frame rate of a frame folder.

    Raises:
        DecodeError: the video is damaged.
        UserError: ``out`` cannot be written.
    """
    times = video.info.times
    if times is None:
        times = np.arange(video.info.frames) / (fps or 1.0)
    moments = np.array(sorted(shown))
    try:
        with storage.output_stream(out) as file, av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", pix_fmt="yuv420p", options={"crf": "20", "preset": "veryfast"})
            stream.codec_context.time_base = TIME_BASE
            font = None
            for time, picture in zip(times, video.all_frames(), strict=True):
                factor = max(1, -(-READABLE // min(picture.shape[:2])))
                height, width = (side * factor // 2 * 2 for side in picture.shape[:2])  # H.264 takes even sides
                if font is None:
                    stream.width, stream.height = width, height
                    font = choose_font(height)
                nearest = moments[np.abs(moments - time).argmin()]
                image = Image.fromarray(np.ascontiguousarray(picture))
                if factor > 1:
                    image = image.resize((image.width * factor, image.height * factor))
                image = image.crop((0, 0, width, height))
                if -SHOWN_S <= time - nearest < SHOWN_S:
                    draw_boxes(image, shown[nearest], font)
                frame = av.VideoFrame.from_image(image)
                frame.pts, frame.time_base = round(time / TIME_BASE), TIME_BASE
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); see --video") from error


def choose_font(height: int) -> ImageFont.FreeTypeFont:
    """The font of the labels in pictures of a height in pixels."""
    file = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(file, max(9, height // 32))


def draw_boxes(
    image: Image.Image, boxes: Sequence[tuple[tuple[float, ...], Sequence[str]]], font: ImageFont.FreeTypeFont
) -> None:
    """Draw boxes with their lines of text into a picture."""
    draw = ImageDraw.Draw(image)
    for number, (corners, lines) in enumerate(boxes):
        left, top, right, bottom = (round(x) for x in np.array(corners) * (image.size * 2))
        colour = COLOURS[number % len(COLOURS)]
        draw.rectangle(
            (left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=1 + round(font.size / 6)
        )
        if lines:
            text = "\n".join(lines)
            across, down = draw.multiline_textbbox((0, 0), text, font=font)[2:]
            place = max(0, min(left, image.width - across)), top - down if top >= down else top  # above, if it fits
            draw.rectangle(draw.multiline_textbbox(place, text, font=font), fill=colour)
            draw.multiline_text(place, text, fill="white", font=font)
