"""Predict the classes of single videos with a trained model: ``posmlp predict``. It needs neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipelines.runs.models import find_checkpoint, load_trained_model, output_names
from posmlp.config import Config, Task
from posmlp.errors import UserError
from posmlp.model.backbone import PosMLPVideo
from posmlp.predict import Prediction, predict_files
from posmlp.tasks.recognition import score_views
from posmlp.video.views import with_views

NEEDED = {  # what a model of each task is told, in the message to those who do otherwise
    "recognition": "leave out --boxes: it classifies whole videos",
    "detection": "give the boxes of the people in the videos, as in --boxes boxes.csv",
}


def predict(uri: str, files: Sequence[str], top: int = 5, views: tuple[int, int] | None = None) -> Iterator[Prediction]:
    """Yield the most likely classes of each file, in order, each as soon as it is ready. Uses a GPU if there is one.

    Args:
        uri: name or folder of a run (its best checkpoint is used), or folder of a checkpoint.
        files: videos (paths or URIs), images, or folders of numbered frames. A file that
            cannot be read gives a ``Prediction`` with an error.
        top: number of classes per file.
        views: clips per video and crops per clip (``parse_views``); None: the recipe's.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it is not for recognition. Raised by the call
            itself, not by the iterator.
    """
    model, config, names = load_for_prediction(uri, "recognition")
    config = with_views(config, views)
    device = next(model.parameters()).device

    def score(clips: Tensor) -> Tensor:
        return score_views(model, clips.to(device), config)

    return predict_files(score, config, names, files, top)


def load_for_prediction(uri: str, task: Task) -> tuple[PosMLPVideo, Config, list[str]]:
    """Load a trained model on the GPU if there is one, its recipe without a cache, and the names of its outputs.

    Args:
        uri: name or folder of a run (its best checkpoint is used), or folder of a checkpoint.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or it is for another task.
    """
    try:
        model, info = load_trained_model(find_checkpoint(uri))
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    config = info.recipe()
    if config.task != task:
        raise UserError(f"{uri} is a model for {config.task}; {NEEDED[config.task]}")
    config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": None})})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).freeze(), config, output_names(info.classes, config.model.variant().num_classes)
