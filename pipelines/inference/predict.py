"""Predict the classes of single videos with a trained model: ``posmlp predict``. It needs neither Ray nor MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipelines.runs.models import find_checkpoint, load_trained_model, output_names
from posmlp.errors import UserError
from posmlp.predict import Prediction, predict_files
from posmlp.tasks.recognition import score_views
from posmlp.video.views import with_views


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).freeze()
    names = output_names(info.classes, config.model.variant().num_classes)

    def score(clips: Tensor) -> Tensor:
        return score_views(model, clips.to(device), config)

    return predict_files(score, config, names, files, top)
