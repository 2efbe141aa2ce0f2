"""The ``python_function`` flavour of a run's model in MLflow: videos in, classes out; for detection, logits of boxes.

MLflow loads this file from the model's folder ``code``, where it lies next to a copy of the package ``posmlp``
(``pipelines.registry.model_files``). It must import nothing else of this project: the model needs no checkout.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray
from torch import Tensor

from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.export import INPUTS, load_exported_file
from posmlp.predict import predict_files
from posmlp.video.decode import HEAD_BYTES, VIDEO_HEAD
from posmlp.video.views import parse_views, with_views

VIDEO = "video"  # the input's column
MODEL_FILE, RECIPE_FILE = "model.pt2", "recipe.yaml"  # in the model's folder ``data/model``
MAX_PATH = 4096  # characters; a longer text is no path
MAX_ERRORS = 3  # rows that a message names
SHOWN = 200  # characters; of a longer text a message shows the beginning


class BoxModel:
    """Scores boxes in clips.

    Args:
        folder: has ``MODEL_FILE``.
    """

    def __init__(self, folder: str):
        self.module, _ = load_exported_file(str(Path(folder, MODEL_FILE)))

    def predict(
        self, model_input: Mapping[str, NDArray[Any]], params: Mapping[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Logits, float32 ``[N, classes]``, of the boxes; a sigmoid of each is its probability.

        Args:
            model_input: ``clips`` (uint8 ``[B, T, H, W, 3]``), ``boxes`` (float32 ``[N, 4]``, x1 y1 x2 y2 as fractions
                of the picture), ``box_clip`` (int64 ``[N]``, the clip of each box).
            params: not used.

        Raises:
            MlflowException: a box has no clip.
        """
        clips, boxes, box_clip = (np.ascontiguousarray(model_input[name]) for name in INPUTS["detection"])
        if len(boxes) != len(box_clip):
            raise MlflowException.invalid_parameter_value(
                f"box_clip has {len(box_clip)} numbers, expected {len(boxes)}, one for each of boxes"
            )
        if (wrong := box_clip[(box_clip < 0) | (box_clip >= len(clips))]).size:
            raise MlflowException.invalid_parameter_value(
                f"box_clip has {wrong[0]}, expected the number of a clip, 0 to {len(clips) - 1}"
            )
        with torch.no_grad():
            logits: NDArray[np.float32] = self.module(*map(torch.from_numpy, (clips, boxes, box_clip))).numpy()
        return logits


class VideoModel:
    """Classifies videos, with frames and views as ``posmlp evaluate`` chooses them. Calls take turns."""

    def __init__(self, folder: str, config: Config):
        """
        Args:
            folder: has ``MODEL_FILE``.
            config: the recipe.
        """
        self.config = config
        self.module, metadata = load_exported_file(str(Path(folder, MODEL_FILE)))
        self.names: list[str] = metadata["classes"]
        self.lock = threading.Lock()  # MLflow's server calls from several threads; a process has one decoder

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Classify the videos of a table.

        Args:
            model_input: its column ``video`` has a path, a URI or the base64 text of a video in each row.
            params: ``top``, the number of classes per video, and ``views``, as in ``4x3``: clips per video and crops
                per clip.

        Returns:
            A table with the column ``top``: for each video a list of dicts with ``class`` and ``probability``, the
            most likely first.

        Raises:
            MlflowException: a parameter or a video cannot be used; the message names the row.
        """
        params = params or {}
        try:
            top, views = params.get("top", len(self.names)), params.get("views")
            if top < 1:
                raise UserError(f"top {top}: expected the number of classes to return, at least 1")
            config = with_views(self.config, parse_views(views) if views else None)
            with self.lock, files_of(model_input[VIDEO].tolist()) as files:
                found = list(predict_files(self.scorer(config), config, self.names, files, top))
            refuse_bad_rows(model_input[VIDEO].tolist(), [prediction.error for prediction in found])
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        classes = [[{"class": name, "probability": share} for name, share in prediction.top] for prediction in found]
        return pd.DataFrame({"top": pd.Series(classes, dtype=object, index=model_input.index)})

    def scorer(self, config: Config) -> Any:
        """Return the function that ``predict_files`` needs."""
        views = config.eval.clips * config.eval.crops

        def score(clips: Tensor) -> Tensor:
            with torch.no_grad():
                return self.module(clips).log_softmax(1).unflatten(0, (-1, views))

        return score


def _load_pyfunc(data_path: str) -> VideoModel | BoxModel:
    """Load the model. MLflow calls this function by its name.

    Args:
        data_path: a folder with ``MODEL_FILE`` and ``RECIPE_FILE``.
    """
    config = Config.model_validate(yaml.safe_load(Path(data_path, RECIPE_FILE).read_text()))
    return BoxModel(data_path) if config.task == "detection" else VideoModel(data_path, config)


@contextmanager
def files_of(videos: Sequence[Any]) -> Iterator[list[str]]:
    """Paths or URIs of the videos in a request. Those that came as bytes lie in a temporary folder.

    Raises:
        UserError: a row is empty, or its base64 is not valid.
    """
    with tempfile.TemporaryDirectory(prefix="posmlp-") as folder:
        files, errors = list(videos), [""] * len(videos)
        for row, text in enumerate(videos):
            try:
                content = decode_base64(text)
            except UserError as error:
                errors[row] = str(error)
                continue
            if content is not None:
                files[row] = f"{folder}/row-{row + 1}"
                Path(files[row]).write_bytes(content)
        refuse_bad_rows(videos, errors)
        yield files


def decode_base64(text: Any) -> bytes | None:
    """The bytes of a video that is given as base64 text, also as a ``data:`` URI; None if the text is a path or a URI.

    A text is base64 if it is a ``data:`` URI, or longer than a path can be, or if its bytes begin as a video does.

    Raises:
        UserError: it is empty or neither.
    """
    if not isinstance(text, str) or not text.strip():  # a missing value is None or NaN
        raise UserError("it is empty; expected a path, a URI or the base64 text of a video")
    is_data = text.startswith("data:")
    compact = "".join((text.partition(",")[2] if is_data else text).split())
    certain = is_data or len(compact) > MAX_PATH
    try:
        head = base64.b64decode(compact[: HEAD_BYTES // 3 * 4], validate=True)
        if not certain and not VIDEO_HEAD.match(head):
            return None
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        if certain:
            raise UserError(f"it is neither a path nor valid base64 ({error})") from error
        return None


def refuse_bad_rows(videos: Sequence[Any], errors: Sequence[str]) -> None:
    """Raise a UserError that names the rows with an error; rows are counted from 1.

    Args:
        errors: what is wrong with each row; empty if nothing is.
    """
    bad = [(row, error) for row, error in enumerate(errors) if error]
    if bad:
        parts = [f"row {row + 1} of {len(videos)} ({shown(videos[row])}): {error}" for row, error in bad[:MAX_ERRORS]]
        more = f"; and {len(bad) - MAX_ERRORS} more rows" if len(bad) > MAX_ERRORS else ""
        raise UserError("; ".join(parts) + more)


def shown(video: Any) -> str:
    """How a message names a row's video."""
    text = str(video)
    return text if len(text) <= SHOWN else f"{text[:40]}..., {len(text)} characters"
