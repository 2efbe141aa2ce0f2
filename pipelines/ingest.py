"""Manifest rows to batches of decoded clips, by Ray Data.

Each training worker streams its share of the epoch's rows through a Ray Data plan of its own, whose decode tasks run
anywhere in the cluster. Which rows are in which global batch is decided here, from (seed, epoch) alone, before anything
is decoded: the order does not depend on the number of workers, and no row is lost to an equal split.
(``streaming_split`` truncates to equal shares and fixes no order; ray#63285.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import DataContext, ExecutionOptions, ExecutionResources

from posmlp.config import Config
from posmlp.learn.learner import Batch
from posmlp.video.augment import draw
from posmlp.video.decode import DecodeError, load_clip
from posmlp.video.sampling import sample_rng


@dataclass(frozen=True)
class BadVideo:
    """A video that could not be decoded."""

    sample_id: str
    uri: str
    reason: str


def global_order(rows: int, config: Config, epoch: int, *, train: bool) -> np.ndarray:
    """Row indices of one epoch in the order of the global batches, int64; -1 fills a place that counts for nothing.

    Training: a new permutation each epoch; the rows left after the last full global batch wait for another epoch.
    Validation: every row once, in order, filled up so that all workers take the same number of batches.
    """
    size = config.train.global_batch
    if train:
        order = np.random.default_rng([config.train.seed, epoch]).permutation(rows)
        return order[: rows // size * size]
    filled = np.full(math.ceil(rows / size) * size, -1)
    filled[:rows] = np.arange(rows)
    return filled


def local_order(order: np.ndarray, global_batch: int, rank: int, world: int) -> np.ndarray:
    """A worker's part of ``global_order``: its contiguous share of every global batch."""
    return order.reshape(-1, world, global_batch // world)[:, rank].reshape(-1)


@dataclass
class Split:
    """One split of the data set on one training worker.

    Attributes:
        rows: the whole split's manifest rows (``posmlp.video.manifest.Manifest.rows``).
        bad: the videos of this worker's share that failed since ``take_bad``.
    """

    rows: pa.Table
    config: Config
    train: bool
    rank: int = 0
    world: int = 1
    bad: list[BadVideo] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(global_order(len(self.rows), self.config, 0, train=self.train)) // self.config.train.global_batch

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The worker's batches of one epoch, on the CPU, each of ``global_batch / world`` clips."""
        config = self.config
        order = global_order(len(self.rows), config, epoch, train=self.train)
        mine = local_order(order, config.train.global_batch, self.rank, self.world)
        table = self.rows.take(np.maximum(mine, 0)).append_column("real", pa.array(mine >= 0))
        step = config.data.rows_per_block
        blocks = [table.slice(i, step).combine_chunks() for i in range(0, len(table), step)]
        configure_ray_data(config)
        dataset = ray.data.from_arrow(blocks).map_batches(
            decode_rows,
            batch_size=None,
            fn_kwargs={"config": config.model_dump(), "epoch": epoch, "train": self.train},
        )
        for columns in dataset.iter_batches(
            batch_size=config.train.global_batch // self.world, batch_format="numpy", prefetch_batches=2
        ):
            yield self.collate(columns)

    def collate(self, columns: dict[str, np.ndarray]) -> Batch:
        """Decoded rows to a batch; bad ones are recorded, and count for nothing."""
        good = (columns["reason"] == "") & columns["real"]
        for i in np.flatnonzero(columns["reason"] != ""):
            self.bad.append(BadVideo(*(str(columns[k][i]) for k in ("sample_id", "uri", "reason"))))
        clips = columns["clip"]
        if not good.all() and good.any():
            # Batch norm sees every clip of the batch, so one without a picture shows another's, at weight 0.
            clips = clips[np.where(good, np.arange(len(good)), np.flatnonzero(good)[0])]
        return Batch(
            clips=torch.from_numpy(clips if clips.flags.writeable else clips.copy()),
            labels=torch.from_numpy(columns["label"].astype(np.int64)),
            weights=torch.from_numpy(good.astype(np.float32)),
            draws=torch.from_numpy(np.stack(columns["draws"]).astype(np.float32)),
        )

    def take_bad(self) -> list[BadVideo]:
        """The bad videos since the last call."""
        bad, self.bad = self.bad, []
        return bad


def configure_ray_data(config: Config) -> None:
    """Ray Data's settings in this process: rows in order, and a fair part of the CPUs that training leaves."""
    scaling = config.scaling
    free = ray.cluster_resources().get("CPU", 1) - scaling.workers * scaling.cpus_per_worker
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.op_resource_reservation_enabled = False  # one operator: a reservation only leaves CPUs idle
    context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(cpu=max(1.0, free // scaling.workers))
    )


def decode_rows(rows: dict[str, np.ndarray], config: dict, epoch: int, train: bool) -> dict[str, np.ndarray]:
    """Ray Data task: manifest rows to clips uint8 ``[rows, T, H, W, 3]``; a row that fails says why and stays."""
    cfg = Config.model_validate(config)
    variant = cfg.model.variant()
    count = len(rows["sample_id"])
    clips = np.zeros((count, variant.frames, variant.image_size, variant.image_size, 3), np.uint8)
    reasons = [""] * count
    draws = []
    for i, (sample_id, uri) in enumerate(zip(rows["sample_id"], rows["uri"], strict=True)):
        draws.append(draw(sample_rng(cfg.train.seed, epoch, sample_id).spawn(1)[0]))  # apart from the crop's stream
        if not rows["real"][i]:
            continue
        try:
            clips[i] = load_clip(
                uri,
                sample_id,
                cfg.data,
                frames=variant.frames,
                size=variant.image_size,
                seed=cfg.train.seed,
                epoch=epoch,
                train=train,
            )
        except DecodeError as error:
            reasons[i] = error.reason
    return rows | {"clip": clips, "draws": np.stack(draws), "reason": np.array(reasons, dtype=object)}
