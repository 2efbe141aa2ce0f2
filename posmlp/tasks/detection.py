"""Action detection: each box of a key frame has any number of classes at once."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from posmlp.learn.parallel import average_over_workers
from posmlp.learn.precision import autocast
from posmlp.metrics import VAL_BOXES, VAL_KEY_FRAMES, VAL_LOSS, VAL_MAP, VAL_MAP_OF, VAL_MAP_SLOWFAST
from posmlp.tasks.base import Objective, Results, Task, clip_tensors
from posmlp.video.augment import augment_clips, flip_labels, to_input
from posmlp.video.batch import Batch, Boxes

if TYPE_CHECKING:
    import pyarrow as pa

    from posmlp.config import Config
    from posmlp.video.classes import KnownClasses
    from posmlp.video.clip import LoadedClips
    from posmlp.video.manifest import Manifest, Split


class Detection(Task):
    """Rows are key frames of videos with their boxes (``posmlp.detection.lists``)."""

    def read_split(self, config: Config, split: Split, known: KnownClasses | None = None) -> Manifest:
        """As of ``Task``. Of the validation split, the key frames of ``detection.val_every``."""
        from dataclasses import replace

        import pyarrow as pa

        from posmlp.detection.lists import read_detection_split
        from posmlp.detection.segments import refuse_longer_clips
        from posmlp.video.manifest import ManifestError

        manifest = read_detection_split(config.data, config.detection, split, known)
        refuse_longer_clips(manifest.rows, getattr(config.data, split).path, config)
        if split != "val" or config.detection.val_every == 1:
            return manifest
        seconds = np.array([int(each.rpartition(",")[2]) for each in manifest.rows["sample_id"].to_pylist()])
        rows = manifest.rows.filter(pa.array(seconds % config.detection.val_every == 0)).combine_chunks()
        if not len(rows):
            every, path = config.detection.val_every, config.data.list_of(split)
            raise ManifestError([f"{path}: no second is divisible by {every}; set detection.val_every to 1"])
        return replace(manifest, rows=rows)

    def training_classes(self, config: Config, manifest: Manifest | None = None) -> KnownClasses:
        from posmlp.video.classes import KnownClasses

        names = (manifest or self.read_split(config, "train")).classes
        return KnownClasses(names, f"the label map {config.data.classes}", "use one label map for all lists")

    def needs_frame_times(self, config: Config) -> bool:
        """As of ``Task``: the frame rate places the key frames of a folder."""
        return False

    def load(self, row: dict[str, Any], config: Config, *, epoch: int, train: bool, first_view: int = 0) -> LoadedClips:
        from posmlp.detection.clips import load_key_clip

        options: dict[str, Any] = {"epoch": epoch, "train": train, "images": row["frames"], "first_view": first_view}
        return load_key_clip(row["uri"], row["sample_id"], row["time"], config, **options)

    def collate(self, columns: dict[str, np.ndarray], table: pa.Table, config: Config, *, train: bool) -> Batch:
        """As of ``Task``. A clip has the boxes of its key frame of which it shows ``detection.box_share``."""
        from posmlp.detection.clips import visible_boxes

        good, shown = (columns["reason"] == "") & columns["real"], np.stack(list(columns["shown"]))
        of_rows = table.select(["boxes", "actions"]).take(columns["row"]).to_pylist()
        corners, numbers, labels = [], [], []
        for i, row in enumerate(of_rows):
            given = np.array(row["boxes"], np.float32).reshape(-1, 4)
            hot = np.zeros((len(given), config.model.variant().num_classes), np.float32)
            for number, actions in enumerate(row["actions"]):
                hot[number, actions] = 1
            for part in shown[i]:
                moved, kept = given, np.zeros(len(given), bool)  # a row that was not decoded has no boxes
                if good[i]:
                    moved, kept = visible_boxes(given, part, config.detection.box_share)
                corners.append(moved[kept])
                numbers.append(np.flatnonzero(kept))
                labels.append(hot[kept])
        counts = torch.tensor([len(each) for each in numbers])
        clip = torch.arange(len(counts)).repeat_interleave(counts)
        boxes = Boxes(
            corners=torch.from_numpy(np.concatenate(corners).astype(np.float32)),
            clip=clip,
            number=torch.from_numpy(np.concatenate(numbers).astype(np.int64)),
            counts=counts,
        )
        return Batch(labels=torch.from_numpy(np.concatenate(labels)), boxes=boxes, **clip_tensors(columns))

    def objective(
        self,
        config: Config,
        classes: Sequence[str],
        class_weights: NDArray[np.float64] | None,
        device: torch.device,
    ) -> Objective:
        return BinaryCrossEntropy(config, classes, device)

    def score(self, model: nn.Module, batch: Batch, config: Config) -> Tensor:
        """As of ``score_boxes``."""
        boxes = cast(Boxes, batch.boxes)
        return score_boxes(model, batch.clips, boxes.corners, boxes.clip, config)

    def by_row(self, scores: Tensor, batch: Batch) -> Sequence[Tensor]:
        """As of ``Task``: float32 ``[boxes, classes]`` for each row."""
        return scores.split(cast(Boxes, batch.boxes).counts.tolist())

    def results(self, config: Config, table: pa.Table, keep_scores: bool = False) -> Results:
        return DetectionResults(table)

    def for_evaluation(self, config: Config) -> Config:
        """All key frames, and whole frames in place of their centre squares."""
        section = config.detection.model_copy(update={"whole_frame": True, "val_every": 1})
        return config.model_copy(update={"detection": section})


class BinaryCrossEntropy(Objective):
    """Sigmoid cross-entropy in fp32, the mean over boxes and classes; with ``detection.focal_gamma`` focal loss.

    Args:
        classes: names for ``augment.flip_classes``.

    Raises:
        UserError: ``augment.flip_classes`` does not fit the classes.
    """

    guess = math.log(2)

    def __init__(self, config: Config, classes: Sequence[str], device: torch.device):
        self.config, self.device = config, device
        num_classes = config.model.variant().num_classes
        self.flipped = flip_labels(config.augment.flip_classes, classes, num_classes).to(device)

    def share(self, batch: Batch) -> Tensor:
        """The mean number of boxes of a worker."""
        count = torch.full((), len(batch.labels), dtype=torch.float64, device=self.device)
        return average_over_workers(count).clamp(min=1e-6).float()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        boxes = cast(Boxes, batch.boxes)
        x, corners, labels = augment_boxes(batch, self.config, self.flipped)
        with autocast(self.device, self.config):
            logits = model(x, corners, boxes.clip).float()
        losses = box_losses(logits, labels)
        if (gamma := self.config.detection.focal_gamma) is not None:
            losses = losses * (-torch.expm1(-losses)) ** gamma  # 1 - p of the truth, p = exp(-loss)
        return losses.mean(1).sum()


def score_boxes(model: nn.Module, clips: Tensor, corners: Tensor, clip: Tensor, config: Config) -> Tensor:
    """Logits of the classes for each box, float32 ``[N, classes]``.

    Args:
        model: in eval mode.
        clips: uint8 ``[B, T, H, W, 3]``, like the boxes on the model's device.
        corners, clip: as of ``Boxes``.
        config: the recipe, for ``train.precision``, ``data.normalisation`` and ``data.modality``.
    """
    with torch.no_grad(), autocast(clips.device, config):
        logits = cast(Tensor, model(to_input(clips, config), corners, clip))
    return logits.float()


def augment_boxes(batch: Batch, config: Config, flipped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Augment the clips of a batch (``augment_clips``), and mirror the boxes of those that are flipped.

    Args:
        flipped: int64 ``[classes]``, the class of each class after a flip (``flip_labels``).

    Returns:
        Model input float32 ``[B, 3, T, H, W]``, corners float32 ``[N, 4]``, and labels float32 ``[N, classes]``.
    """
    (x, mirrored, _), boxes, labels = augment_clips(batch, config), cast(Boxes, batch.boxes), batch.labels
    corners = boxes.corners
    if len(mirrored):
        of_clip = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, mirrored, True)
        turned = of_clip[boxes.clip].unsqueeze(1)
        left, top, right, bottom = corners.unbind(1)
        corners = torch.where(turned, torch.stack([1 - right, top, 1 - left, bottom], 1), corners)
        labels = torch.where(turned, labels[:, flipped], labels)
    return x, corners, labels


def box_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross-entropy of each box and class, float32 ``[N, classes]``."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


@dataclass(frozen=True)
class DetectionSummary:
    """The result of a validation by class.

    Attributes:
        average_precision: float64 ``[classes]``, 0 to 1; NaN without ground truth, or where a class is not counted.
        boxes: int64 ``[classes]``, number of ground-truth boxes of each class.
    """

    average_precision: NDArray[np.float64]
    boxes: NDArray[np.int64]

    def csv(self, classes: Sequence[str]) -> bytes:
        """The content of ``per_class.csv``: one class per line, by label."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["label", "class", "boxes", "average_precision"])
        for label, (name, boxes, value) in enumerate(zip(classes, self.boxes, self.average_precision, strict=True)):
            writer.writerow([label, name, boxes, "" if math.isnan(value) else value])
        return text.getvalue().encode()

    def best_and_worst(self, classes: Sequence[str], count: int = 3) -> tuple[list[str], list[str]]:
        """The classes with the highest and those with the lowest average precision, each with both figures."""
        known = [i for i in np.argsort(-self.average_precision, kind="stable") if self.average_precision[i] >= 0]
        texts = [f"{classes[i]} {self.average_precision[i]:.0%} of {self.boxes[i]}" for i in known]
        best = min(count, (len(known) + 1) // 2)
        return texts[:best], texts[best:][::-1][:count]


@dataclass(frozen=True)
class ListedBoxes:
    """The N boxes of a table of key frames (``posmlp.detection.lists``), in the order of its rows.

    Attributes:
        first: int64 ``[rows + 1]``, the number of boxes before each row, and of all.
        corners: float32 ``[N, 4]``, x1 y1 x2 y2 as fractions of the frame.
        scores: float32 ``[N]``, NaN for a box that is only compared with.
        box, action: int64 ``[M]``, each action of each box: the box, and the class.
    """

    first: NDArray[np.int64]
    corners: NDArray[np.float32]
    scores: NDArray[np.float32]
    box: NDArray[np.int64]
    action: NDArray[np.int64]

    @classmethod
    def of_table(cls, table: pa.Table) -> ListedBoxes:
        """The boxes of all rows."""
        from pyarrow import compute

        boxes, scores, actions = (table[name].combine_chunks() for name in ("boxes", "scores", "actions"))
        of_boxes = actions.flatten()  # a list of classes for each box
        counts, classes = (compute.list_value_length(lists).to_numpy().astype(np.int64) for lists in (scores, of_boxes))
        return cls(
            np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            boxes.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4),
            scores.flatten().to_numpy(zero_copy_only=False),
            np.repeat(np.arange(len(classes)), classes),
            of_boxes.flatten().to_numpy(zero_copy_only=False).astype(np.int64),
        )

    @property
    def row(self) -> NDArray[np.int64]:
        """int64 ``[N]``, the row of each box."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))


def measure(
    table: pa.Table,
    listed: ListedBoxes,
    boxes: NDArray[np.int64],
    logits: NDArray[np.float32],
    *,
    slowfast: bool = False,
) -> tuple[dict[str, float], DetectionSummary]:
    """Compute the metrics of scored boxes.

    Args:
        table: rows of a split. Their schema's metadata has ``evaluated``, the numbers of the classes that the metric
            counts, and ``groups``, those of each group, both as JSON.
        listed: the boxes of ``table``.
        boxes: int64 ``[N]``, the scored ones, as numbers in ``listed``, each once. Truth that is not among them does
            not count.
        logits: float32 ``[N, classes]``.
        slowfast: compute frame mAP by SlowFast's rule too.

    Returns:
        The ``val/*`` metrics but the number of key frames, and the figures of the classes.
    """
    from posmlp.detection.frame_map import Scored, Truth, frame_map

    num_classes, metadata = logits.shape[1], table.schema.metadata or {}
    place = np.full(len(listed.corners), -1)  # of a listed box among the scored ones
    place[boxes] = np.arange(len(boxes))
    used = place[listed.box] >= 0
    box, action = listed.box[used], listed.action[used]
    row, compared = listed.row, ~np.isnan(listed.scores[boxes])
    truth = Truth(row[box], listed.corners[box], action)
    probabilities = torch.from_numpy(logits).sigmoid().numpy()
    scored = Scored(row[boxes[compared]], listed.corners[boxes[compared]], probabilities[compared])
    evaluated = evaluated_classes(table)
    result = frame_map(truth, scored, num_classes, evaluated)
    metrics = {VAL_MAP: result.map, VAL_BOXES: float(compared.sum())}
    for group, classes in json.loads(metadata.get(b"groups", b"{}")).items():
        if not math.isnan(value := result.mean_of(classes)):
            metrics[VAL_MAP_OF + group] = value
    if slowfast:
        metrics[VAL_MAP_SLOWFAST] = frame_map(truth, scored, num_classes, evaluated, most=None, by_score=False).map
    losses = known_losses(listed, boxes, logits)
    if not np.isnan(losses).all():
        metrics[VAL_LOSS] = float(np.nanmean(losses, dtype=np.float64))
    return metrics, DetectionSummary(result.average_precision, np.bincount(action, minlength=num_classes))


def evaluated_classes(table: pa.Table) -> list[int] | None:
    """The classes that the metric of a split counts, as of ``measure``; None: all."""
    found: list[int] | None = json.loads((table.schema.metadata or {}).get(b"evaluated", b"null"))
    return found


def known_losses(listed: ListedBoxes, boxes: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The loss of each scored box, the mean over classes: float32 ``[N]``; NaN for a box without a known action.

    Args:
        boxes, logits: as of ``measure``.
    """
    hot = torch.zeros(len(listed.corners), logits.shape[1])
    hot[listed.box, listed.action] = 1
    losses = box_losses(torch.from_numpy(logits), hot[boxes]).mean(1)
    losses[~hot[boxes].any(1)] = math.nan
    return losses.numpy()


class DetectionResults(Results):
    """The scores of all boxes, and the frame mAP of all workers' boxes together.

    A key frame counts with the boxes that its clip shows.

    Args:
        table: rows of the split, as of ``measure``.
    """

    def __init__(self, table: pa.Table):
        self.table = table
        self.rows: list[NDArray[np.int64]] = []  # that were scored
        self.boxes: list[NDArray[np.int64]] = []  # [N, 2], row and number
        self.logits: list[NDArray[np.float32]] = []
        self.found: tuple[dict[str, float], DetectionSummary | None] = {}, None

    def wanted(self, scores: Tensor, batch: Batch) -> Sequence[Tensor]:
        return scores, batch.weights

    def add(self, batch: Batch, read: Sequence[Tensor]) -> None:
        boxes, rows = cast(Boxes, batch.boxes), cast(Tensor, batch.rows)
        self.rows.append(rows[read[1] > 0].numpy())
        of_boxes = rows.repeat_interleave(boxes.counts)
        self.boxes.append(torch.stack([of_boxes, boxes.number], 1).numpy())
        self.logits.append(read[0].numpy().copy())

    def gather(self) -> None:
        own = tuple(np.concatenate(part) for part in (self.rows, self.boxes, self.logits))
        parts, first = [own], True
        if dist.is_initialized():
            first = dist.get_rank() == 0
            parts = [own] * dist.get_world_size()
            dist.gather_object(own, parts if first else None, dst=0)
        if first:
            rows, boxes, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
            listed = ListedBoxes.of_table(self.table)
            metrics, summary = measure(self.table, listed, listed.first[boxes[:, 0]] + boxes[:, 1], logits)
            self.found = metrics | {VAL_KEY_FRAMES: float(len(rows))}, summary
        if dist.is_initialized():
            found = [self.found]
            dist.broadcast_object_list(found, 0)
            self.found = found[0]

    @property
    def samples(self) -> int:
        return int(self.found[0].get(VAL_KEY_FRAMES, 0))

    def metrics(self) -> dict[str, float]:
        return self.found[0]

    def summary(self) -> DetectionSummary | None:
        return self.found[1]
