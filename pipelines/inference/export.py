"""A trained model as one file that runs without this project: ``posmlp export``. Without Ray and MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from pipelines.runs.checkpoints import CheckpointInfo
from pipelines.runs.models import class_names, find_checkpoint, trained_model
from posmlp import storage
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.export import Exported, check_format
from posmlp.export import export as export_model
from posmlp.video.augment import MEAN, STD


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Attributes:
        path: where, a path or a URI.
        exported: its content, and how it compares with the model.
    """

    path: str
    exported: Exported

    def __str__(self) -> str:
        """One line."""
        found = self.exported
        return (
            f"{self.path}: {len(found.content) / 1e6:.1f} MB; loaded anew, its logits differ from the model's by "
            f"{found.difference:.2g} at most (the largest is {found.largest:.2g})"
        )


def export(uri: str, out: str | None = None, *, int8: bool = False) -> Written:
    """Write a trained model as one file, after the file's content was loaded anew and compared with the model.

    Args:
        uri: a run's name or folder, which stands for its best checkpoint, or a checkpoint's folder.
        out: the file, a path or a URI; its suffix says what it is, ``.pt2`` or ``.onnx``. None: the run's name, .pt2.
        int8: as of ``posmlp.export.export``.

    Raises:
        UserError: there is no such run or checkpoint, the file cannot be written, the format is unknown or needs
            packages that are not installed, or what was made computes something else; then nothing is written.
    """
    suffix = ".pt2" if out is None else PurePath(out).suffix
    check_format(suffix, int8)
    try:
        model, about = trained_model(find_checkpoint(uri))
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    config = about.recipe()
    out = storage.join(".", out or config.name + suffix)
    write(out + ".part", b"")  # tracing takes a while: a place that cannot be written is told before
    storage.remove(out + ".part")
    exported = export_model(model, config, description(about, config), suffix, int8=int8)
    if not exported.good:
        raise UserError(
            f"{out} was not written: its logits differ from the model's by {exported.difference:.2g}, expected "
            f"{exported.tolerance * exported.largest:.2g} at most; "
            + ("try it without --int8" if int8 else "the other format may do better")
        )
    write(out, exported.content)
    return Written(out, exported)


def write(uri: str, content: bytes) -> None:
    """Write a file that appears only when complete.

    Raises:
        UserError: it cannot be written.
    """
    try:
        storage.write_bytes(uri, content)
    except OSError as error:
        raise UserError(f"{uri} cannot be written, see --out: {error}") from error


def description(about: CheckpointInfo, config: Config) -> dict[str, Any]:
    """What a user of the file must know, as plain data."""
    variant, data = config.model.variant(), config.data
    return {
        "run": config.name,
        "step": about.step,
        "metrics": dict(about.metrics),
        "classes": class_names(about.classes, variant.num_classes),
        "input": {
            "name": "clips",
            "axes": "B T H W C",
            "shape": [None, variant.frames, variant.image_size, variant.image_size, 3],
            "type": "uint8, RGB",
        },
        "output": {"name": "logits", "shape": [None, variant.num_classes], "type": "float32, before softmax"},
        "done_inside": {"mean": MEAN, "std": STD, "modality": data.modality},
        "sampling": {
            "frames": data.sampling,
            "stride": data.stride if data.sampling == "dense" else None,
            "fps": data.fps,
            "frame_order": data.frame_order,
            "short_side": data.short_side or -(-variant.image_size * 8 // 7),
            "square": "whole frame, squeezed" if data.full_frame else "centre",
        },
    }
