"""What the model of a run's last epoch predicts of its validation videos, as a Parquet file in the run's folder."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.runs.checkpoints import UnwritableError
from posmlp import storage
from posmlp.config import FrameOrder
from posmlp.errors import UserError

PREDICTIONS_FILE = "predictions.parquet"
# Log-probabilities by label, with the frames of each clip in this order; null: the video could not be decoded
SCORES: dict[FrameOrder, str] = {"ordered": "scores", "shuffled": "scores_shuffled"}
SCORE_TYPE = pa.list_(pa.float32())


def write_predictions(
    run: str, rows: pa.Table, scores: Mapping[FrameOrder, NDArray[np.float32] | None], classes: Sequence[str]
) -> None:
    """Write ``predictions.parquet``: ``sample_id``, ``label`` and a column of ``SCORES`` for each order of frames.

    ``classes`` in the schema's metadata has the names of the labels.

    Args:
        run: the run's folder.
        rows: of the validation split.
        scores: as of ``Results.predictions``.

    Raises:
        UnwritableError: it cannot be written.
    """
    table = rows.select(["sample_id", "label"])
    for order, values in scores.items():
        assert values is not None, "the task keeps no scores"
        column = pa.array([None if np.isnan(row).any() else row for row in values], SCORE_TYPE)
        table = table.append_column(SCORES[order], column)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"classes": json.dumps(list(classes))}), buffer, compression="zstd")
    uri = storage.join(run, PREDICTIONS_FILE)
    try:
        storage.write_bytes(uri, buffer.getvalue())
    except OSError as error:
        raise UnwritableError(f"{uri} cannot be written: {error}") from error


def read_predictions(run: str) -> pa.Table:
    """Read a run's ``predictions.parquet``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    uri = storage.join(run, PREDICTIONS_FILE)
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except FileNotFoundError as error:
        raise UserError(f"{uri} is missing; delete {run}, and resume the study: it trains that run again") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
