"""Import a model that other code has trained: ``posmlp import``. It needs neither Ray nor MLflow.

The result is the folder of a run with one checkpoint, in this project's form: what evaluates, predicts, exports or
fine-tunes takes it as any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import CheckpointInfo
from pipelines.runs.record import RUN_FILE, check_writable, run_folder, write_record
from pipelines.tracking.uris import recipe_without_password
from posmlp import create_model, load_published, storage
from posmlp.config import Config
from posmlp.errors import UserError
from posmlp.model.checkpoint import MAX_LISTED, LoadReport
from posmlp.model.cost import count_params
from posmlp.video.manifest import read_class_names


@dataclass(frozen=True)
class ImportedModel:
    """A model of other code, as a run.

    Attributes:
        run: the run's folder, a path or a URI.
        file: the file of weights.
        report: what was loaded from it.
        config: the run's recipe.
        named_by: the file or list with the names of the classes; empty if they are numbers.
        params: number of parameters.
    """

    run: str
    file: str
    report: LoadReport
    config: Config
    named_by: str
    params: int

    def __str__(self) -> str:
        """Format as a table."""
        config, report = self.config, self.report
        told = "as the file's" if report.normalisation else "the recipe's; the file does not tell"
        names = f"names of {self.named_by}" if self.named_by else "numbers, in the order of the file's outputs"
        rows = [
            ("model", f"{config.model.name}, {self.params / 1e6:.2f} M parameters"),
            ("weights", f"{report.loaded} tensors of {storage.without_password(self.file)}"),
            *([("", report.choice)] if report.choice else []),
            ("classes", f"{config.model.num_classes}, {names}"),
            ("normalisation", f"{config.data.normalisation}, {told}"),
            ("run", self.run),
        ]
        lines = [f"  {name:<15}{value}" for name, value in rows]
        return "\n".join([*lines, "", f"  posmlp evaluate {self.run} tests it"])


def import_model(file: str, config: Config, out: str | None = None) -> ImportedModel:
    """Write the folder of a run whose only checkpoint, at step 0, has the weights of a file.

    The model must be the one that the recipe describes: nothing is adapted. The label of a class is the number of the
    model's output. Its name is that in ``data.classes``, otherwise that in the training list if there is one, otherwise
    the number.

    Args:
        file: a file that ``posmlp.load_published`` reads, a path or a URI.
        config: the recipe that the model is tested with.
        out: the folder; None: ``train.storage/name``.

    Raises:
        UserError: the recipe is for another task, the file cannot be read or holds another model, its
            ``data.normalisation`` or number of classes differs from the recipe's, the classes cannot be read, or the
            folder exists or cannot be written. Nothing is written then.
    """
    if config.task != "recognition":
        raise UserError(
            f"task {config.task}: an import is of a model for recognition, whose outputs are classes; a run of another "
            f"task starts from the file with model.weights={storage.without_password(file)}"
        )
    run = storage.join(".", out) if out else run_folder(config)
    if storage.are_files([storage.join(run, RUN_FILE)])[0] or storage.list_folders(
        storage.join(run, checkpoints.FOLDER)
    ):
        raise UserError(f"{run} exists already; choose another name (name=...) or folder (--out), or delete it")
    check_task(file)
    names, named_by = read_class_names(config.data)
    outputs = config.model.num_classes or len(names)
    if not outputs:
        raise UserError(
            f"model.num_classes is null, and neither data.classes nor a training list ({config.data.train.path}) tells "
            "the classes; give one of them"
        )
    if names and len(names) != outputs:
        raise UserError(
            f"model.num_classes is {outputs}, but {named_by} has {len(names)} classes; the model has one output for "
            "each class, in their order"
        )
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_classes": outputs})})
    model = create_model(config.model.name, **config.model.overrides())
    try:
        report = load_published(model, file)
    except FileNotFoundError as error:
        raise UserError(f"no file {storage.without_password(file)}; expected a file of weights") from error
    check_report(report, config, file)
    section = config.model.model_copy(update={"weights": file if storage.is_remote(file) else storage.local_path(file)})
    config = recipe_without_password(config.model_copy(update={"model": section}).resolved())
    classes = names or tuple(map(str, range(outputs)))
    check_writable(run)
    info = CheckpointInfo(0, 0, {}, list(classes), config.model_dump(mode="json"))
    checkpoints.save(run, info, model.state_dict(), {})
    write_record(run, config, {}, None, {})
    return ImportedModel(run, file, report, config, named_by, count_params(model))


def check_task(file: str) -> None:
    """Check that a file is not the weights of a run of another task.

    Raises:
        UserError: the checkpoint that it is part of says so.
    """
    try:
        info = checkpoints.read_info(storage.parent(file))
    except (OSError, checkpoints.DamagedError):
        return  # most files are no part of a checkpoint
    if (task := info.recipe().task) != "recognition":
        raise UserError(
            f"{storage.without_password(file)} is of a run for {task}, and an import is of a model for recognition; "
            "evaluate, predict and export take that run itself, and another run starts from it with model.weights"
        )


def check_report(report: LoadReport, config: Config, file: str) -> None:
    """Check that a file holds the recipe's model, trained on the recipe's pixels.

    Raises:
        UserError: it does not.
    """
    name, own = storage.without_password(file), config.data.normalisation
    if report.adapted:
        more = len(report.adapted) - MAX_LISTED
        changes = [*report.adapted[:MAX_LISTED], *([f"and {more} more"] if more > 0 else [])]
        raise UserError(
            "\n  ".join([f"{name} is not the recipe's model as it is; it would be changed:", *changes])
            + "\ngive the file's own values (model.num_classes, model.frames, model.windows, ...), or train with "
            f"model.weights={name}, which adapts the weights"
        )
    if report.normalisation not in (None, own):
        raise UserError(
            f"data.normalisation is {own}, but the model of {name} was trained with {report.normalisation}; set "
            f"data.normalisation={report.normalisation}"
        )
