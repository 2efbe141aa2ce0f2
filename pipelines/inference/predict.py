"""Predict the classes of single videos: ``posmlp predict``. It needs neither Ray nor MLflow."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.inference.views import videos_per_pass, with_views
from pipelines.runs.models import find_checkpoint, load_trained_model, output_names
from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.learn.evaluation import video_scores
from posmlp.learn.learner import score_views
from posmlp.video.clip import load_clips
from posmlp.video.decode import DecodeError, Frames
from posmlp.video.formats import PICTURE_SUFFIXES

DECODED_AHEAD = 16  # files that are decoded, or in decoding, while the model is busy


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of one file.

    Attributes:
        file: as it was given.
        top: class names and probabilities, the most likely first; empty if there is an error.
        error: why the file cannot be read; empty if it can.
    """

    file: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""

    def __str__(self) -> str:
        """Format as the file's name with one line per class below it."""
        width = max((len(name) for name, _ in self.top), default=0)
        return "\n".join([self.file, *(f"  {name:<{width}}  {share:6.1%}" for name, share in self.top)])

    def json(self) -> str:
        """Format as one line of JSON."""
        if self.error:
            return json.dumps({"file": self.file, "error": self.error})
        top = [{"class": name, "probability": share} for name, share in self.top]
        return json.dumps({"file": self.file, "top": top})


def predict(uri: str, files: Sequence[str], top: int = 5, views: tuple[int, int] | None = None) -> Iterator[Prediction]:
    """Yield the most likely classes of each file, in order, each as soon as it is ready. Uses a GPU if there is one.

    Args:
        uri: name or folder of a run (its best checkpoint is used), or folder of a checkpoint.
        files: videos (paths or URIs), images, or folders of frames with names as in ``data.template``. A file that
            cannot be read gives a ``Prediction`` with an error.
        top: number of classes per file.
        views: clips per video and crops per clip (``parse_views``); None: the recipe's.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged. Raised by the call itself, not by the iterator.
    """
    try:
        model, info = load_trained_model(find_checkpoint(uri))
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    config = with_views(info.recipe(), views)
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": None})})
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    names = output_names(info.classes, config.model.variant().num_classes)
    return predict_files(model, config, names, files, top)


def predict_files(
    model: nn.Module, config: Config, names: Sequence[str], files: Sequence[str], top: int
) -> Iterator[Prediction]:
    """Decode the next files while the model works; all files that are decoded by then go through it together."""
    device, most = next(model.parameters()).device, videos_per_pass(config)
    left, waiting = deque(files), deque[tuple[str, Future[Frames | str]]]()
    with ThreadPoolExecutor(1) as pool:  # one thread: a process has one decoder (``posmlp.video.isolated``)
        while left or waiting:
            while left and len(waiting) < DECODED_AHEAD:
                waiting.append((left[0], pool.submit(load_views, left.popleft(), config)))
            ready = [waiting.popleft()]
            while waiting and waiting[0][1].done() and len(ready) < most:
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
                    yield Prediction(file, most_likely(next(scores), names, top))


def load_views(file: str, config: Config) -> Frames | str:
    """Return all views of a file, uint8 ``[V, T, H, W, 3]``, or why it cannot be read."""
    try:
        uri, images = find_frames(file, config)
        clips, _ = load_clips(uri, file, config, epoch=0, train=False, images=images)
        return clips
    except DecodeError as error:
        return error.reason.replace("; check the path in the manifest", "")
    except Exception as error:  # one file must not cost another; the user sees the reason in the file's line
        return f"it cannot be read ({type(error).__name__}: {error})"


def find_frames(file: str, config: Config) -> tuple[str, int | None]:
    """Return ``uri`` and ``frames`` of a file as a manifest row has them (``posmlp.video.manifest``).

    Raises:
        DecodeError: it is an image and the model takes clips, or a folder without numbered images.
    """
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


def most_likely(probabilities: Tensor, names: Sequence[str], count: int) -> tuple[tuple[str, float], ...]:
    """Return the names of the most likely classes with their probabilities.

    Args:
        probabilities: float ``[classes]``.
    """
    best = probabilities.topk(min(count, len(names)))
    return tuple((names[i], share) for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True))
