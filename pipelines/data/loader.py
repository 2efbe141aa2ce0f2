"""The data loader, in place of PyTorch's ``DataLoader``: manifest rows to batches of decoded clips, by Ray Data.

Each training worker decodes its share of the rows with Ray Data. The decode tasks run anywhere in the cluster. The rows
of each global batch follow from (seed, epoch) alone and are fixed here, before decoding. So the order does not depend
on the number of workers, no row is lost to an equal split over workers (only an incomplete last batch is dropped), and
a run resumes at any step: the rows before it are left out. (``streaming_split`` truncates to equal shares and fixes no
order; ray#63285.)

A worker's rows of an epoch are cut into *segments* of at most ``SEGMENT_BLOCKS`` blocks. Each segment is a Ray Data
execution of its own, because an execution takes 2 ms per block before its first result. The next segment starts before
the current one ends, also across epochs, so the device does not wait in between.

With ``scaling.decode_in_worker`` a worker decodes the same batches itself. Ray Data takes some milliseconds for a clip,
which is more than reading a small one from a cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionOptions, ExecutionResources

from pipelines.runs.errors import BadVideo
from pipelines.tracking import prometheus
from posmlp.config import Config, ScalingSection
from posmlp.errors import UserError
from posmlp.tasks import task_of
from posmlp.video.batch import Batch
from posmlp.video.clip import views_per_video
from posmlp.video.decode import DecodeError
from posmlp.video.draws import Draws, epoch_draws
from posmlp.video.prefetch import in_background
from posmlp.video.sampling import sample_seed

SEGMENT_BLOCKS = 256
DECODE_TASKS_PER_CPU = 2  # one that runs, and one that waits, so that the CPU is never idle
# Share of the object store for one segment of every worker. Up to three segments are open: two of training, one other.
OBJECT_STORE_SHARE = 0.25
RAY_DATA_SETTINGS = threading.Lock()  # a data set copies the process's settings; training and validation have threads
DECODING_HERE = threading.Lock()  # the threads share the child process in which this one decodes


def global_order(
    rows: int, config: Config, epoch: int, *, train: bool, world: int = 1, draws: Draws | None = None
) -> np.ndarray:
    """Return the row indices of one epoch in the order of the global batches, int64 ``[rows]``; -1 marks padding.

    Training: a new permutation each epoch, or a new order of ``draws``; the rows after the last full global batch are
    left out of this epoch. Validation: every row once, in order, padded to whole batches of ``world`` workers.

    Args:
        draws: the expected draws of the rows; None: each row once. Draw k (from 0) of row i in an epoch is the index
            ``k * rows + i``.
    """
    per_step = rows_per_step(config, train=train, world=world)
    if train:
        rng = np.random.default_rng([config.train.seed, epoch])
        order = rng.permutation(rows) if draws is None else draws.order(rng)
        return order[: len(order) // per_step * per_step]
    padded = np.full(math.ceil(rows / per_step) * per_step, -1)
    padded[:rows] = np.arange(rows)
    return padded


def rows_per_step(config: Config, *, train: bool, world: int = 1) -> int:
    """Return the number of videos in a global batch.

    A training batch has ``data.repeats`` clips of each of its videos. A validation batch has all views of its videos,
    so it has fewer videos if there are many views.
    """
    if train:
        return config.train.global_batch // config.data.repeats
    return max(1, config.train.global_batch // world // views_per_video(config, False)) * world


def rows_per_block(config: Config, train: bool) -> int:
    """Return the number of videos that one task decodes: ``data.rows_per_block``, or fewer if each has many views."""
    return max(1, config.data.rows_per_block // views_per_video(config, train))


def local_order(order: np.ndarray, per_step: int, rank: int, world: int, together: int = 1) -> np.ndarray:
    """Return a worker's rows of ``global_order``, ``[batches, share]``: its contiguous share of every global batch.

    Args:
        per_step: rows in a global batch (``rows_per_step``).
        together: rows in a bundle. The consecutive rows of a bundle stay on one worker, as the pairs of mixup do. If
            the number of bundles is not divisible by the number of workers, some shares are padded with -1, so that all
            workers have batches of the same size.
    """
    bundles = order.reshape(-1, per_step // together, together)
    own = np.array_split(bundles, world, axis=1)[rank].reshape(len(bundles), -1)
    share = math.ceil(per_step / together / world) * together
    return np.pad(own, ((0, 0), (0, share - own.shape[1])), constant_values=-1)


@dataclass
class SplitLoader:
    """The data loader of one split on one training worker.

    Attributes:
        rows: the whole split's manifest rows (``posmlp.video.manifest.Manifest.rows``), or a reference to them.
        num_rows: of the whole split.
        draws: of training rows, if an epoch does not have each of them once.
        rows_per_step: rows in a global batch.
        sharing: returns the number of runs that share the cluster's object store and decoding CPUs now; each segment
            asks it.
    """

    rows: pa.Table | ray.ObjectRef
    config: Config
    train: bool
    rank: int = 0
    world: int = 1
    sharing: Callable[[], int] = lambda: 1

    def __post_init__(self) -> None:
        self.reference = self.rows if isinstance(self.rows, ray.ObjectRef) else ray.put(self.rows)
        self.table = ray.get(self.reference)
        self.num_rows = len(self.table)
        self.draws = epoch_draws(self.table, self.config.data.balance) if self.train else None
        self.rows_per_step = rows_per_step(self.config, train=self.train, world=self.world)

    @property
    def steps(self) -> int:
        """Return the number of batches in an epoch."""
        if not self.train:
            return math.ceil(self.num_rows / self.rows_per_step)
        return (self.draws.total if self.draws else self.num_rows) // self.rows_per_step

    def batches(self, epoch: int, step: int = 0, until: int | None = None) -> Iterator[Batch]:
        """Yield the worker's batches, on the CPU, from a step of an epoch on.

        Args:
            epoch: the first epoch.
            step: number of its batches to skip; their videos are not decoded.
            until: the epoch to stop before; None: ``epoch + 1``. The next epoch is prepared before one ends.
        """
        orders = (
            (order, now)
            for now in range(epoch, epoch + 1 if until is None else until)
            for order in self.segments(now, step if now == epoch else 0)
        )
        decoded: Iterator[dict[str, np.ndarray]]
        if self.config.scaling.decode_in_worker:
            decoded = (self.decode_here(batch, now) for order, now in orders for batch in order)
        else:
            decoded = chain_segments((self.decode_segment(order, now), len(order)) for order, now in orders)
        task = task_of(self.config)
        for columns in decoded:
            bad, decoded_by_pyav = self.failures(columns)
            batch = task.collate(columns, self.table, self.config, train=self.train)
            yield replace(batch, bad=bad, decoded_by_pyav=decoded_by_pyav)

    def segments(self, epoch: int, step: int) -> Iterator[np.ndarray]:
        """Yield this worker's segments of an epoch from ``step`` on: row indices of batches, ``[batches, rows]``."""
        order = global_order(self.num_rows, self.config, epoch, train=self.train, world=self.world, draws=self.draws)
        together = self.config.clips_together // self.config.data.repeats if self.train else 1
        own = local_order(order, self.rows_per_step, self.rank, self.world, together)
        length = max(1, SEGMENT_BLOCKS * rows_per_block(self.config, self.train) // own.shape[1])
        for start in range(step, len(own), length):
            yield own[start : start + length]

    def decode_segment(self, order: np.ndarray, epoch: int) -> Iterator[dict[str, np.ndarray]]:
        """Return the decoded batches of a segment as columns; decoding starts when the first batch is requested.

        Args:
            order: row indices, ``[batches, rows]``.
        """
        rows_per_batch, order = order.shape[1], order.reshape(-1)
        blocks = math.ceil(len(order) / rows_per_block(self.config, self.train))
        sharing = self.sharing()
        with RAY_DATA_SETTINGS:
            configure_ray_data(self.config, self.train, self.world, sharing)
            dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
                decode_block,  # type: ignore[arg-type]  # Ray's type knows no fn_kwargs
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
        return iter(dataset.iter_batches(batch_size=rows_per_batch, batch_format="numpy", prefetch_batches=2))

    def decode_here(self, order: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
        """Decode the batch of the given row indices in this process; -1 marks padding."""
        with DECODING_HERE:
            return decode_order(order, self.table, self.config, epoch, self.train)

    def failures(self, columns: dict[str, np.ndarray]) -> tuple[tuple[BadVideo, ...], int]:
        """The bad videos of a batch, and the number of videos that PyAV decoded in place of decord.

        Raises:
            UserError: a task met an error that affects every video, such as a cache folder that cannot be written.
        """
        for text in columns["fatal"][columns["fatal"] != ""]:
            raise UserError(str(text))
        bad, decoded_by_pyav = [], 0
        for i in np.flatnonzero(columns["reason"] != ""):
            prometheus.increment(self.config.name, "decode_errors")
            bad.append(BadVideo(*(str(columns[k][i]) for k in ("sample_id", "uri", "reason"))))
        if self.config.data.decoder == "decord":
            decoded_by_pyav = int((columns["decoder"] == "pyav").sum())
        return tuple(bad), decoded_by_pyav


def chain_segments(segments: Iterator[tuple[Iterator[Any], int]]) -> Iterator[Any]:
    """Yield the results of all segments in order.

    A segment starts when three quarters of the results of the one before are used. A thread waits for its first result;
    neither a close nor the end of the process waits for that thread.

    Args:
        segments: the results of each segment, and their number.
    """
    following = next(segments, None)
    first = in_background(partial(next, following[0])) if following else None
    while following is not None and first is not None:
        (results, length), here = following, first
        following, first = None, None
        for taken in range(1, length + 1):
            result = here.result() if taken == 1 else next(results)
            if taken == math.ceil(length * 3 / 4):
                following = next(segments, None)
                first = in_background(partial(next, following[0])) if following else None
            yield result


def configure_ray_data(config: Config, train: bool, world: int, sharing: int = 1) -> None:
    """Set up Ray Data in this process, whatever was set before.

    Rows stay in order. Decoding gets this worker's share of the CPUs that training leaves. A limit on decoded clips in
    the object store keeps a slow device from making it spill.

    Args:
        world: number of the run's workers.
        sharing: number of such runs at a time.
    """
    scaling, variant, workers = config.scaling, config.model.variant(), world * sharing
    cluster = ray.cluster_resources()
    free = cluster.get("CPU", 1) - workers * scaling.cpus_per_worker
    clip = variant.frames * variant.image_size**2 * 3
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Ray Data holds back tasks whose output may not fit, and assumes blocks of this size until it has seen some.
    context.target_max_block_size = max(2**20, rows_per_block(config, train) * views_per_video(config, train) * clip)
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(
            cpu=DECODE_TASKS_PER_CPU * max(1.0, free // workers),
            object_store_memory=cluster.get("object_store_memory", 2**30) * OBJECT_STORE_SHARE / workers,
        ),
    )


def decoding_options(scaling: ScalingSection) -> dict[str, Any]:
    """Return Ray's options for decode tasks: nodes with the labels ``scaling.decode_on`` first, else any node."""
    if not scaling.decode_on:
        return {}
    return {"label_selector": scaling.decode_on, "fallback_strategy": [{"label_selector": {}}]}


def decode_block(
    block: dict[str, np.ndarray], rows: ray.ObjectRef, order: np.ndarray, config: dict, epoch: int, train: bool
) -> dict[str, np.ndarray]:
    """Ray Data task: decode block ``block["id"]`` of the rows of a segment, ``order`` (``decode_rows``)."""
    cfg = Config.model_validate(config)
    (index,) = block["id"]
    size = rows_per_block(cfg, train)
    return decode_order(order[index * size : (index + 1) * size], ray.get(rows), cfg, epoch, train)


def decode_order(order: np.ndarray, table: pa.Table, config: Config, epoch: int, train: bool) -> dict[str, np.ndarray]:
    """Decode rows of a split's table by index, as in ``global_order``; the columns of ``decode_rows``."""
    draws, indices = np.divmod(np.maximum(order, 0), len(table))
    return decode_rows(table.take(indices), order >= 0, config, epoch, train, draws) | {"row": indices}


def decode_rows(
    table: pa.Table, real: np.ndarray, config: Config, epoch: int, train: bool, draws: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Decode manifest rows. A row that fails stays, with its ``reason``.

    Args:
        table: manifest rows.
        real: bool ``[rows]``; False marks padding, which is not decoded.
        draws: int64 ``[rows]``, how often the epoch has drawn each training row before; each draw has views of its own.
            None: never.

    Returns:
        Columns: ``row`` int64, the row's number in ``table``, ``clip`` uint8 ``[rows, V, T, H, W, 3]`` (V views),
        ``shown`` ``[rows, V, 4]`` (``LoadedClips``), ``real``, ``seeds`` ``[rows, V]``, ``sample_id``, ``uri``,
        ``decoder``, ``reason`` (why the video is bad, or ""), ``fatal`` (an error that affects every video, or ""). If
        the frames of a recipe have no common size, ``clip`` is an object array of uint8 ``[V, T, H, W, 3]``.
    """
    rows, variant, views = table.to_pylist(), config.model.variant(), views_per_video(config, train)
    one_size, task = not config.detection.whole_frame, task_of(config)
    clips = np.empty(len(rows), dtype=object)
    if one_size:
        clips = np.zeros((len(rows), views, variant.frames, variant.image_size, variant.image_size, 3), np.uint8)
    shown = np.zeros((len(rows), views, 4), np.float32)
    reasons, decoders, fatal = ([""] * len(rows) for _ in range(3))
    first_views = [0] * len(rows) if draws is None else (draws * views).tolist()
    for i in np.flatnonzero(real):
        row = rows[i]
        try:
            loaded = task.load(row, config, epoch=epoch, train=train, first_view=first_views[i])
            clips[i], shown[i] = loaded.clips, loaded.shown
            decoders[i] = loaded.decoder if row["frames"] is None else "images"
        except DecodeError as error:
            reasons[i] = error.reason
        except UserError as error:  # returned as data, as Ray would wrap it in tracebacks of its own
            fatal[i] = str(error)
            break
        except Exception as error:  # one video must not cost another
            reasons[i] = f"it cannot be read ({type(error).__name__}: {error}); re-encode it, or remove it"
    seeds = [
        [sample_seed(config.train.seed, epoch, row["sample_id"], view) for view in range(first, first + views)]
        for row, first in zip(rows, first_views, strict=True)
    ]
    return {
        "sample_id": np.array([row["sample_id"] for row in rows], dtype=object),
        "uri": np.array([row["uri"] for row in rows], dtype=object),
        "row": np.arange(len(rows)),
        "real": real,
        "clip": clips,
        "shown": shown,
        "seeds": np.array(seeds),
        "reason": np.array(reasons, dtype=object),
        "decoder": np.array(decoders, dtype=object),
        "fatal": np.array(fatal, dtype=object),
    }
