"""Predict the classes of single videos with a model of any kind: decode their views, score them, rank the classes.

``posmlp predict`` (``pipelines.inference.predict``) does this with a checkpoint's model, and the model that a run logs
to MLflow (``pipelines.registry.posmlp_pyfunc``) with an exported file. The latter takes this package along, so
both read a video as ``posmlp evaluate`` does.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from posmlp import storage
from posmlp.config import Config
from posmlp.learn.evaluation import video_scores
from posmlp.video.clip import load_clips
from posmlp.video.decode import DecodeError, Frames, Span
from posmlp.video.image_series import PICTURE_SUFFIXES, choose_series, find_series
from posmlp.video.views import videos_per_pass

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


def predict_files(
    score: Callable[[Tensor], Tensor], config: Config, names: Sequence[str], files: Sequence[str], top: int
) -> Iterator[Prediction]:
    """Yield the most likely classes of each file, in order, each as soon as it is ready.

    The next files are decoded while the model works. All files that are decoded by then go through it together.

    Args:
        score: log-probabilities, float ``[videos, views, classes]``, of uint8 clips ``[videos * views, T, H, W, 3]``
            on the CPU; the views of a video are adjacent.
        config: the recipe, for the frames and the views. Its ``data.cache_dir`` should be None.
        names: of the model's outputs.
        files: videos (paths or URIs), images, or folders of numbered frames. A file that
            cannot be read gives a ``Prediction`` with an error.
        top: number of classes per file.
    """
    most = videos_per_pass(config)
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
                scores = iter(video_scores(score(torch.cat(good)), config.eval.fusion).exp().cpu())
            for (file, _), result in zip(ready, results, strict=True):
                if isinstance(result, str):
                    yield Prediction(file, error=result)
                else:
                    yield Prediction(file, most_likely(next(scores), names, top))


def load_views(file: str, config: Config) -> Frames | str:
    """Return all views of a file, uint8 ``[V, T, H, W, 3]``, or why it cannot be read."""
    try:
        uri, images, span = find_frames(file, config)
        clips, _ = load_clips(uri, file, config, epoch=0, train=False, images=images, span=span)
        return clips
    except DecodeError as error:
        return error.reason.replace("; check the path in the manifest", "")
    except Exception as error:  # one file must not cost another; the user sees the reason in the file's line
        return f"it cannot be read ({type(error).__name__}: {error})"


def find_frames(file: str, config: Config) -> tuple[str, int | None, Span | None]:
    """Return ``uri`` and ``frames`` of a file as a manifest row has them (``posmlp.video.manifest``), and its span.

    Raises:
        DecodeError: it is an image and the model takes clips, or a folder without one series of numbered images.
    """
    uri = storage.join(".", file)
    escaped = uri.replace("{", "{{").replace("}", "}}")
    if uri.lower().endswith(PICTURE_SUFFIXES):
        frames = config.model.variant().frames
        if frames > 1:
            raise DecodeError(file, f"this is an image, and the model takes clips of {frames} frames")
        return escaped, 1, None
    if storage.is_remote(uri) or not os.path.isdir(uri):
        return uri, None, None
    series = choose_series(find_series(os.listdir(uri)), config.data.template)
    if isinstance(series, str):
        raise DecodeError(file, f"{series} in this folder; expected a video file, or a folder of frames")
    first, last = series.numbers[0], series.numbers[-1]
    if (gap := series.missing(first, last)) is not None:
        raise DecodeError(file, f"no image {series.name(gap)} in this folder, which has {series.name(first)} and later")
    return storage.join(escaped, series.template), last - first + 1, (first, last)


def most_likely(probabilities: Tensor, names: Sequence[str], count: int) -> tuple[tuple[str, float], ...]:
    """Return the names of the most likely classes with their probabilities.

    Args:
        probabilities: float ``[classes]``.
    """
    best = probabilities.topk(min(count, len(names)))
    return tuple((names[i], share) for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True))
