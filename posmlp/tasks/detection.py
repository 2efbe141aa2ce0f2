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
from posmlp.metrics import VAL_BOXES, VAL_KEY_FRAMES, VAL_LOSS, VAL_MAP, VAL_MAP_OF
from posmlp.tasks.base import Objective, Results, Task, pixels
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

        manifest = read_detection_split(config.data, config.detection, split, known)
        if split != "val" or config.detection.val_every == 1:
            return manifest
        seconds = np.rint(manifest.rows["time"].to_numpy() + config.detection.first_second).astype(np.int64)
        rows = manifest.rows.filter(pa.array(seconds % config.detection.val_every == 0)).combine_chunks()
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

        clips, good = pixels(columns)
        views, rows, shown = clips.shape[1], columns["row"], np.stack(list(columns["shown"]))
        of_rows = table.select(["boxes", "actions"]).take(rows).to_pylist()
        corners, numbers, labels = [], [], []
        for i, row in enumerate(of_rows):
            given = np.array(row["boxes"], np.float32).reshape(-1, 4)
            hot = np.zeros((len(given), config.model.variant().num_classes), np.float32)
            for number, actions in enumerate(row["actions"]):
                hot[number, actions] = 1
            for view in range(views):
                moved, kept = visible_boxes(given, shown[i, view], config.detection.box_share)
                kept &= bool(good[i])
                corners.append(moved[kept])
                numbers.append(np.flatnonzero(kept))
                labels.append(hot[kept])
        counts = torch.tensor([len(each) for each in numbers])
        clip = torch.arange(len(counts)).repeat_interleave(counts)
        boxes = Boxes(
            corners=torch.from_numpy(np.concatenate(corners).astype(np.float32)),
            clip=clip,
            weights=torch.ones(len(clip)),
            number=torch.from_numpy(np.concatenate(numbers).astype(np.int64)),
            counts=counts,
        )
        return Batch(
            clips=torch.from_numpy(clips).flatten(0, 1),
            labels=torch.from_numpy(np.concatenate(labels)),
            weights=torch.from_numpy(good.astype(np.float32)).repeat_interleave(views),
            seeds=torch.from_numpy(np.stack(list(columns["seeds"])).astype(np.int64)).flatten(),
            rows=torch.from_numpy(rows.astype(np.int64)).repeat_interleave(views),
            boxes=boxes,
        )

    def objective(
        self,
        config: Config,
        classes: Sequence[str],
        class_weights: NDArray[np.float64] | None,
        device: torch.device,
    ) -> Objective:
        return BinaryCrossEntropy(config, classes, device)

    def score(self, model: nn.Module, batch: Batch, config: Config) -> Tensor:
        """Logits of the classes for each box, float32 ``[N, classes]``."""
        boxes = cast(Boxes, batch.boxes)
        with torch.no_grad(), autocast(batch.clips.device, config):
            logits = cast(Tensor, model(to_input(batch.clips, config), boxes.corners, boxes.clip))
        return logits.float()

    def by_row(self, scores: Tensor, batch: Batch) -> Sequence[Tensor]:
        """As of ``Task``: float32 ``[boxes, classes]`` for each row."""
        return scores.split(cast(Boxes, batch.boxes).counts.tolist())

    def results(self, config: Config, table: pa.Table) -> Results:
        return DetectionResults(config, table)

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
        count = cast(Boxes, batch.boxes).weights.sum().double()
        return average_over_workers(count.to(self.device)).clamp(min=1e-6).float()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        (x, mirrored, _), boxes, labels = augment_clips(batch, self.config), cast(Boxes, batch.boxes), batch.labels
        corners = boxes.corners
        if len(mirrored):
            of_clip = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill_(0, mirrored, True)
            turned = of_clip[boxes.clip].unsqueeze(1)
            left, top, right, bottom = corners.unbind(1)
            corners = torch.where(turned, torch.stack([1 - right, top, 1 - left, bottom], 1), corners)
            labels = torch.where(turned, labels[:, self.flipped], labels)
        with autocast(self.device, self.config):
            logits = model(x, corners, boxes.clip).float()
        losses = box_losses(logits, labels)
        if (gamma := self.config.detection.focal_gamma) is not None:
            losses = losses * (-torch.expm1(-losses)) ** gamma  # 1 - p of the truth, p = exp(-loss)
        return (losses.mean(1) * boxes.weights).sum()


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


class DetectionResults(Results):
    """The scores of all boxes, and the frame mAP of all workers' boxes together.

    A key frame counts with the boxes that its clip shows.

    Args:
        table: rows of the split (``posmlp.detection.lists``). Their schema's metadata has ``evaluated``, the numbers of
            the classes that the metric counts, and ``groups``, those of each group, both as JSON.
    """

    def __init__(self, config: Config, table: pa.Table):
        self.table, self.num_classes = table, config.model.variant().num_classes
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
            self.found = self.evaluate(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        if dist.is_initialized():
            found = [self.found]
            dist.broadcast_object_list(found, 0)
            self.found = found[0]

    def evaluate(
        self, rows: NDArray[np.int64], boxes: NDArray[np.int64], logits: NDArray[np.float32]
    ) -> tuple[dict[str, float], DetectionSummary]:
        """Compute the metrics of all workers' boxes."""
        from posmlp.detection.frame_map import Scored, Truth, frame_map

        of_rows = self.table.select(["boxes", "actions", "scores"]).take(boxes[:, 0]).to_pylist()
        corners, actions, scored = np.zeros((len(boxes), 4)), [], np.zeros(len(boxes), bool)
        for i, (row, number) in enumerate(zip(of_rows, boxes[:, 1].tolist(), strict=True)):
            corners[i] = row["boxes"][4 * number : 4 * number + 4]
            actions.append(row["actions"][number])
            scored[i] = not math.isnan(row["scores"][number])
        labelled = np.repeat(np.arange(len(boxes)), [len(each) for each in actions])
        action = np.array([a for each in actions for a in each], np.int64)
        metadata = self.table.schema.metadata or {}
        probabilities = torch.from_numpy(logits).sigmoid().numpy()
        result = frame_map(
            Truth(boxes[labelled, 0], corners[labelled], action),
            Scored(boxes[scored, 0], corners[scored], probabilities[scored]),
            self.num_classes,
            json.loads(metadata.get(b"evaluated", b"null")),
        )
        of_class = result.average_precision
        metrics = {VAL_MAP: result.map, VAL_KEY_FRAMES: float(len(rows)), VAL_BOXES: float(scored.sum())}
        for group, classes in json.loads(metadata.get(b"groups", b"{}")).items():
            if not math.isnan(value := result.mean_of(classes)):
                metrics[VAL_MAP_OF + group] = value
        hot = torch.zeros(len(boxes), self.num_classes)
        hot[labelled, action] = 1
        known = torch.tensor([bool(each) for each in actions])
        if known.any():
            metrics[VAL_LOSS] = float(box_losses(torch.from_numpy(logits)[known], hot[known]).double().mean())
        return metrics, DetectionSummary(of_class, np.bincount(action, minlength=self.num_classes))

    @property
    def samples(self) -> int:
        return int(self.found[0].get(VAL_KEY_FRAMES, 0))

    def metrics(self) -> dict[str, float]:
        return self.found[0]

    def summary(self) -> DetectionSummary | None:
        return self.found[1]
