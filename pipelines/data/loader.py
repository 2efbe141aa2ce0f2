"""Manifest rows to batches of decoded clips, by Ray Data.

Each training worker streams its share of the rows through Ray Data plans of its own, whose decode tasks run anywhere in
the cluster. Which rows are in which global batch is decided here, from (seed, epoch) alone, before anything is decoded:
the order does not depend on the number of workers, no row is lost to an equal split, and a run starts at any step by
leaving out the rows before it. (``streaming_split`` truncates to equal shares and fixes no order; ray#63285.)

A plan covers a *segment* of at most ``SEGMENT_BLOCKS`` blocks, as a plan takes 2 ms a block before its first result,
and the next segment's is started before one ends, also across epochs: the device does not wait at the seams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray.data import DataContext, ExecutionOptions, ExecutionResources

from pipelines.runs.errors import BadVideo
from pipelines.tracking import prometheus
from posmlp.config import Config, ScalingSection
from posmlp.errors import UserError
from posmlp.video.batch import Batch
from posmlp.video.clip import load_clips, views_of
from posmlp.video.decode import DecodeError
from posmlp.video.sampling import sample_seed

SEGMENT_BLOCKS = 256
QUEUED = 2  # tasks asked for, for each CPU: one that runs, and one that waits so that the CPU never does
STORE_SHARE = 0.25  # of the object store for one plan of all workers; up to three are open: two of training, one other


def global_order(rows: int, config: Config, epoch: int, *, train: bool, world: int = 1) -> np.ndarray:
    """Row indices of one epoch in the order of the global batches, int64; -1 fills a place that counts for nothing.

    Training: a new permutation each epoch; the rows left after the last full global batch wait for another epoch.
    Validation: every row once, in order, filled up to whole batches of ``world`` workers.
    """
    size = rows_per_step(config, train=train, world=world)
    if train:
        order = np.random.default_rng([config.train.seed, epoch]).permutation(rows)
        return order[: rows // size * size]
    filled = np.full(math.ceil(rows / size) * size, -1)
    filled[:rows] = np.arange(rows)
    return filled


def rows_per_step(config: Config, *, train: bool, world: int = 1) -> int:
    """Videos in a global batch: each gives ``data.repeats`` clips to a training batch, and counts once in validation.

    A validation batch has all views of its videos; there are fewer videos in it then, as nothing depends on them.
    """
    if train:
        return config.train.global_batch // config.data.repeats
    return max(1, config.train.global_batch // world // views_of(config, False)) * world


def rows_per_block(config: Config, train: bool) -> int:
    """Videos that one task decodes: ``data.rows_per_block``, fewer where each has many views."""
    return max(1, config.data.rows_per_block // views_of(config, train))


def local_order(order: np.ndarray, size: int, rank: int, world: int, together: int = 1) -> np.ndarray:
    """A worker's part of ``global_order``, ``[batches, share]``: its contiguous share of every global batch.

    Args:
        size: rows in a global batch.
        together: so many rows that follow each other stay together, as the pairs that are mixed do. Where they do not
            divide by the workers the shares of some are filled with -1: all workers' batches have the same size.
    """
    units = order.reshape(-1, size // together, together)
    mine = np.array_split(units, world, axis=1)[rank].reshape(len(units), -1)
    share = math.ceil(size / together / world) * together
    return np.pad(mine, ((0, 0), (0, share - mine.shape[1])), constant_values=-1)


@dataclass
class Split:
    """One split of the data set on one training worker.

    Attributes:
        rows: the whole split's manifest rows (``posmlp.video.manifest.Manifest.rows``), or a reference to them.
        bad: the videos of this worker's share that failed since ``take_bad``.
        taken_over: the videos that PyAV had to decode in place of decord since ``take_bad``.
    """

    rows: pa.Table | ray.ObjectRef
    config: Config
    train: bool
    rank: int = 0
    world: int = 1
    bad: list[BadVideo] = field(default_factory=list)
    taken_over: int = 0

    def __post_init__(self) -> None:
        self.reference = self.rows if isinstance(self.rows, ray.ObjectRef) else ray.put(self.rows)
        self.count = len(ray.get(self.reference))
        self.size = rows_per_step(self.config, train=self.train, world=self.world)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return self.count // self.size if self.train else math.ceil(self.count / self.size)

    def batches(self, epoch: int, step: int = 0, until: int | None = None) -> Iterator[Batch]:
        """The worker's batches from a step of an epoch on, on the CPU.

        Args:
            epoch: the first epoch.
            step: batches of it to leave out; their videos are not decoded.
            until: the epoch to stop before; None is the next. The seams between epochs cost no wait.
        """
        plans = (
            (self.plan(order.reshape(-1), now, order.shape[1]), len(order))
            for now in range(epoch, epoch + 1 if until is None else until)
            for order in self.segments(now, step if now == epoch else 0)
        )
        for columns in chained(plans):
            self.note(columns)
            yield collate(columns)

    def segments(self, epoch: int, step: int) -> Iterator[np.ndarray]:
        """The row indices of this worker's batches from ``step`` on, ``[batches, rows]``, each part for one plan."""
        order = global_order(self.count, self.config, epoch, train=self.train, world=self.world)
        together = self.config.clips_together // self.config.data.repeats if self.train else 1
        mine = local_order(order, self.size, self.rank, self.world, together)
        length = max(1, SEGMENT_BLOCKS * rows_per_block(self.config, self.train) // mine.shape[1])
        for start in range(step, len(mine), length):
            yield mine[start : start + length]

    def plan(self, order: np.ndarray, epoch: int, batch: int) -> Iterator[dict[str, np.ndarray]]:
        """Ray Data's plan for some rows: batches of so many rows as columns, decoded once the first is asked for."""
        configure_ray_data(self.config, self.train, self.world)
        blocks = math.ceil(len(order) / rows_per_block(self.config, self.train))
        dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
            decode_block,
            batch_size=None,
            fn_kwargs={
                "rows": self.reference,
                "order": order,
                "config": self.config.model_dump(),
                "epoch": epoch,
                "train": self.train,
            },
            **decoding_options(self.config.scaling),
        )
        return iter(dataset.iter_batches(batch_size=batch, batch_format="numpy", prefetch_batches=2))

    def note(self, columns: dict[str, np.ndarray]) -> None:
        """Record the bad videos of a batch.

        Raises:
            UserError: a task met what no other video will be spared, such as a cache folder that cannot be written.
        """
        for text in columns["fatal"][columns["fatal"] != ""]:
            raise UserError(str(text))
        for i in np.flatnonzero(columns["reason"] != ""):
            prometheus.count(self.config.name, "decode_errors")
            self.bad.append(BadVideo(*(str(columns[k][i]) for k in ("sample_id", "uri", "reason"))))
        if self.config.data.decoder == "decord":
            self.taken_over += int((columns["decoder"] == "pyav").sum())

    def take_bad(self) -> list[BadVideo]:
        """The bad videos since the last call."""
        bad, self.bad, self.taken_over = self.bad, [], 0
        return bad


def collate(columns: dict[str, np.ndarray]) -> Batch:
    """Decoded rows (``decode_rows``) to a batch, a video's views adjacent; what failed counts for nothing."""
    good = (columns["reason"] == "") & columns["real"]
    clips = columns["clip"]  # [rows, V, T, H, W, 3]
    if not good.all() and good.any():
        # Batch norm sees every clip of the batch, so one without a picture shows another's, at weight 0.
        clips = clips[np.where(good, np.arange(len(good)), np.flatnonzero(good)[0])]
    views = clips.shape[1]
    return Batch(
        clips=torch.from_numpy(clips if clips.flags.writeable else clips.copy()).flatten(0, 1),
        labels=torch.from_numpy(columns["label"].astype(np.int64)).repeat_interleave(views),
        weights=torch.from_numpy(good.astype(np.float32)).repeat_interleave(views),
        seeds=torch.from_numpy(np.stack(columns["seeds"]).astype(np.int64)).flatten(),
    )


def chained(plans: Iterator[tuple[Iterator[Any], int]]) -> Iterator[Any]:
    """The results of all plans, each of a known number; a plan is started when three quarters of the one before are
    taken, in a thread that waits for its first result."""
    with ThreadPoolExecutor(1) as pool:
        following = next(plans, None)
        first = pool.submit(next, following[0]) if following else None
        while following is not None and first is not None:
            (results, length), here = following, first
            following, first = None, None
            for taken in range(1, length + 1):
                result = here.result() if taken == 1 else next(results)
                if taken == math.ceil(length * 3 / 4):
                    following = next(plans, None)
                    first = pool.submit(next, following[0]) if following else None
                yield result


def configure_ray_data(config: Config, train: bool, world: int) -> None:
    """Ray Data's settings in this process: rows in order, a fair part of the CPUs that training leaves, and no more
    decoded ahead than a part of the object store: a slow device must not make it spill."""
    scaling, variant = config.scaling, config.model.variant()
    cluster = ray.cluster_resources()
    free = cluster.get("CPU", 1) - world * scaling.cpus_per_worker
    clip = variant.frames * variant.image_size**2 * 3
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Ray Data holds back tasks whose output might not fit, and takes blocks for this large until it has seen some.
    context.target_max_block_size = max(2**20, rows_per_block(config, train) * views_of(config, train) * clip)
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(
            cpu=QUEUED * max(1.0, free // world),
            object_store_memory=cluster.get("object_store_memory", 2**30) * STORE_SHARE / world,
        ),
    )


def decoding_options(scaling: ScalingSection) -> dict[str, Any]:
    """Ray's options for tasks that decode: on nodes with the labels ``scaling.decode_on``, else on any."""
    if not scaling.decode_on:
        return {}
    return {"label_selector": scaling.decode_on, "fallback_strategy": [{"label_selector": {}}]}


def decode_block(
    block: dict[str, np.ndarray], rows: ray.ObjectRef, order: np.ndarray, config: dict, epoch: int, train: bool
) -> dict[str, np.ndarray]:
    """Ray Data task: the ``block["id"]``-th part of ``order``, decoded; see ``decode_rows``."""
    cfg = Config.model_validate(config)
    (number,) = block["id"]
    size = rows_per_block(cfg, train)
    mine = order[number * size : (number + 1) * size]
    return decode_rows(ray.get(rows).take(np.maximum(mine, 0)), mine >= 0, cfg, epoch, train)


def decode_rows(table: pa.Table, real: np.ndarray, config: Config, epoch: int, train: bool) -> dict[str, np.ndarray]:
    """Manifest rows to clips uint8 ``[rows, V, T, H, W, 3]``; a row that fails says why and stays.

    Args:
        table: manifest rows.
        real: bool ``[rows]``; the others only fill a place and are not decoded.
    """
    rows, variant, views = table.to_pylist(), config.model.variant(), views_of(config, train)
    clips = np.zeros((len(rows), views, variant.frames, variant.image_size, variant.image_size, 3), np.uint8)
    reasons, decoders, fatal = ([""] * len(rows) for _ in range(3))
    for i in np.flatnonzero(real):
        row = rows[i]
        try:
            images = row["frames"]
            clips[i], used = load_clips(row["uri"], row["sample_id"], config, epoch=epoch, train=train, images=images)
            decoders[i] = used if images is None else "pictures"
        except DecodeError as error:
            reasons[i] = error.reason
        except UserError as error:  # as data: Ray would bury it in tracebacks of its own
            fatal[i] = str(error)
            break
        except Exception as error:  # nothing about one video may cost another
            reasons[i] = f"it cannot be read ({type(error).__name__}: {error}); re-encode it, or remove it"
    seed = config.train.seed
    return {
        "sample_id": np.array([row["sample_id"] for row in rows], dtype=object),
        "uri": np.array([row["uri"] for row in rows], dtype=object),
        "label": np.array([row["label"] for row in rows], np.int32),
        "real": real,
        "clip": clips,
        "seeds": np.array([[sample_seed(seed, epoch, row["sample_id"], v) for v in range(views)] for row in rows]),
        "reason": np.array(reasons, dtype=object),
        "decoder": np.array(decoders, dtype=object),
        "fatal": np.array(fatal, dtype=object),
    }


def object_store() -> tuple[float, float]:
    """Megabytes in the cluster's object store now, and those spilled to disk since it started; NaN if not to be had."""
    try:
        stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    except Exception:  # a private interface that asks every node: whatever it raises must not end a run
        return math.nan, math.nan
    return stats.object_store_bytes_used / 2**20, stats.spilled_bytes_total / 2**20
