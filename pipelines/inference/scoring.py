"""Score the videos of a split on Ray actors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor, nn

from pipelines.cluster.session import WORKER_ENV
from pipelines.data.loader import QUEUED, STORE_SHARE, decode_rows, decoding_options, rows_per_block
from pipelines.data.scan import Progress
from pipelines.inference.views import scored_together
from pipelines.runs.errors import BadVideo
from posmlp import create_model
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.learn.learner import score_views
from posmlp.video.clip import views_of
from posmlp.video.manifest import Manifest

SHOWN = 5  # classes, and bad videos, that a report lists


@dataclass
class Scores:
    """What the model makes of a split; rows as in the manifest.

    Attributes:
        views: float32 ``[videos, views, classes]``, logarithms of probabilities.
        scored: bool ``[videos]``; the others are in ``bad``.
    """

    views: np.ndarray
    scored: np.ndarray
    bad: list[BadVideo] = field(default_factory=list)


def score_split(
    manifest: Manifest, config: Config, weights: Mapping[str, Tensor], echo: Callable[[str], None]
) -> Scores:
    """The scores of all views of a split's videos.

    Raises:
        UserError: too many videos are bad (said as soon as that is certain), or the workers fail.
    """
    shape = (len(manifest.rows), views_of(config, False), config.model.variant().num_classes)
    scores = Scores(np.zeros(shape, np.float32), np.zeros(len(manifest.rows), bool))
    for places, block in good_scores(manifest, config, weights, scores.bad, echo):
        scores.views[places], scores.scored[places] = block, True
    return scores


def good_scores(
    manifest: Manifest,
    config: Config,
    weights: Mapping[str, Tensor],
    bad: list[BadVideo],
    echo: Callable[[str], None],
    scorer: type[Scorer] | None = None,
    *args: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What a scorer makes of a split's videos, with their places in the manifest, a block at a time in any order.

    Args:
        bad: gets the videos that could not be decoded, in the manifest's order when all is done.
        scorer, args: the actor, ``Scorer`` if None, and what it takes beside the recipe.

    Raises:
        UserError: too many videos are bad (said as soon as that is certain), or the workers fail.
    """
    known = {sample: i for i, sample in enumerate(manifest.rows["sample_id"].to_pylist())}
    progress: Progress | None = None
    for block in scored_blocks(manifest, config, weights, scorer or Scorer, *args):
        # A progress from now: what starts the workers is no part of a rate.
        progress = progress or Progress(len(known), "scored", echo)
        for text in block["fatal"][block["fatal"] != ""]:
            raise UserError(str(text))
        good = block["reason"] == ""
        for i in np.flatnonzero(~good):
            bad.append(BadVideo(*(str(block[k][i]) for k in ("sample_id", "uri", "reason"))))
        check_bad(bad, len(known), config.data.max_bad_fraction)
        if good.any():
            yield np.array([known[sample] for sample in block["sample_id"][good]]), block["scores"]
        progress.add(len(good))
    bad.sort(key=lambda video: known[video.sample_id])
    if len(bad) == len(known):
        raise UserError(f"no video could be decoded; the first one, {bad[0].uri}: {bad[0].reason}")


def scored_blocks(
    manifest: Manifest, config: Config, weights: Mapping[str, Tensor], scorer: type[Scorer], *args: Any
) -> Iterator[dict[str, np.ndarray]]:
    """Every row of a manifest in some block, as the columns of ``Scorer``, in the order in which they are done.

    Raises:
        UserError: the workers fail, again and again.
    """
    scaling, size = config.scaling, rows_per_block(config, False)
    parts = (manifest.rows.slice(first, size) for first in range(0, len(manifest.rows), size))
    recipe, shared = config.model_dump(), ray.put(dict(weights))
    decoder = ray.remote(decode).options(max_retries=scaling.max_failures, **decoding_options(scaling))
    options = {"num_cpus": scaling.cpus_per_worker, "num_gpus": int(scaling.use_gpu)}
    options |= {"label_selector": scaling.train_on} if scaling.train_on else {}
    options |= {"max_restarts": scaling.max_failures, "max_task_retries": scaling.max_failures}
    actor = ray.remote(scorer).options(**options, runtime_env={"env_vars": WORKER_ENV})
    scorers = [actor.remote(recipe, *args) for _ in range(scaling.workers)]
    decoding: list[ray.ObjectRef] = []
    scoring: dict[ray.ObjectRef, int] = {}
    left, room = next(parts, None), blocks_in_flight(config)
    try:
        while left is not None or decoding or scoring:
            while left is not None and len(decoding) + len(scoring) < room:
                decoding.append(decoder.remote(left, recipe))
                left = next(parts, None)
            (done,), _ = ray.wait([*scoring, *decoding], fetch_local=False)  # clips are not for the driver
            if done in scoring:
                del scoring[done]
                yield ray.get(done)
            else:
                decoding.remove(done)
                busy = list(scoring.values())
                freest = min(range(len(scorers)), key=busy.count)
                scoring[scorers[freest].score.remote(done, [shared])] = freest
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        hint = "; lower scaling.micro_batch if it is for memory"
        raise UserError(
            f"scoring failed: {type(cause).__name__}: {' '.join(str(cause).split())[:500]}{hint}"
        ) from error
    finally:
        for scorer in scorers:
            ray.kill(scorer)


def blocks_in_flight(config: Config) -> int:
    """Blocks that are being decoded, or wait for a scorer: none of the CPUs that scorers leave waits, and a slow device
    does not fill the object store."""
    cluster, scaling, variant = ray.cluster_resources(), config.scaling, config.model.variant()
    free = max(1.0, cluster.get("CPU", 1) - scaling.workers * scaling.cpus_per_worker)
    videos = rows_per_block(config, False) * views_of(config, False)
    block = videos * variant.frames * variant.image_size**2 * 3
    fitting = int(STORE_SHARE * cluster.get("object_store_memory", 2**30) / block)
    return max(1, min(fitting, int(QUEUED * free) + scaling.workers))


def decode(rows: pa.Table, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ray task: a block of manifest rows, decoded (``pipelines.data.loader.decode_rows``)."""
    return decode_rows(rows, np.ones(len(rows), bool), Config.model_validate(config), 0, False)


class Scorer:
    """Ray actor: a model on its device.

    Its weights come with each block, as a reference, and are taken from the first: Ray prints an error about references
    in the constructor of what it shall start again.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = Config.model_validate(config)
        scaling = self.config.scaling
        torch.set_num_threads(scaling.threads_per_worker or max(1, (os.cpu_count() or 1) // scaling.workers))
        self.device = torch.device("cuda" if scaling.use_gpu else "cpu")
        self.model: nn.Module | None = None

    def load(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """The model with these weights."""
        section = self.config.model
        model = create_model(section.name, **section.overrides())
        model.load_state_dict(weights)
        return model.eval().to(self.device)

    def score(self, columns: dict[str, np.ndarray], weights: Sequence[ray.ObjectRef]) -> dict[str, np.ndarray]:
        """Score a block.

        Args:
            columns: decoded rows (``pipelines.data.loader.decode_rows``).
            weights: one reference to the weights; in a list, else Ray would fetch them for each block.

        Returns:
            The rows' ``sample_id``, ``uri``, ``reason``, ``fatal``, and ``scores``: those of the good rows, in order.
        """
        self.model = self.model or self.load(ray.get(weights[0]))
        good = np.flatnonzero(columns["reason"] == "")
        clips, size = columns["clip"], scored_together(self.config)  # [rows, V, T, H, W, 3]
        scores = []
        for first in range(0, len(good), size):
            pixels = torch.from_numpy(clips[good[first : first + size]]).flatten(0, 1).to(self.device)
            scores.append(self.score_clips(self.model, pixels).cpu().numpy())
        found = np.concatenate(scores) if scores else np.empty(0)
        return {key: columns[key] for key in ("sample_id", "uri", "reason", "fatal")} | {"scores": found}

    def score_clips(self, model: nn.Module, clips: Tensor) -> Tensor:
        """float32 ``[videos, views, classes]`` of uint8 ``[videos * views, T, H, W, 3]``."""
        return score_views(model, clips, self.config)


def check_bad(bad: Sequence[BadVideo], videos: int, limit: float) -> None:
    """End the evaluation when too many videos are bad."""
    if len(bad) > limit * videos:
        examples = "".join(f"\n  {video.uri}: {video.reason}" for video in bad[:SHOWN])
        raise UserError(
            f"{len(bad)} of {videos} videos could not be decoded so far, more than data.max_bad_fraction {limit:.1%} "
            f"allows. Mend them (`posmlp data check` lists all), or raise the limit. The first ones:{examples}"
        )
