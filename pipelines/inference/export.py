"""Export a trained model as one file that runs without this project: ``posmlp export``.

It needs neither Ray nor MLflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from pipelines.runs.models import describe_model, find_checkpoint, load_trained_model
from posmlp import storage
from posmlp.errors import UserError
from posmlp.export import Exported, check_format
from posmlp.export import export as export_model


@dataclass(frozen=True)
class ExportedFile:
    """An exported model on disk or in an object store.

    Attributes:
        path: a path or a URI.
        exported: the content, and how its logits compare with the model's.
    """

    path: str
    exported: Exported

    def __str__(self) -> str:
        """Format as one line."""
        exported = self.exported
        return (
            f"{self.path}: {len(exported.content) / 1e6:.1f} MB; loaded again, its logits differ from the model's by "
            f"at most {exported.difference:.2g} (the largest logit is {exported.largest:.2g})"
        )


def export(uri: str, out: str | None = None, *, int8: bool = False) -> ExportedFile:
    """Write a trained model as one file, once the content was loaded again and compared with the model.

    Args:
        uri: name or folder of a run (its best checkpoint is used), or folder of a checkpoint.
        out: the file, a path or a URI; its suffix is the format, ``.pt2`` or ``.onnx``. None: the run's name and .pt2.
        int8: as for ``posmlp.export.export``.

    Raises:
        UserError: there is no such run or checkpoint, the file cannot be written, the format is unknown or needs
            packages that are not installed, or the exported model computes other logits. Nothing is written then.
    """
    suffix = ".pt2" if out is None else PurePath(storage.base_name(out)).suffix
    check_format(suffix, int8)
    try:
        model, info = load_trained_model(find_checkpoint(uri))
    except OSError as error:
        raise UserError(f"{uri} cannot be read: {error}") from error
    config = info.recipe()
    out = storage.join(".", out or config.name + suffix)
    part = storage.join(storage.parent(out), f"{storage.base_name(out)}.part")
    write_file(part, b"")  # before tracing, which takes a while: fail now if the folder cannot be written
    storage.remove(part)
    exported = export_model(model, config, describe_model(info), suffix, int8=int8)
    if not exported.matches_model:
        raise UserError(
            f"{out} was not written: its logits differ from the model's by {exported.difference:.2g}, expected "
            f"{exported.tolerance * exported.largest:.2g} at most; "
            + ("try it without --int8" if int8 else "the other format may do better")
        )
    write_file(out, exported.content)
    return ExportedFile(out, exported)


def write_file(uri: str, content: bytes) -> None:
    """Write a file; it appears only when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    try:
        storage.write_bytes(uri, content)
    except OSError as error:
        raise UserError(f"{uri} cannot be written, see --out: {error}") from error
