"""The files of a trained model for MLflow: one folder that serves the flavours ``pytorch`` and ``python_function``.

Both flavours read the same self-contained file, as ``posmlp export`` writes it. ``mlflow.pytorch.load_model`` returns
its module, from uint8 clips (and boxes, for detection) to logits. ``mlflow.pyfunc.load_model`` and ``mlflow models
serve`` take videos, or for detection the same arrays as the module (``pipelines.registry.posmlp_pyfunc``); the code for
that travels with the model.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array, Object, Property

import posmlp
from pipelines.registry import posmlp_pyfunc
from pipelines.runs.models import describe_model, load_trained_model
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.export import export
from posmlp.video.views import format_views

# The packages that the shipped code imports. MLflow adds itself.
REQUIREMENTS = ("torch", "numpy", "av", "decord2", "pandas", "pyarrow", "pydantic", "pyyaml")
SHIPPED_SUFFIXES = (".py", ".yaml", ".typed")  # of the files of the package posmlp
TOP = 5  # classes per video, if a request does not say


def save_model_files(checkpoint: str, folder: Path) -> None:
    """Write a checkpoint's model as an MLflow model, with its evaluation weights.

    Args:
        checkpoint: the folder of a checkpoint, or of a run for its best checkpoint (else its newest).
        folder: the folder to write; it must not exist, or be empty.

    Raises:
        UserError: there is no checkpoint, it is damaged, or the exported model computes other logits.
        OSError: the folder cannot be written.
    """
    model, info = load_trained_model(checkpoint)
    config, metadata = info.recipe(), describe_model(info)
    exported = export(model, config, metadata, ".pt2")
    if not exported.matches_model:
        raise UserError(f"the exported model's logits differ from the model's by {exported.difference:.2g}")
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it tells each step of its own work
    card = Model(metadata=json.loads(json.dumps(metadata)))  # without tuples
    card.add_flavor("pytorch", model_data="data/model", pytorch_version=str(torch.__version__), code=None)
    with tempfile.TemporaryDirectory() as text, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input example was not provided")  # of detection: megabytes of pixels
        data, code = Path(text, "model"), Path(text, "code")  # MLflow copies them to data/model and code
        data.mkdir()
        (data / posmlp_pyfunc.MODEL_FILE).write_bytes(exported.content)
        (data / posmlp_pyfunc.RECIPE_FILE).write_text(recipe_to_ship(config).to_yaml())
        copy_code(code)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=Path(str(posmlp_pyfunc.__file__)).stem,
            data_path=str(data),
            code_paths=[str(path) for path in sorted(code.iterdir())],
            mlflow_model=card,
            input_example=pd.DataFrame({posmlp_pyfunc.VIDEO: ["video.mp4"]}) if config.task == "recognition" else None,
            signature=signature(config),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )


def recipe_to_ship(config: Config) -> Config:
    """The recipe as it goes with the model: without the tracking URI, which may have a password, and the cache."""
    data = config.data.model_copy(update={"cache_dir": None})
    tracking = config.tracking.model_copy(update={"uri": None})
    return config.model_copy(update={"data": data, "tracking": tracking})


def copy_code(folder: Path) -> None:
    """Copy the code that travels with a model: the package ``posmlp``, complete, and the module that MLflow loads.

    A part of the package would do. But where the project is installed too, MLflow puts this copy before it, and then
    imports of the other parts would fail.
    """
    source = Path(str(posmlp.__file__)).parent
    for path in source.rglob("*"):
        if path.suffix in SHIPPED_SUFFIXES:
            target = folder / source.name / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copy(str(posmlp_pyfunc.__file__), folder)


def signature(config: Config) -> ModelSignature:
    """Inputs, output and parameters of the ``python_function`` flavour."""
    variant = config.model.variant()
    classes = variant.num_classes
    if config.task == "detection":
        clips = (-1, variant.frames, variant.image_size, variant.image_size, 3)
        arrays = ("clips", np.uint8, clips), ("boxes", np.float32, (-1, 4)), ("box_clip", np.int64, (-1,))
        inputs = Schema([TensorSpec(np.dtype(kind), shape, name) for name, kind, shape in arrays])
        return ModelSignature(inputs, Schema([TensorSpec(np.dtype(np.float32), (-1, classes))]))
    ranked = Array(Object([Property("class", DataType.string), Property("probability", DataType.double)]))
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, posmlp_pyfunc.VIDEO)]),
        outputs=Schema([ColSpec(ranked, "top")]),
        params=ParamSchema(
            [
                ParamSpec("top", DataType.long, min(TOP, classes)),
                ParamSpec("views", DataType.string, format_views(config)),
            ]
        ),
    )
