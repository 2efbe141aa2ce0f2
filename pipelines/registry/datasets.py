"""The lists of videos as MLflow's data sets: name, source, digest, schema, and the number of videos of each class."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.types import ColSpec, DataType, Schema
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from posmlp import storage
from posmlp.config import DataSection
from posmlp.metrics import VAL
from posmlp.video.manifest import Manifest

COLUMNS = {"sample_id": DataType.string, "uri": DataType.string, "label": DataType.integer}  # of a list's rows
TRAINING, VALIDATION = "training", "validation"  # contexts


def describe_list(path: str, manifest: Manifest, fingerprint: str, context: str) -> dict[str, str]:
    """Describe a list of videos as plain data, from which ``as_dataset_input`` makes MLflow's entity.

    Args:
        path: the list, a path or a URI; of several lists the first.
        fingerprint: of the list (``pipelines.training.preflight.list_fingerprint``).
        context: what a run uses it for, such as ``TRAINING``.
    """
    uri = storage.join(".", path)
    with warnings.catch_warnings(action="ignore"):  # two of its classes take a local path, which makes no difference
        source = resolve_dataset_source(uri)
    schema = Schema([ColSpec(kind, name) for name, kind in COLUMNS.items()])
    return {
        "name": list_name(uri),
        "digest": list_digest(fingerprint),
        "source_type": source._get_source_type(),
        "source": source.to_json(),
        "schema": json.dumps({"mlflow_colspec": schema.to_dict()}),
        "profile": json.dumps({"num_rows": len(manifest.rows), "videos_by_class": class_counts(manifest)}),
        "context": context,
    }


def describe_splits(
    data: DataSection, train_set: Manifest, val_set: Manifest, fingerprints: Mapping[str, str]
) -> list[dict[str, str]]:
    """Describe the lists that a run trains on and validates on, in this order.

    Args:
        fingerprints: of the lists ``train`` and ``val``.
    """
    return [
        describe_list(data.list_of("train"), train_set, fingerprints["train"], TRAINING),
        describe_list(data.list_of("val"), val_set, fingerprints["val"], VALIDATION),
    ]


def datasets_of_metrics(described: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Name and digest of the data set of a run's metrics, by the prefix of their names.

    Args:
        described: as from ``describe_splits``.
    """
    prefixes = {TRAINING: "train/", VALIDATION: VAL}
    return {prefixes[each["context"]]: [each["name"], each["digest"]] for each in described}


def list_name(path: str) -> str:
    """The name of a list: the last two parts of its path, as in ``motion/train.csv``."""
    return "/".join(storage.without_password(path).rstrip("/").split("/")[-2:])


def list_digest(fingerprint: str) -> str:
    """The digest in a list's fingerprint, which is ``N videos, DIGEST``."""
    return fingerprint.rpartition(" ")[2]


def class_counts(manifest: Manifest) -> dict[str, int]:
    """The number of videos of each class, or of boxes with each action, by its name."""
    if "actions" in manifest.rows.column_names:
        actions = manifest.rows["actions"].combine_chunks().flatten().flatten()
        labels = actions.to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        labels = manifest.rows["label"].to_numpy()
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.classes)).tolist()
    names: Sequence[str] = [*manifest.classes, *map(str, range(len(manifest.classes), len(counts)))]
    return dict(zip(names, counts, strict=True))


def as_dataset_input(described: Mapping[str, Any]) -> DatasetInput:
    """MLflow's entity of a list that ``describe_list`` described."""
    fields = {key: value for key, value in described.items() if key != "context"}
    return DatasetInput(Dataset(**fields), [InputTag(MLFLOW_DATASET_CONTEXT, described["context"])])
