"""A trained model's classes for single videos: ``posmlp predict``. Without Ray and MLflow."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.inference.views import scored_together, with_views
from pipelines.runs.models import class_names, find_checkpoint, trained_model
from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.learn.evaluation import video_scores
from posmlp.learn.learner import score_views
from posmlp.video.clip import load_clips
from posmlp.video.decode import DecodeError, Frames
from posmlp.video.formats import PICTURE_SUFFIXES

AHEAD = 16  # files decoded, or being decoded, while the model is busy


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one file.

    Attributes:
        file: as it was given.
        top: class names and probabilities, the likeliest first; empty if there is an error.
        error: why the file cannot be read, else empty.
    """

    file: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""

    def __str__(self) -> str:
        """A table: the file, and below it a line for each class."""
        width = max((len(name) for name, _ in self.top), default=0)
        return "\n".join([self.file, *(f"  {name:<{width}}  {share:6.1%}" for name, share in self.top)])

    def json(self) -> str:
        """One line."""
        if self.error:
            return json.dumps({"file": self.file, "error": self.error})
        top = [{"class": name, "probability": share} for name, share in self.top]
        return json.dumps({"file": self.file, "top": top})


def predict(uri: str, files: Sequence[str], top: int = 5, views: tuple[int, int] | None = None) -> Iterator[Prediction]:
    """The likeliest classes of each file, in order, each as soon as it is ready; on a GPU if there is one.

    Args:
        uri: a run's name or folder, which stands for its best checkpoint, or a checkpoint's folder.
        files: videos (paths or URIs), images, or folders of frames named as ``data.template`` says. A file that cannot
            be read gives a ``Prediction`` with an error.
        top: how many classes.
        views: clips in time and squares of each (``parse_views``); None: the recipe's.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged; at once, not when the first file is asked for.
    """
    try:
        model, about = trained_model(find_checkpoint(uri))
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    config = with_views(about.recipe(), views)
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": None})})
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = class_names(about.classes, config.model.variant().num_classes)
    return predictions(model, config, names, files, top)


def predictions(
    model: nn.Module, config: Config, names: Sequence[str], files: Sequence[str], top: int
) -> Iterator[Prediction]:
    """The next files are decoded while the model works; what is decoded by then goes through it together."""
    device, room = next(model.parameters()).device, scored_together(config)
    left, waiting = deque(files), deque[tuple[str, Future[Frames | str]]]()
    with ThreadPoolExecutor(1) as pool:  # one thread: a process has one decoder (``posmlp.video.isolated``)
        while left or waiting:
            while left and len(waiting) < AHEAD:
                waiting.append((left[0], pool.submit(clips_or_error, left.popleft(), config)))
            ready = [waiting.popleft()]
            while waiting and waiting[0][1].done() and len(ready) < room:
                ready.append(waiting.popleft())
            results = [future.result() for _, future in ready]
            good = [torch.from_numpy(clips) for clips in results if not isinstance(clips, str)]
            scores = iter(())
            if good:
                views = score_views(model, torch.cat(good).to(device), config)
                scores = iter(video_scores(views).exp().cpu())
            for (file, _), result in zip(ready, results, strict=True):
                if isinstance(result, str):
                    yield Prediction(file, error=result)
                else:
                    yield Prediction(file, likeliest(next(scores), names, top))


def clips_or_error(file: str, config: Config) -> Frames | str:
    """All views of a file, uint8 ``[V, T, H, W, 3]``, or why it cannot be read."""
    try:
        uri, images = as_row(file, config)
        clips, _ = load_clips(uri, file, config, epoch=0, train=False, images=images)
        return clips
    except DecodeError as error:
        return error.reason.replace("; check the path in the manifest", "")
    except Exception as error:  # nothing about one file may cost another; the user sees it as the file's line
        return f"it cannot be read ({type(error).__name__}: {error})"


def as_row(file: str, config: Config) -> tuple[str, int | None]:
    """What a manifest's row says of a file: ``uri`` and ``frames`` (``posmlp.video.manifest``)."""
    uri = storage.join(".", file)
    escaped = uri.replace("{", "{{").replace("}", "}}")
    if uri.lower().endswith(PICTURE_SUFFIXES):
        frames = config.model.variant().frames
        if frames > 1:
            raise DecodeError(file, f"this is an image, and the model takes clips of {frames} frames")
        return escaped, 1
    if storage.is_remote(uri) or not os.path.isdir(uri):
        return uri, None
    template, count = config.data.template, 0
    while os.path.isfile(os.path.join(uri, template.format(count + 1))):
        count += 1
    if not count:
        raise DecodeError(file, f"this folder has no image {template.format(1)} (data.template); expected a video file")
    return storage.join(escaped, template), count


def likeliest(shares: Tensor, names: Sequence[str], count: int) -> tuple[tuple[str, float], ...]:
    """The classes of the highest probabilities, of float ``[classes]``."""
    best = shares.topk(min(count, len(names)))
    return tuple((names[i], share) for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True))


# --- what an evaluation needs too --------------------------------------------------------------------------------
