"""The results of validation videos: those of all workers in the order of the list, whatever the number of workers."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.loader import global_order, local_order, rows_per_step
from pipelines.training.worker import hits_text
from posmlp.config import load_recipe
from posmlp.learn.evaluation import ClassificationMetrics


@given(st.text("01-", min_size=1, max_size=70), st.integers(1, 4), st.sampled_from([4, 8, 12]), st.integers(1, 3))
def test_results_are_in_the_order_of_the_list(text, world, batch, views):
    config = load_recipe("demo", [f"train.global_batch={batch}", f"eval.clips={views}"])
    order = global_order(len(text), config, 0, train=False, world=world)
    values = np.array([{"1": 1, "0": 0, "-": -1}[character] for character in text], np.int8)
    parts = []
    for rank in range(world):
        own = local_order(order, rows_per_step(config, train=False, world=world), rank, world)
        parts.append(np.where(own >= 0, values[own], -1).astype(np.int8))
    assert hits_text(parts, len(text), config).decode() == text


def test_a_batch_says_which_videos_are_hits():
    scores = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]).log()
    result = ClassificationMetrics.empty(2)
    hits = result.add(scores, torch.tensor([1, 1, 1]), torch.tensor([1.0, 1.0, 0.0]))
    assert hits.tolist() == [1, 0, -1] and hits.dtype == torch.int8
    assert result.metrics()["val/top1"] == 0.5
