"""Key frames of two small videos with boxes, as a list of them is read, and a model of random weights for them."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from mlflow import MlflowClient

from pipelines.runs.record import write_record
from pipelines.tracking.mlflow_client import create_run
from pipelines.tracking.uris import tracking_uri
from posmlp.config import Config
from posmlp.detection.scenes import ACTIONS as SCENE_ACTIONS
from posmlp.detection.scenes import FIRST_SECOND, make_scene_set
from posmlp.video.manifest import Manifest
from tests.helpers.random_models import write_checkpoint
from tests.helpers.videos import write_video

ACTIONS = ("stand", "sit", "run, fast", "watch a person", "talk $to", "unnamed 6")
EVALUATED = [0, 1, 3, 4]
GROUPS = {"pose": [0, 1, 2], "person": [3, 4]}
SPLITS = ("train", "val")  # of an embedded set
RATE = 10  # frames a second
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("uri", pa.string()),
        ("label", pa.int32()),
        ("frames", pa.int32()),
        ("time", pa.float64()),
        ("boxes", pa.list_(pa.float32())),
        ("actions", pa.list_(pa.list_(pa.int32()))),
        ("scores", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Person:
    """A box of a key frame; ``score`` None: of the ground truth, only compared with."""

    video: str
    second: int
    box: tuple[float, float, float, float]
    actions: tuple[int, ...] = ()
    score: float | None = None


def some_people(seed=0, seconds=(1, 2, 3)):
    """People in two videos: the truth, and boxes of a detector, most of them near a true one."""
    rng, people = np.random.default_rng(seed), []
    for video in ("wide", "tall"):
        for second in seconds:
            for _ in range(rng.integers(1, 4)):
                x, y = rng.uniform(0.0, 0.5, 2)
                box = np.round([x, y, x + rng.uniform(0.2, 0.45), y + rng.uniform(0.2, 0.45)], 3)
                actions = tuple(sorted(rng.choice(len(ACTIONS), rng.integers(1, 4), replace=False).tolist()))
                people.append(Person(video, second, tuple(box.tolist()), actions))
                for _ in range(rng.integers(1, 3)):
                    near = np.round((box + rng.normal(0, 0.03, 4)).clip(0, 1), 3)
                    people.append(Person(video, second, tuple(near.tolist()), (), float(rng.uniform(0.8, 1))))
    return people


def write_videos(folder):
    """Four seconds of frames that say their numbers, one wide and one tall; returns paths by name."""
    sizes = {"wide": (108, 72), "tall": (72, 120)}
    return {name: write_video(folder / f"{name}.mp4", *size) for name, size in sizes.items()}


def manifest_of(people, videos):
    """The rows that a list of these people is read as."""
    rows = {}
    for person in people:
        key = f"{person.video},{person.second:04d}"
        row = rows.setdefault(key, {"sample_id": key, "uri": videos[person.video], "label": None, "frames": None})
        row["time"] = float(person.second)
        row.setdefault("boxes", []).extend(person.box)
        row.setdefault("actions", []).append(list(person.actions))
        row.setdefault("scores", []).append(float("nan") if person.score is None else person.score)
    metadata = {"evaluated": json.dumps(EVALUATED), "groups": json.dumps(GROUPS)}
    table = pa.Table.from_pylist(list(rows.values()), SCHEMA.with_metadata(metadata))
    return Manifest(table, ACTIONS)


def detection_recipe(**sections):
    """A small detection model; its lists are not read."""
    tree = {
        "name": "boxes",
        "task": "detection",
        "model": {"frames": 4, "image_size": 32, "num_classes": len(ACTIONS)},
        "data": {"train": "unused", "val": "unused", "format": "ava", "classes": "unused", "stride": 2},
        "augment": {"mixup": 0, "cutmix": 0, "randaug_layers": 0},
        "optim": {"label_smoothing": 0},
        "train": {"global_batch": 4},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return Config.model_validate(tree)


def write_untrained_detection_run(folder):
    """Write a run with a checkpoint of a random model on an embedded set, of whose videos the last one is broken.

    Returns:
        A dict: "run" and "checkpoint" (folders), "config", "model", and "set" (its folder).
    """
    scenes = make_scene_set(folder / "set", train=1, val=3, seconds=4, size=48)
    broken = scenes / "videos" / "val_002.mp4"
    broken.write_bytes(broken.read_bytes()[:200])
    split = {"root": f"{scenes}/videos"}
    data = {name: split | {"path": f"{scenes}/{name}.csv", "boxes": f"{scenes}/{name}_boxes.csv"} for name in SPLITS}
    data["val"]["excluded"] = f"{scenes}/val_excluded.csv"
    config = detection_recipe(
        model={"num_classes": len(SCENE_ACTIONS)},
        data=data | {"classes": f"{scenes}/actions.pbtxt", "max_bad_fraction": 0.5},
        detection={"first_second": FIRST_SECOND, "val_every": 2},
        train={"storage": f"{folder}/runs"},
        tracking={"log_model": False},
    )
    run = folder / "runs" / "boxes"
    checkpoint, model = write_checkpoint(run, config, step=12, classes=[name for name, _ in SCENE_ACTIONS])
    client = MlflowClient(tracking_uri(config))
    run_id = create_run(client, config, {})
    client.set_terminated(run_id, "FINISHED")
    write_record(str(run), config, {}, run_id, {"val/map": 0.5})
    return {"run": str(run), "checkpoint": checkpoint, "config": config, "model": model, "set": scenes}
