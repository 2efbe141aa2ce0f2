"""A finished run that was never trained, for what evaluates runs."""

import csv

from mlflow import MlflowClient

from pipelines.runs.record import write_record
from pipelines.tracking.mlflow_client import create_run
from pipelines.tracking.uris import tracking_uri
from tests.helpers.random_models import write_checkpoint
from tests.helpers.small_runs import recipe_for

CLASSES = ["down", "left", "right", "up", "zoom in", "zoom out", "turn", "absent"]


def write_untrained_run(folder, motion_set):
    """Write a run with a checkpoint of a random model. Its val split has a broken video, and none of the last class.

    Returns:
        A dict: "run" (its folder), "checkpoint" (its folder), "config", "model", and "broken" (the video).
    """
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for name in ("train", "val"):
        with open(motion_set / f"{name}.csv") as file:
            rows = [row for row in csv.DictReader(file) if int(row["label"]) != 7]
        lines = ["path,label", *(f"{motion_set / row['path']},{row['label']}" for row in rows)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    broken = folder / "broken.mp4"
    broken.write_bytes((motion_set / rows[0]["path"]).read_bytes()[:200])
    (folder / "val.csv").write_text(
        (folder / "val.csv").read_text().replace(str(motion_set / rows[0]["path"]), str(broken))
    )
    config = recipe_for(
        folder / "runs",
        motion_set,
        f"data.train.path={folder}/train.csv",
        f"data.val.path={folder}/val.csv",
        *(f"data.{split}.root=/" for split in ("train", "val")),
        f"data.classes={folder}/classes.txt",
        "data.max_bad_fraction=0.1",
        "data.cache_dir=null",
        "model.num_classes=8",
    )
    run = folder / "runs" / "small"
    checkpoint, model = write_checkpoint(run, config, step=12, classes=CLASSES)
    client = MlflowClient(tracking_uri(config))
    run_id = create_run(client, config, {})
    client.set_terminated(run_id, "FINISHED", end_time=123456789)
    write_record(str(run), config, {}, run_id, {"val/top1": 0.5})
    return {"run": str(run), "checkpoint": checkpoint, "config": config, "model": model, "broken": str(broken)}
