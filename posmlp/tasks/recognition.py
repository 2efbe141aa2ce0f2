"""Video recognition: each video has one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from posmlp.learn.parallel import world_size
from posmlp.learn.precision import autocast
from posmlp.tasks.base import Objective, Results, Task, clip_tensors
from posmlp.video.augment import flip_labels, to_input, to_train_input
from posmlp.video.batch import Batch

if TYPE_CHECKING:
    import pyarrow as pa

    from posmlp.config import Config
    from posmlp.learn.evaluation import ClassificationMetrics
    from posmlp.video.classes import KnownClasses
    from posmlp.video.clip import LoadedClips
    from posmlp.video.manifest import Manifest, Split


class Recognition(Task):
    """Rows are videos, ``data.repeats`` clips or ``eval.clips`` x ``eval.crops`` views each."""

    def read_split(self, config: Config, split: Split, known: KnownClasses | None = None) -> Manifest:
        from posmlp.video.manifest import read_split

        return read_split(config.data, split, known)

    def training_classes(self, config: Config, manifest: Manifest | None = None) -> KnownClasses:
        from posmlp.video.manifest import training_classes

        return training_classes(config.data, manifest)

    def load(self, row: dict[str, Any], config: Config, *, epoch: int, train: bool, first_view: int = 0) -> LoadedClips:
        from posmlp.video.clip import LoadedClips, load_clips
        from posmlp.video.decode import span_of

        options: dict[str, Any] = {"images": row["frames"], "span": span_of(row), "first_view": first_view}
        options |= {"epoch": epoch, "train": train}
        clips, decoder = load_clips(row["uri"], row["sample_id"], config, **options)
        return LoadedClips(clips, np.zeros((len(clips), 4), np.float32), decoder)

    def collate(self, columns: dict[str, np.ndarray], table: pa.Table, config: Config, *, train: bool) -> Batch:
        """As of ``Task``. A video's views are adjacent; bad videos have weight 0."""
        labels = torch.from_numpy(table["label"].take(columns["row"]).to_numpy().astype(np.int64))
        views = columns["clip"].shape[1]
        return Batch(labels=labels.repeat_interleave(views), **clip_tensors(columns))

    def objective(
        self,
        config: Config,
        classes: Sequence[str],
        class_weights: NDArray[np.float64] | None,
        device: torch.device,
    ) -> Objective:
        return CrossEntropy(config, classes, class_weights, device)

    def score(self, model: nn.Module, batch: Batch, config: Config) -> Tensor:
        """As of ``score_views``."""
        return score_views(model, batch.clips, config)

    def results(self, config: Config, table: pa.Table, keep_scores: bool = False) -> Results:
        return RecognitionResults(config, len(table), keep_scores)


class CrossEntropy(Objective):
    """Softmax cross-entropy with label smoothing, on clips that are augmented and mixed.

    Of a supernet it is the mean over the paths of a step. The first path learns from the labels, the others from the
    first one's probabilities, which get no gradient from it (in-place distillation, arXiv:1903.05134). The first one
    has learned class weights and smoothing, so they are not applied to the others again.

    Args:
        classes: names for ``augment.flip_classes``; if empty, a class's name is its label.
        class_weights: ``[classes]``, factor of each class's part of the loss, with a mean of 1 over the training clips
            (``data.balance: weights``, ``posmlp.video.draws.class_weights``); None: 1.

    Raises:
        UserError: ``augment.flip_classes`` does not fit the classes.
    """

    def __init__(
        self,
        config: Config,
        classes: Sequence[str],
        class_weights: NDArray[np.float64] | None,
        device: torch.device,
    ):
        num_classes = config.model.variant().num_classes
        self.config, self.device, self.guess = config, device, math.log(num_classes)
        self.flipped = flip_labels(config.augment.flip_classes, classes, num_classes).to(device)
        self.class_weights = None if class_weights is None else torch.from_numpy(class_weights).float().to(device)
        self.heaviest = 1.0 if class_weights is None else max(1.0, float(class_weights.max()))

    def share(self, batch: Batch) -> float:
        """The clips of a worker's share. Padding and bad videos count as zero."""
        return self.config.train.global_batch / world_size()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        clips, targets = to_train_input(batch, self.config, self.flipped)
        with autocast(self.device, self.config):
            logits = model(clips).float()
        smoothing = self.config.optim.label_smoothing
        options: dict[str, Any] = {"weight": self.class_weights, "label_smoothing": smoothing}
        first, *others = logits.unbind() if logits.ndim == 3 else [logits]
        losses = F.cross_entropy(first, targets, reduction="none", **options)
        if others:
            outputs = first.detach().softmax(1)
            distilled = [F.cross_entropy(each, outputs, reduction="none") for each in others]
            losses = torch.stack([losses, *distilled]).mean(0)
        return (losses * batch.weights.to(self.device, non_blocking=True)).sum()


class RecognitionResults(Results):
    """Counts of right and wrong predictions, and the result of each video.

    Args:
        rows: of the split.
        keep_scores: keep the scores of each video, 4 bytes for each video and class.
    """

    def __init__(self, config: Config, rows: int, keep_scores: bool = False):
        from posmlp.learn.evaluation import ClassificationMetrics

        self.views, self.fusion = config.eval.clips * config.eval.crops, config.eval.fusion
        self.counts = ClassificationMetrics.empty(config.model.variant().num_classes)
        self.of_rows = torch.full((rows,), -1, dtype=torch.int8)
        classes = config.model.variant().num_classes
        self.scores = torch.full((rows, classes), -torch.inf) if keep_scores else None  # no video scores this

    def wanted(self, scores: Tensor, batch: Batch) -> Sequence[Tensor]:
        from posmlp.learn.evaluation import video_scores

        return video_scores(scores, self.fusion), batch.labels[:: self.views], batch.weights[:: self.views]

    def add(self, batch: Batch, read: Sequence[Tensor]) -> None:
        hits, rows = self.counts.add(*read), cast(Tensor, batch.rows)[:: self.views]
        scored = read[2] > 0  # padding has the number of some row
        self.of_rows[rows[scored]] = hits[scored]
        if self.scores is not None:
            self.scores[rows[scored]] = read[0][scored]

    def gather(self) -> None:
        self.counts = self.counts.sum_over_workers()
        if dist.is_initialized():
            dist.all_reduce(self.of_rows, dist.ReduceOp.MAX)
            if self.scores is not None:
                dist.all_reduce(self.scores, dist.ReduceOp.MAX)

    @property
    def samples(self) -> int:
        return self.counts.videos

    def metrics(self) -> dict[str, float]:
        return self.counts.metrics()

    def summary(self) -> ClassificationMetrics:
        return self.counts

    def predictions(self) -> NDArray[np.float32] | None:
        if self.scores is None:
            return None
        return torch.where((self.of_rows < 0)[:, None], torch.nan, self.scores).numpy()

    def hits(self) -> NDArray[np.int8]:
        return self.of_rows.numpy()


def score_views(model: nn.Module, clips: Tensor, config: Config) -> Tensor:
    """Log-probabilities of the classes for each view of each video, float32 ``[videos, views, classes]``.

    Args:
        model: in eval mode.
        clips: uint8 ``[videos * views, T, H, W, 3]`` on the model's device; the views of a video are adjacent.
        config: the recipe, for ``train.precision``, ``data.normalisation``, ``data.modality`` and the number of
            views, ``eval.clips`` x ``eval.crops``.
    """
    with torch.no_grad(), autocast(clips.device, config):
        logits = cast(Tensor, model(to_input(clips, config)))
    return logits.float().log_softmax(1).unflatten(0, (-1, config.eval.clips * config.eval.crops))
