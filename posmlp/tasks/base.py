"""The interface of a task: all that trainer, loader and evaluation know of it.

This package imports pydantic, pyarrow and the decoders only where a function needs them: a training step needs neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, device, nn

from posmlp.video.batch import Batch

if TYPE_CHECKING:
    import pyarrow as pa

    from posmlp.config import Config
    from posmlp.video.classes import KnownClasses
    from posmlp.video.clip import LoadedClips
    from posmlp.video.manifest import Manifest, Split


class Objective(ABC):
    """The loss of training steps.

    Attributes:
        guess: the loss of a model that knows nothing.
        heaviest: largest factor of a part of the loss.
    """

    guess: float
    heaviest: float = 1.0

    @abstractmethod
    def share(self, batch: Batch) -> Tensor | float:
        """What a worker divides the sum of its losses by, so that the mean over workers is that of the global batch.

        Collective: call it on every rank.
        """

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of a micro-batch, augmented; a scalar."""


class Results(ABC):
    """What a validation has found, on one worker, then on all.

    Attributes:
        table: rows of the split.
    """

    @abstractmethod
    def wanted(self, scores: Tensor, batch: Batch) -> Sequence[Tensor]:
        """What ``add`` needs of a scored batch, on its device.

        Args:
            scores: as of ``Task.score``.
        """

    @abstractmethod
    def add(self, batch: Batch, read: Sequence[Tensor]) -> None:
        """Count a batch.

        Args:
            read: the tensors of ``wanted``, on the CPU.
        """

    @abstractmethod
    def gather(self) -> None:
        """Combine the results of all workers. Collective: call it on every rank."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of rows that were scored."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The ``val/*`` metrics (``posmlp.metrics``), after ``gather``; the same on all workers."""

    @abstractmethod
    def summary(self) -> Any:
        """What the driver needs for tables and pictures, after ``gather``."""

    def predictions(self) -> NDArray[np.float32] | None:
        """Log-probabilities of each row, ``[rows, classes]``, after ``gather``; NaN: not scored. None: not kept."""
        return None

    def hits(self) -> NDArray[np.int8] | None:
        """Of each row of the split: 1 a hit, 0 a miss, -1 not scored. None if the task knows no such thing."""
        return None


class Task(ABC):
    """What differs between tasks: rows, clips, batches, loss, scores and metrics."""

    @abstractmethod
    def read_split(self, config: Config, split: Split, known: KnownClasses | None = None) -> Manifest:
        """Read and check a split of the recipe's data set.

        Args:
            known: the classes that the labels refer to; None: the list defines them.

        Raises:
            ManifestError: lists all problems.
        """

    @abstractmethod
    def training_classes(self, config: Config, manifest: Manifest | None = None) -> KnownClasses:
        """The classes of the training list, which those of the other lists refer to.

        Args:
            manifest: the training split, if it is read already.
        """

    def needs_frame_times(self, config: Config) -> bool:
        """Whether frame folders, which have no times, cannot be read."""
        return config.data.fps is not None

    @abstractmethod
    def load(self, row: dict[str, Any], config: Config, *, epoch: int, train: bool, first_view: int = 0) -> LoadedClips:
        """Decode the views of a row of ``read_split``.

        Raises:
            DecodeError: its video cannot be read.
        """

    @abstractmethod
    def collate(self, columns: dict[str, np.ndarray], table: pa.Table, config: Config, *, train: bool) -> Batch:
        """Make a batch of decoded rows.

        Args:
            columns: as of ``pipelines.data.loader.decode_rows``, for the loader's or one size of clips.
            table: the rows that ``columns["row"]`` counts.
        """

    @abstractmethod
    def objective(
        self,
        config: Config,
        classes: Sequence[str],
        class_weights: NDArray[np.float64] | None,
        device: device,
    ) -> Objective:
        """The loss on a device.

        Raises:
            UserError: the recipe does not fit the classes.
        """

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch, config: Config) -> Tensor:
        """Log-probabilities of the classes for all that is to be classified in a batch, float32 ``[..., classes]``.

        Args:
            model: in eval mode.
        """

    def by_row(self, scores: Tensor, batch: Batch) -> Sequence[Tensor]:
        """The scores of each row of a batch of ``collate`` without ``train``."""
        return scores.unbind()

    @abstractmethod
    def results(self, config: Config, table: pa.Table, keep_scores: bool = False) -> Results:
        """Results of no batch yet.

        Args:
            table: the rows of the split.
            keep_scores: for ``Results.predictions``; only recognition has them.
        """

    def for_evaluation(self, config: Config) -> Config:
        """The recipe with which a trained model is tested, where it differs from validation after an epoch."""
        return config


def clip_tensors(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a batch of any task has of decoded rows, by its name in ``Batch``. The views of a row are adjacent."""
    clips, good = pixels(columns)
    views = clips.shape[1]
    return {
        "clips": torch.from_numpy(clips).flatten(0, 1),
        "weights": torch.from_numpy(good.astype(np.float32)).repeat_interleave(views),
        "seeds": torch.from_numpy(np.stack(list(columns["seeds"])).astype(np.int64)).flatten(),
        "rows": torch.from_numpy(columns["row"].astype(np.int64)).repeat_interleave(views),
    }


def pixels(columns: dict[str, np.ndarray]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The clips of decoded rows, uint8 ``[rows, V, T, H, W, 3]``, and which rows count, bool ``[rows]``.

    Batch norm sees every clip of a batch, so a row that does not count gets the pixels of one that does.
    """
    good = (columns["reason"] == "") & columns["real"]
    clips = columns["clip"]
    if not good.all() and good.any():
        clips = clips[np.where(good, np.arange(len(good)), np.flatnonzero(good)[0])]
    return clips if clips.flags.writeable else clips.copy(), good
