"""Score the videos of a split on Ray actors.

Ray tasks anywhere in the cluster decode one block of videos each, as in training (``pipelines.data.loader``). Actors
score the blocks, and the driver gets the scores in order. The actors are independent: when one dies, Ray scores its
block again. Every video is in exactly one block, so nothing is padded. (A pool of actors of Ray Data would do the same,
but it restarts a dying actor for ever.)
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor, nn

from pipelines.cluster.capacity import LongWait, explain_task_wait, live_runs, worker_resources
from pipelines.cluster.session import WORKER_ENV
from pipelines.data.loader import (
    DECODE_TASKS_PER_CPU,
    OBJECT_STORE_SHARE,
    decode_rows,
    decoding_options,
    rows_per_block,
)
from pipelines.data.scan import ScanProgress
from pipelines.runs.errors import BadVideo
from posmlp import create_model
from posmlp.config import Config, ScalingSection
from posmlp.errors import UserError
from posmlp.metrics import MAIN_METRICS
from posmlp.model.backbone import PosMLPVideo
from posmlp.tasks import task_of
from posmlp.video.batch import Batch
from posmlp.video.clip import views_per_video
from posmlp.video.manifest import Manifest
from posmlp.video.views import videos_per_pass

logger = logging.getLogger(__name__)

BAD_VIDEOS_SHOWN = 5  # in an error
POLL_S = 1.0
EARLY_BYTES = 128 * 2**20  # of scores that wait on the driver for a slower block


def score_good_videos(
    manifest: Manifest,
    config: Config,
    weights: Mapping[str, Tensor],
    bad: list[BadVideo],
    scorer: type[Scorer] | None = None,
    *args: Any,
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Yield row indices of the manifest and the scores of each of them, one block at a time, in the manifest's order.

    Args:
        bad: receives the videos that could not be decoded, in the manifest's order.
        scorer: class of the actor; None: ``Scorer``.
        args: further arguments of its constructor, after the recipe.

    Raises:
        UserError: too many videos are bad (raised as soon as that is certain), or the workers fail.
    """
    rows, progress, unit = len(manifest.rows), None, MAIN_METRICS[config.task].unit
    for first, block in score_blocks(manifest, config, weights, scorer or Scorer, *args):
        # The clock starts with the first block: the start of the workers is not part of the rate.
        progress = progress or ScanProgress(rows, "scored", unit)
        for text in block["fatal"][block["fatal"] != ""]:
            raise UserError(str(text))
        good = block["reason"] == ""
        for i in np.flatnonzero(~good):
            bad.append(BadVideo(*(str(block[k][i]) for k in ("sample_id", "uri", "reason"))))
        refuse_many_bad(bad, rows, unit, config.data.max_bad_fraction)
        if good.any():
            yield first + np.flatnonzero(good), list(block["scores"])
        progress.add(len(good))
    if len(bad) == rows:
        raise UserError(f"no video could be decoded; the first one, {bad[0].uri}: {bad[0].reason}")


def score_blocks(
    manifest: Manifest, config: Config, weights: Mapping[str, Tensor], scorer: type[Scorer], *args: Any
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yield the first row and the result of ``Scorer.score`` for every block of the manifest, in order.

    A result that is early waits for those before it. If too many wait, no further block starts.

    Raises:
        UserError: the workers fail more often than ``scaling.max_failures``.
    """
    scaling, size = config.scaling, rows_per_block(config, False)
    starts = range(0, len(manifest.rows), size)
    recipe, shared_weights = config.model_dump(), ray.put(dict(weights))
    decoder = ray.remote(decode).options(max_retries=scaling.max_failures, **decoding_options(scaling))
    resources = worker_resources(scaling)
    options: dict[str, Any] = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
    options |= {"label_selector": scaling.train_on} if scaling.train_on else {}
    options |= {"max_restarts": scaling.max_failures, "max_task_retries": scaling.max_failures}
    actor: Any = ray.remote(scorer).options(**options, runtime_env={"env_vars": WORKER_ENV})
    # An elastic recipe may name more workers than there is room for; capacity.wait_for_room has checked min_workers.
    scorers = [actor.remote(recipe, *args) for _ in range(scaling.fewest_workers)]
    decoding: dict[ray.ObjectRef, int] = {}  # and the number of the block
    scoring: dict[ray.ObjectRef, tuple[int, int]] = {}  # and the number of the block and that of the scorer
    early: dict[int, dict[str, np.ndarray]] = {}  # results of blocks, by number
    started, yielded = 0, 0  # numbers of blocks
    limit = max_blocks_in_flight(config)
    span = max(limit, max_early_blocks(config))
    try:
        while yielded < len(starts):
            while started < min(len(starts), yielded + span) and len(decoding) + len(scoring) < limit:
                decoding[decoder.remote(manifest.rows.slice(starts[started], size), recipe)] = started
                started += 1
            done = next_result([*scoring, *decoding], scaling)
            if done in scoring:
                number, _ = scoring.pop(done)
                early[number] = ray.get(done)
            else:
                number, busy = decoding.pop(done), [each for _, each in scoring.values()]
                least_busy = min(range(len(scorers)), key=busy.count)
                scoring[scorers[least_busy].score.remote(done, [shared_weights])] = number, least_busy
            while yielded in early:
                yield starts[yielded], early.pop(yielded)
                yielded += 1
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        hint = "; if memory ran out, lower scaling.micro_batch"
        raise UserError(
            f"scoring failed: {type(cause).__name__}: {' '.join(str(cause).split())[:500]}{hint}"
        ) from error
    finally:
        for scorer_actor in scorers:
            ray.kill(scorer_actor)


def next_result(tasks: list[ray.ObjectRef], scaling: ScalingSection) -> ray.ObjectRef:
    """Wait for one of these tasks, and tell the user if that takes long."""
    begun, wait = time.monotonic(), LongWait()
    while True:
        done, _ = ray.wait(tasks, timeout=POLL_S, fetch_local=False)  # the driver does not need the clips
        if done:
            return done[0]
        wait.check(time.monotonic() - begun, partial(explain_task_wait, "the next block of videos", scaling))


def max_early_blocks(config: Config) -> int:
    """Return how many blocks may be ahead of the first one that is not done, so that their scores fit in memory."""
    videos, variant = rows_per_block(config, False), config.model.variant()
    return EARLY_BYTES // (videos * views_per_video(config, False) * variant.num_classes * 4)


def max_blocks_in_flight(config: Config) -> int:
    """Return how many blocks may be in decoding or wait for a scorer.

    It is enough that no CPU which the scorers leave is idle, and few enough that a slow device does not fill the object
    store.
    """
    cluster, scaling, variant = ray.cluster_resources(), config.scaling, config.model.variant()
    free = max(1.0, cluster.get("CPU", 1) - scaling.workers * scaling.cpus_per_worker)
    clips = rows_per_block(config, False) * views_per_video(config, False)
    block_bytes = clips * variant.frames * variant.image_size**2 * 3
    runs = 1 + live_runs()  # that share the cluster, this evaluation included
    fitting = int(OBJECT_STORE_SHARE * cluster.get("object_store_memory", 2**30) / block_bytes / runs)
    return max(1, min(fitting, int(DECODE_TASKS_PER_CPU * free / runs) + scaling.workers))


def decode(rows: pa.Table, config: dict[str, Any]) -> dict[str, Any]:
    """Ray task: decode one block of manifest rows (``pipelines.data.loader.decode_rows``); ``table`` has the rows."""
    return decode_rows(rows, np.ones(len(rows), bool), Config.model_validate(config), 0, False) | {"table": rows}


class Scorer:
    """Ray actor: a model on its device.

    The weights come with each block as a reference, and the actor loads them with the first block. As an argument of
    the constructor, a reference makes Ray print an error for every actor that it may have to restart.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = Config.model_validate(config)
        scaling = self.config.scaling
        torch.set_num_threads(scaling.threads_per_worker or max(1, (os.cpu_count() or 1) // scaling.workers))
        self.device = torch.device("cuda" if scaling.use_gpu is True else "cpu")
        self.model: nn.Module | None = None

    def load(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return the model with these weights, ready for ``score_batch``."""
        section = self.config.model
        model = create_model(section.name, **section.overrides())
        model.load_state_dict(weights)
        return self.prepare(model.to(self.device))

    def prepare(self, model: PosMLPVideo) -> nn.Module:
        """Return the model to run."""
        return model.freeze()

    def score(self, columns: dict[str, Any], weights: Sequence[ray.ObjectRef]) -> dict[str, Any]:
        """Score one block.

        Args:
            columns: as of ``decode``.
            weights: one reference to the weights. It is in a list, else Ray would fetch the weights for each block.

        Returns:
            The rows' ``sample_id``, ``uri``, ``reason``, ``fatal``, and ``scores``: those of each good row, in order.
        """
        self.model = self.model or self.load(ray.get(weights[0]))
        task, found = task_of(self.config), dict[int, np.ndarray]()
        for rows in self.passes(columns):
            part = {key: columns[key][rows] for key in ("row", "real", "reason", "clip", "shown", "seeds")}
            part["clip"] = np.stack(list(part["clip"]))
            batch = task.collate(part, columns["table"], self.config, train=False).to(self.device)
            scores = task.by_row(self.score_batch(self.model, batch).cpu(), batch)
            found |= zip(rows.tolist(), (each.numpy() for each in scores), strict=True)
        kept = {key: columns[key] for key in ("sample_id", "uri", "reason", "fatal")}
        return kept | {"scores": [found[row] for row in sorted(found)]}

    def passes(self, columns: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the good rows that go through the model together: those with clips of one size, as many as fit."""
        good, size = np.flatnonzero(columns["reason"] == ""), videos_per_pass(self.config)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for row in good.tolist():
            shapes.setdefault(columns["clip"][row].shape, []).append(row)
        for rows in shapes.values():
            for first in range(0, len(rows), size):
                yield np.array(rows[first : first + size])

    def score_batch(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of a batch (``Task.score``)."""
        return task_of(self.config).score(model, batch, self.config)


def refuse_many_bad(bad: Sequence[BadVideo], rows: int, unit: str, limit: float) -> None:
    """Raise a UserError when more than ``limit`` of the rows are bad.

    Args:
        unit: what the rows are.
        limit: ``data.max_bad_fraction``.
    """
    if len(bad) > limit * rows:
        examples = "".join(f"\n  {video.uri}: {video.reason}" for video in bad[:BAD_VIDEOS_SHOWN])
        raise UserError(
            f"{len(bad)} of {rows} {unit} could not be decoded so far, more than data.max_bad_fraction {limit:.1%} "
            f"allows. Repair them (`posmlp data check` lists all), or raise the limit. The first ones:{examples}"
        )
