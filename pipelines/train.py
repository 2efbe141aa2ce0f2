"""One training run: Ray Train workers that learn, and a driver that checks, reports and tracks.

The driver validates everything first, starts the workers and listens to rank 0, which tells it of its progress through
a queue; the driver alone prints and writes to MLflow. A run lives in ``train.storage/name``; the same name goes on from
where it stopped.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed
from ray.train import Checkpoint, CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from ray.util.queue import Empty, Queue

from pipelines.ingest import BadVideo, Split, object_store
from pipelines.tracking import Tracker, source_tags
from posmlp import create_model, load_published
from posmlp.config import Config, flatten
from posmlp.errors import UserError
from posmlp.learn.learner import Batch, Learner
from posmlp.model.cost import Cost, cost
from posmlp.video.augment import flip_labels
from posmlp.video.manifest import Manifest, ManifestError, read_split

# glibc gives every large block back to the system and takes a fresh one for the next: a quarter of a training step on
# the CPU is then page faults. Workers keep what they have, in one arena: the training thread's own would give it back.
WORKER_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_ARENA_MAX": "1",
}
STATE_FILE = "state.pt"
# Keys that a run which goes on may change: they are not what it learns from a good video.
FREE = ("scaling.", "tracking.", "model.num_classes", "data.max_bad_fraction", "data.decode_timeout_s")
FREE += ("data.cache_dir", "data.rows_per_block", "data.decoder", "data.train.root", "data.val.root")
WAIT_LIMIT = 0.2  # share of an epoch that may pass in waiting for clips before the run says what helps
RUN_FILE = "run.json"


class RunError(UserError):
    """A run that cannot start or go on; the message is for the user."""


@dataclass
class RunResult:
    """What a finished run leaves.

    Attributes:
        metrics: those of the last epoch.
        bad: every bad video, once.
    """

    name: str
    path: Path
    mlflow_run_id: str
    metrics: dict[str, float]
    bad: list[BadVideo] = field(default_factory=list)


# --- on the driver -----------------------------------------------------------------------------------------------


def train(config: Config, echo: Callable[[str], None] = print) -> RunResult:
    """Run to the end, from the start or from where a run of this name stopped.

    Args:
        config: the recipe.
        echo: takes lines of progress.

    Raises:
        ManifestError: the data set's list is wrong.
        RunError: the run cannot start (the message says what to change), or has failed.
        KeyboardInterrupt: stopped by the user; the same call goes on from the last epoch's checkpoint.
    """
    folder = Path(config.train.storage).resolve() / config.name
    record = read_record(folder, config)
    train_set, val_set = read_splits(config)
    config = check_data(config, train_set, val_set)
    start_ray()
    check_cpus(config)
    tracker = Tracker.open(config, source_tags() | {"run": str(folder)}, record.get("mlflow_run_id"))
    status = "FAILED"
    try:
        write_record(folder, config, tracker.run_id, None)
        bad: dict[str, BadVideo] = {}
        metrics = fit(config, train_set, val_set, tracker, bad, echo)
        if config.tracking.log_model:
            tracker.log_model(trained_model(folder), example_input(config))
        write_record(folder, config, tracker.run_id, metrics)
        status = "FINISHED"
        return RunResult(config.name, folder, tracker.run_id, metrics, list(bad.values()))
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


def start_ray(**options: Any) -> None:
    """Connect to the cluster (``RAY_ADDRESS``, or one on this machine), else start a local Ray with ``options``."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a report waits for it
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="WARNING", **options)


def read_record(folder: Path, config: Config) -> dict[str, Any]:
    """What an earlier run of this name left; empty if there was none. Refuses to redo or to change it."""
    path = folder / RUN_FILE
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    if record["metrics"] is not None:
        raise RunError(
            f"run {config.name!r} is finished (val/top1 {record['metrics'].get('val/top1', float('nan')):.1%}, "
            f"{folder}). Choose another name (name=...), or delete that folder to train it again."
        )
    before, now = flatten(record["config"]), config.flat()
    changed = [k for k in before | now if before.get(k) != now.get(k) and not k.startswith(FREE)]
    if changed:
        raise RunError(
            f"run {config.name!r} was started with another recipe; choose another name, delete {folder}, or restore:"
            + "".join(f"\n  {k}: was {before.get(k)!r}, is {now.get(k)!r}" for k in changed)
        )
    return record


def write_record(folder: Path, config: Config, mlflow_run_id: str, metrics: dict[str, float] | None) -> None:
    """Note the run's recipe, its MLflow run and, at the end, its metrics; atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": config.model_dump(mode="json"), "mlflow_run_id": mlflow_run_id, "metrics": metrics}
    temporary = folder / f"{RUN_FILE}.tmp"
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(folder / RUN_FILE)


def read_splits(config: Config) -> tuple[Manifest, Manifest]:
    """Both splits' lists; what is wrong with either is told at once."""
    found, problems = [], []
    for name in ("train", "val"):
        try:
            found.append(read_split(config.data, name))
        except ManifestError as error:
            problems += error.problems
    if problems:
        raise ManifestError(list(dict.fromkeys(problems)))
    return found[0], found[1]


def check_data(config: Config, train_set: Manifest, val_set: Manifest) -> Config:
    """Fill in the number of classes and where the cache is; refuse splits that do not fit together or the batch."""
    if train_set.classes != val_set.classes:
        raise RunError(
            f"the splits name different classes: {config.data.train.path} has {list(train_set.classes)}, "
            f"{config.data.val.path} has {list(val_set.classes)}"
        )
    clips = len(train_set.rows) * config.data.repeats
    if clips < config.train.global_batch:
        raise RunError(
            f"train.global_batch {config.train.global_batch} is more than the {clips} training clips "
            f"of {config.data.train.path}; lower it"
        )
    if config.data.fps is not None:
        for split, manifest in ((config.data.train, train_set), (config.data.val, val_set)):
            if manifest.rows["frames"].null_count < len(manifest.rows):
                raise RunError(
                    f"data.fps {config.data.fps:g} needs frame times, but {split.path} lists frame folders, which have "
                    "none; leave data.fps out"
                )
    flip_labels(config.augment.flip_classes, train_set.classes, len(train_set.classes))
    classes = config.model.num_classes or len(train_set.classes)
    if classes < len(train_set.classes):
        raise RunError(f"model.num_classes {classes} is less than the data set's {len(train_set.classes)} classes")
    cache = config.data.cache_dir
    data = config.data.model_copy(update={"cache_dir": cache and os.path.abspath(cache)})  # tasks run elsewhere
    model = config.model.model_copy(update={"num_classes": classes})
    return config.model_copy(update={"model": model, "data": data})


def check_cpus(config: Config) -> None:
    """Refuse workers that leave no CPU for decoding: Ray Data would wait for ever without a word."""
    cpus, scaling = ray.cluster_resources().get("CPU", 0), config.scaling
    left = cpus - scaling.workers * scaling.cpus_per_worker
    if left < 1:
        raise RunError(
            f"{scaling.workers} workers x {scaling.cpus_per_worker:g} CPUs leave {left:g} of {cpus:g} CPUs for "
            "decoding, which needs at least 1. Lower scaling.workers, or scaling.cpus_per_worker to at most "
            f"{max(0, cpus - 1) / scaling.workers:g} (it reserves CPUs; threads are scaling.threads_per_worker)"
        )
    gpus = ray.cluster_resources().get("GPU", 0)
    if scaling.use_gpu and gpus < scaling.workers:
        raise RunError(f"scaling.workers {scaling.workers} need a GPU each, and the cluster has {gpus:g}")


def fit(
    config: Config,
    train_set: Manifest,
    val_set: Manifest,
    tracker: Tracker,
    bad: dict[str, BadVideo],
    echo: Callable[[str], None],
) -> dict[str, float]:
    """Run the workers while a thread passes on what rank 0 tells; returns the last epoch's metrics."""
    queue = Queue(actor_options={"num_cpus": 0})
    scaling = config.scaling
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(),
            "train_rows": ray.put(train_set.rows),
            "val_rows": ray.put(val_set.rows),
            "classes": train_set.classes,
            "queue": queue,
        },
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=str(Path(config.train.storage).resolve()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": WORKER_ENV},
        ),
    )
    listener = Listener(queue, tracker, bad, echo)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit:  # how Ray Train ends when its own handler of Ctrl-C has stopped the workers
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        raise RunError(explain(error)) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
        listener.stop()
        queue.shutdown()
    return dict(result.metrics)


def explain(error: Exception) -> str:
    """The reason of a failed run; with a traceback only where the failure is not of the user's making."""
    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in failures:
        if isinstance(failure, UserError):
            return str(failure)
    return f"training failed: {error}"


class Listener(threading.Thread):
    """Prints and tracks what rank 0 tells, until stopped."""

    def __init__(self, queue: Queue, tracker: Tracker, bad: dict[str, BadVideo], echo: Callable[[str], None]):
        super().__init__(daemon=True)
        self.queue, self.tracker, self.bad, self.echo = queue, tracker, bad, echo
        self.logged = tracker.epochs_logged()
        self.failure: Exception | None = None
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        while True:
            try:
                event = self.queue.get(timeout=0.5)
            except Empty:
                if self.stopping.is_set():
                    return
                continue
            except ray.exceptions.RayError:  # the queue's actor died with the cluster; fit() says why
                return
            self.handle(**event)

    def handle(self, kind: str, **event: Any) -> None:
        if kind == "line":
            self.echo(event["text"])
        elif kind == "cost":
            self.tracker.log(event["metrics"], step=0)
        elif kind == "metrics":
            for metrics in event["history"]:  # an epoch that an earlier driver did not live to write comes again
                if metrics["epoch"] > self.logged:
                    self.logged = int(metrics["epoch"])
                    self.tracker.log(metrics, step=self.logged)
        elif kind == "bad":
            self.bad |= {v.sample_id: v for v in event["videos"]}
            self.tracker.log_table([asdict(v) for v in self.bad.values()], "quarantine.json")

    def stop(self) -> None:
        """Take what is still in the queue, then end."""
        self.stopping.set()
        self.join(timeout=60)


def trained_model(folder: Path) -> torch.nn.Module:
    """The model of a run's last checkpoint, on the CPU, in eval mode."""
    checkpoints = sorted(folder.glob(f"checkpoint_*/{STATE_FILE}"))
    if not checkpoints:
        raise RunError(f"{folder} holds no checkpoint; expected the folder of a run, train.storage/name")
    state = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
    config = Config.model_validate(json.loads((folder / RUN_FILE).read_text())["config"])
    model = create_model(config.model.name, **config.model.overrides())
    model.load_state_dict(state["weights"])
    return model.eval()


def example_input(config: Config) -> torch.Tensor:
    """Zeros of the shape the model takes: ``[1, 3, T, H, W]``."""
    variant = config.model.variant()
    return torch.zeros(1, 3, variant.frames, variant.image_size, variant.image_size)


# --- on a training worker ----------------------------------------------------------------------------------------


def train_worker(job: dict[str, Any]) -> None:
    """Ray Train's loop: epochs of train and eval steps, a checkpoint and a report after each."""
    config = Config.model_validate(job["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    threads = config.scaling.threads_per_worker or max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    torch.set_num_threads(threads)
    torch.manual_seed(config.train.seed)
    train_split, val_split = (
        Split(job[f"{name}_rows"], config, name == "train", rank, world) for name in ("train", "val")
    )
    model = create_model(config.model.name, **config.model.overrides())
    if config.model.weights:
        load_published(model, config.model.weights)
    learner = Learner(prepare_model(model), config, train_split.steps, job["classes"])
    history = restore(learner)
    tell = job["queue"].put if rank == 0 else (lambda event: None)
    if rank == 0:
        measured = cost(config.model.name, device=learner.device, **config.model.overrides())
        tell({"kind": "cost", "metrics": measured.metrics()})
        tell({"kind": "metrics", "history": history})
        tell({"kind": "line", "text": describe_start(config, measured, len(history), world)})
    told: set[str] = set()
    batches = train_split.batches(len(history), until=config.train.epochs)
    for epoch in range(len(history), config.train.epochs):
        torch.manual_seed(config.train.seed * 100_003 + epoch * 1_009 + rank)  # drop path: the same after a resume
        metrics = train_epoch(learner, train_split, batches, epoch, tell)
        if (epoch + 1) % config.eval.every == 0 or epoch + 1 == config.train.epochs:
            metrics |= validate(learner, val_split)
        if config.data.decoder == "decord":
            taken_over = torch.tensor([float(train_split.taken_over + val_split.taken_over)], device=learner.device)
            metrics["data/decoded_by_pyav"] = average(taken_over)[0] * world
        bad = gather(train_split.take_bad() + val_split.take_bad())
        metrics |= {"data/bad": float(len(bad)), "epoch": float(epoch + 1)}
        if bad:
            tell({"kind": "bad", "videos": bad})
        check_bad(bad, train_split.count, val_split.count, config)
        history.append(metrics)
        save(learner, history, metrics, rank)
        tell({"kind": "metrics", "history": [metrics]})
        tell({"kind": "line", "text": describe_epoch(metrics, config)})
        for kind, text in advise(metrics, config).items():
            if kind not in told:  # once is enough
                told.add(kind)
                tell({"kind": "line", "text": text})


def train_epoch(
    learner: Learner, split: Split, batches: Iterator[Batch], epoch: int, tell: Callable[[dict], None]
) -> dict[str, float]:
    """One epoch of optimizer steps; returns its metrics, the mean over all workers."""
    steps, epochs = split.steps, split.config.train.epochs
    loss, waited, first, clips = torch.zeros((), device=learner.device), 0.0, 0.0, 0
    start = spoken = time.perf_counter()
    watch = object_store if ray.train.get_context().get_world_rank() == 0 else lambda: (math.nan, math.nan)
    (store, spilled_before) = watch()
    for step in range(1, steps + 1):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        if step == 1:
            first = waited
        loss += learner.train_step(batch.to(learner.device))
        clips += len(batch.labels) * split.world
        now = time.perf_counter()
        if now - spoken > 5:
            spoken = now
            store = max(store, watch()[0])
            left = (now - start) / step * (steps * (epochs - epoch) - step)
            text = f"epoch {epoch + 1}/{epochs}  step {step}/{steps}  loss {loss.item() / step:.3f}  "
            text += f"{clips / (now - start):.1f} clips/s  data wait {waited / (now - start):.0%}  left {minutes(left)}"
            tell({"kind": "line", "text": text})
    seconds = time.perf_counter() - start
    used, spilled = watch()
    (mean_loss, mean_wait) = average(torch.tensor([loss.item() / steps, waited / seconds], device=learner.device))
    return {
        "train/loss": mean_loss,
        "train/lr": learner.optimizer.param_groups[0]["lr"],
        "perf/clips_per_s": clips / seconds,
        "perf/data_wait_frac": mean_wait,
        "perf/first_batch_s": first,
        "perf/epoch_s": seconds,
        "data/object_store_mb": max(store, used),
        "data/spilled_mb": spilled - spilled_before,
    }


def validate(learner: Learner, split: Split) -> dict[str, float]:
    """Loss, top-1 and top-5 over the whole split, every good video once."""
    sums = sum(learner.eval_step(batch.to(learner.device)) for batch in split.batches(0))
    if split.world > 1:
        torch.distributed.all_reduce(sums)
    loss, top1, top5, clips = sums.tolist()
    if not clips:
        raise RunError("no validation video could be decoded")
    return {"val/loss": loss / clips, "val/top1": top1 / clips, "val/top5": top5 / clips, "val/clips": clips}


def average(values: torch.Tensor) -> list[float]:
    """The mean over all workers."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values.tolist()


def gather(bad: list[BadVideo]) -> list[BadVideo]:
    """The bad videos of all workers."""
    if not torch.distributed.is_initialized():
        return bad
    parts: list[list[BadVideo] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, bad)
    return [video for part in parts for video in part or []]


def check_bad(bad: list[BadVideo], train_rows: int, val_rows: int, config: Config) -> None:
    """End the run when too many of an epoch's videos are bad."""
    fraction, limit = len(bad) / (train_rows + val_rows), config.data.max_bad_fraction
    if fraction > limit:
        examples = "".join(f"\n  {v.uri}: {v.reason}" for v in bad[:5])
        raise RunError(
            f"{len(bad)} of {train_rows + val_rows} videos ({fraction:.1%}) could not be decoded, more than "
            f"data.max_bad_fraction {limit:.1%} allows. Mend them, or raise the limit. The first ones:{examples}"
        )


def save(learner: Learner, history: list[dict[str, float]], metrics: dict[str, float], rank: int) -> None:
    """Report the epoch with a checkpoint; rank 0 writes it, and all workers wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            weights = learner.evaluated.state_dict()
            torch.save(learner.state_dict() | {"weights": weights, "history": history}, Path(folder) / STATE_FILE)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)


def restore(learner: Learner) -> list[dict[str, float]]:
    """Load the run's last checkpoint, if there is one; returns the metrics of the epochs done."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE_FILE, map_location=learner.device, weights_only=True)
    learner.load_state_dict(state)
    return state["history"]


def describe_start(config: Config, model: Cost, done: int, world: int) -> str:
    """The first line of a run."""
    what = f"{model.name}, {model.params / 1e6:.2f} M parameters, {model.macs / 1e9:.2f} GMACs"
    where = (
        f"{world} worker{'s' * (world > 1)} on {model.device}, {model.threads} thread{'s' * (model.threads > 1)} each"
    )
    start = f"going on after epoch {done}" if done else "starting"
    return f"{config.name}: {what}; {where}; {start}"


def describe_epoch(metrics: dict[str, float], config: Config) -> str:
    """The line that ends an epoch."""
    text = f"epoch {metrics['epoch']:.0f}/{config.train.epochs}  loss {metrics['train/loss']:.3f}"
    if "val/top1" in metrics:
        text += f"  val top-1 {metrics['val/top1']:.1%}"
    text += f"  {metrics['perf/clips_per_s']:.1f} clips/s  data wait {metrics['perf/data_wait_frac']:.0%}"
    text += f"  object store {metrics['data/object_store_mb']:.0f} MB"
    if metrics["data/spilled_mb"] > 0:
        text += f", spilled {metrics['data/spilled_mb']:.0f} MB"
    if metrics["data/bad"]:
        text += f"  bad videos {metrics['data/bad']:.0f}"
    return text


def advise(metrics: dict[str, float], config: Config) -> dict[str, str]:
    """Which knob to turn when the device waits for clips or the object store spills: a text for each trouble."""
    data, texts = config.data, {}
    seconds, first = metrics["perf/epoch_s"], metrics["perf/first_batch_s"]
    waited = (metrics["perf/data_wait_frac"] * seconds - first) / (seconds - first)  # not the start of the decoders
    if waited > WAIT_LIMIT:
        kind = "wait"
        knobs = [
            "decode on more CPUs (scaling.cpus_per_worker reserves CPUs that decoding cannot have; nodes without a GPU "
            "decode too)"
        ]
        if data.cache_dir is None:
            side = data.short_side or -(-config.model.variant().image_size * 8 // 7)
            knobs.append("decode a small set once (data.cache_dir)")
            pack = f"`posmlp data shard LIST --out DIR --short-side {side} --keyframe-interval 12`"
            knobs.append(f"for the next run, pack the set for it ({pack})")
        elif metrics["epoch"] == 1:
            kind, knobs = "cache", ["wait for the next epoch: data.cache_dir is being filled in the first"]
        if data.repeats == 1 and not data.cache_dir:
            knobs.append("for the next run, cut several clips from each decoded video (data.repeats)")
        texts[kind] = f"training waited for clips {waited:.0%} of the epoch. What helps: " + "; or ".join(knobs)
    if metrics["data/spilled_mb"] > 0:
        texts["spill"] = (
            f"the object store spilled {metrics['data/spilled_mb']:.0f} MB to disk. What helps: a smaller "
            "data.rows_per_block, or more memory for it (`ray start --object-store-memory`)"
        )
    return texts


def minutes(seconds: float) -> str:
    """Readable time left."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
