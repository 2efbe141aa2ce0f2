"""The results of validation videos, in the order of the list."""

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.loader import global_order, local_order, rows_per_step
from pipelines.training.worker import hits_text
from posmlp.config import load_recipe
from posmlp.learn.evaluation import ClassificationMetrics
from posmlp.tasks import task_of
from posmlp.video.batch import Batch


@given(st.text("01-", min_size=1, max_size=40), st.integers(1, 4), st.sampled_from([4, 8, 12]), st.integers(1, 3))
def test_results_are_in_the_order_of_the_list(text, world, batch, views):
    """Whatever the number of workers: each scores its own batches, and padding counts for no row."""
    config = load_recipe("demo", [f"train.global_batch={batch}", f"eval.clips={views}", "model.num_classes=2"])
    table = pa.table({"label": pa.array([1] * len(text), pa.int32())})
    order = global_order(len(text), config, 0, train=False, world=world)
    parts = []
    for rank in range(world):
        results = task_of(config).results(config, table)
        for own in local_order(order, rows_per_step(config, train=False, world=world), rank, world):
            real = np.array([row >= 0 and text[row] != "-" for row in own])
            hit = torch.tensor([row >= 0 and text[row] == "1" for row in own])
            scores = torch.where(hit[:, None], torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1])).log()
            rows = torch.from_numpy(np.maximum(own, 0)).repeat_interleave(views)
            weights = torch.from_numpy(real.astype(np.float32)).repeat_interleave(views)
            clips, labels = torch.zeros(len(rows), 1), torch.ones(len(rows), dtype=torch.int64)
            given_batch = Batch(clips, labels, weights, rows, rows)
            results.add(given_batch, results.wanted(scores[:, None].repeat(1, views, 1), given_batch))
        parts.append(results.hits())
    assert hits_text(np.max(parts, 0)).decode() == text  # as RecognitionResults.gather combines them
    assert results.samples == (parts[-1] >= 0).sum()


def test_a_batch_says_which_videos_are_hits():
    scores = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]).log()
    result = ClassificationMetrics.empty(2)
    hits = result.add(scores, torch.tensor([1, 1, 1]), torch.tensor([1.0, 1.0, 0.0]))
    assert hits.tolist() == [1, 0, -1] and hits.dtype == torch.int8
    assert result.metrics()["val/top1"] == 0.5
