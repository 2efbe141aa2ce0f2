"""What a recipe takes on a cluster that need not be there: a model of the whole system, by arithmetic alone.

Each part of the system has a rate in training clips a second: the GPUs, the cores that decode, the object store, the
network into and out of a GPU node, the network of a decode node. The slowest is the run's rate. Nothing is started
and no Ray is needed. Constants are measured (the command is named), taken from the code (which a test compares), or
assumed; ``table`` says which. What is left out is listed in docs/scale.md.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from posmlp import create_model, storage
from posmlp.config import Config, load_recipe
from posmlp.errors import UserError
from posmlp.model.cost import PEAKS, count_macs, count_params
from posmlp.video.manifest import read_split

TRAIN_FLOPS, TEST_FLOPS = 6, 2  # for each multiply-accumulate: a training step is three forward passes
MFU = 0.15  # share of the peak that training reaches. ASSUMED: it is not measured here; perf/mfu of a run tells
RAY_SHARE = 0.96  # of a decoding core goes into decoding under Ray Data: 14.2 / 14.8 (benchmarks/ingest.py throughput)
STORE_SHARE, QUEUED = 0.25, 2  # pipelines.data.loader
RAY_STORE_GB = 200.0  # most that a node's object store takes by itself (ray._private.ray_constants)
SAMPLE_S = 10.0  # between two lines of system metrics (pipelines.tracking.tracker)
MAX_PARAMS = 100  # in one call (pipelines.tracking.tracker)
TRAIN_METRICS, SPEED_METRICS, EPOCH_METRICS, VAL_METRICS = (
    9,
    4,
    2,
    5,
)  # values of an epoch (pipelines.training.worker, ClassificationMetrics)
COST_METRICS = 5  # values (posmlp.model.cost)
MACHINE_METRICS, GPU_METRICS = 8, 5  # values of a line of system metrics, and more for each GPU (mlflow.system_metrics)
START_CALLS = 4  # create the run, store config.yaml, note that it runs, log the cost; params come on top
END_CALLS = 4  # two pictures, the last line of system metrics, the status
MODEL_CALLS = 4  # create, outputs, files, finalize

MEASURED_FRAMES, MEASURED_SIZE = 16, 224  # of the clips in SOURCES
MEASURED_SPAN, MEASURED_LENGTH = 31, 300  # frames from the first to the last wanted one, dense; and of a whole video


@dataclass(frozen=True)
class Source:
    """How videos are stored, and what that costs.

    Attributes:
        kb: of a video (10 s, 340x256, H.264), in 1000 bytes.
        uniform, dense, decord_uniform, decord_dense: milliseconds of one core for one clip of 16 frames of 224x224.
    """

    kb: float
    uniform: float
    dense: float
    decord_uniform: float
    decord_dense: float


SETTINGS = "python benchmarks/ingest.py settings"
SOURCES = {  # measured on one core of an AMD EPYC (Zen 5) by SETTINGS; the table is in the README
    "as-is": Source(581, 69, 43, 92, 63),
    "shard": Source(583, 68, 41, 94, 63),
    "key250": Source(716, 75, 51, 113, 75),
    "key32": Source(785, 67, 27, 112, 75),
    "key12": Source(907, 48, 24, 119, 80),
    "key4": Source(1372, 35, 27, 153, 101),
}

GIVEN = "given"
GPUS, DECODING, STORE = "GPUs", "decoding", "object store"
NETWORK_IN, NETWORK_OUT = "network into a GPU node", "network out of a GPU node"
NETWORK_DECODE = "network of a decode node"


@dataclass(frozen=True)
class Cluster:
    """The machines.

    Attributes:
        gpus, gpus_per_node: one training worker a GPU.
        gpu_node_cores, decode_nodes, decode_node_cores: cores are those of Ray, all nodes of a kind are alike.
        gbit: network of a node, each way, 1e9 bits a second.
        memory_gb, store_share: of a node; the share of it is the object store.
        peak: operations a second of one GPU; peak_from says where that is from.
        mfu: share of the peak that training reaches.
    """

    gpus: int
    gpus_per_node: int = 8
    gpu_node_cores: int = 96
    decode_nodes: int = 0
    decode_node_cores: int = 64
    gbit: float = 100.0
    memory_gb: float = 256.0
    store_share: float = 0.3
    peak: float = PEAKS["H100"]
    peak_from: str = "H100, data sheet"
    mfu: float = MFU

    def __post_init__(self) -> None:
        if self.gpus % self.gpus_per_node:
            raise UserError(f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}; change --gpus or the nodes")
        for name, value in (("--mfu", self.mfu), ("--store-share", self.store_share)):
            if not 0 < value <= 1:
                raise UserError(f"{name} {value:g} is a share, above 0 and at most 1")

    @property
    def nodes(self) -> int:
        """GPU nodes."""
        return self.gpus // self.gpus_per_node

    @property
    def store_bytes(self) -> float:
        """The object stores of all nodes together."""
        return (self.nodes + self.decode_nodes) * min(self.memory_gb * self.store_share, RAY_STORE_GB) * 1e9

    @property
    def bytes_per_s(self) -> float:
        """A node's network, each way."""
        return self.gbit * 1e9 / 8


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster. Bytes are bytes, times are seconds, rates are clips a second of the whole cluster.

    Attributes:
        config: with a worker for each GPU.
        videos, val_videos: of the two lists.
        decode_ms, video_kb: what a clip takes of a core, and the size of a video; decode_from says where from.
        macs: of one clip.
        params, tensors, buffer_bytes: numbers in parameters, parameters, and what else the weights hold.
    """

    config: Config
    cluster: Cluster
    videos: int
    val_videos: int
    decode_ms: float
    video_kb: float
    decode_from: str
    macs: int
    params: int
    tensors: int
    buffer_bytes: int

    # --- cores and bytes -----------------------------------------------------------------------------------------

    @property
    def cores_here(self) -> float:
        """Cores of one GPU node that training leaves for decoding."""
        taken = self.cluster.gpus_per_node * self.config.scaling.cpus_per_worker
        return max(0.0, self.cluster.gpu_node_cores - taken)

    @property
    def cores(self) -> float:
        """Cores that decode, in the whole cluster."""
        return self.cluster.nodes * self.cores_here + self.cluster.decode_nodes * self.cluster.decode_node_cores

    @property
    def clip_bytes(self) -> int:
        """A decoded clip, uint8 ``[T, H, W, 3]``."""
        variant = self.config.model.variant()
        return variant.frames * variant.image_size**2 * 3

    @property
    def block_bytes(self) -> int:
        """What one training decode task returns."""
        views = self.config.data.repeats
        return max(1, self.config.data.rows_per_block // views) * views * self.clip_bytes

    @property
    def gradient_bytes(self) -> float:
        """Into each node, and out of it, in one step: gradients in fp32 by a ring over all GPUs that enters and leaves
        a node once. FSDP also gathers the weights, twice for each part of the batch."""
        if self.cluster.nodes == 1:
            return 0.0
        passes, scaling = 2, self.config.scaling
        if scaling.parallel == "fsdp":
            local = self.config.train.global_batch / self.cluster.gpus
            passes = 1 + 2 * math.ceil(local / (scaling.micro_batch or local))
        return passes * (self.cluster.gpus - 1) / self.cluster.gpus * 4 * self.params

    @property
    def checkpoint_bytes(self) -> int:
        """Tensors of one: the weights that count, AdamW's two moments and counter, the weights behind the average."""
        weights = 4 * self.params + self.buffer_bytes
        moments = 2 * 4 * self.params + 4 * self.tensors
        return weights + moments + (weights if self.config.optim.ema else 0)

    def node_bytes(self, train: bool) -> dict[str, float]:
        """What crosses a node's network for one clip of the cluster, by the network's name.

        Decode tasks run on any free core, so a node decodes as large a part as it has of the cores.
        """
        here, views = self.cores_here / self.cores, self.views(train)
        video = 1000 * self.video_kb / views
        gradients = self.gradient_bytes / self.config.train.global_batch if train else 0.0
        found = {
            NETWORK_IN: self.clip_bytes * (1 - here) / self.cluster.nodes + video * here + gradients,
            NETWORK_OUT: self.clip_bytes * here * (1 - 1 / self.cluster.nodes) + gradients,
        }
        if self.cluster.decode_nodes:
            found[NETWORK_DECODE] = max(self.clip_bytes, video) * self.cluster.decode_node_cores / self.cores
        return found

    def views(self, train: bool) -> int:
        """Clips of a video, decoded together."""
        return self.config.data.repeats if train else self.config.eval.clips * self.config.eval.crops

    # --- rates and times -----------------------------------------------------------------------------------------

    def limits(self, train: bool = True) -> dict[str, float]:
        """The most clips a second that each part of the system takes or gives."""
        cluster, flops = self.cluster, (TRAIN_FLOPS if train else TEST_FLOPS) * self.macs
        core = RAY_SHARE * 1000 / self.decode_ms
        found = {
            GPUS: cluster.gpus * cluster.peak * cluster.mfu / flops,
            DECODING: self.cores * core,
            STORE: cluster.store_bytes * STORE_SHARE / self.block_bytes * core,  # tasks whose blocks fit
        }
        return found | {n: cluster.bytes_per_s / b if b else math.inf for n, b in self.node_bytes(train).items()}

    @property
    def bottleneck(self) -> str:
        """The slowest part, in training."""
        found = self.limits()
        return min(found, key=found.__getitem__)

    @property
    def rate(self) -> float:
        """Training clips a second."""
        return min(self.limits().values())

    @property
    def cores_needed(self) -> float:
        """Decoding cores with which the GPUs would not wait."""
        return self.limits()[GPUS] * self.decode_ms / 1000 / RAY_SHARE

    @property
    def decode_nodes_needed(self) -> int:
        """Nodes for those cores that the GPU nodes do not have."""
        missing = self.cores_needed - self.cluster.nodes * self.cores_here
        return max(0, math.ceil(missing / self.cluster.decode_node_cores))

    @property
    def steps(self) -> int:
        """Training steps of an epoch."""
        return self.videos // (self.config.train.global_batch // self.config.data.repeats)

    @property
    def train_s(self) -> float:
        """The training of an epoch."""
        return self.steps * self.config.train.global_batch / self.rate

    @property
    def val_s(self) -> float:
        """One validation."""
        return self.val_videos * self.views(False) / min(self.limits(train=False).values())

    @property
    def validations(self) -> int:
        """Of the run."""
        epochs, every = self.config.train.epochs, self.config.eval.every
        return epochs // every + (epochs % every > 0)

    @property
    def checkpoints(self) -> float:
        """Written in an epoch: one at its end, and those within it, on average."""
        every, steps, epochs = self.config.train.checkpoint_every_steps, self.steps, self.config.train.epochs
        if not every:
            return 1.0
        return 1 + (epochs * steps // every - epochs * steps // math.lcm(every, steps)) / epochs

    @property
    def checkpoints_s(self) -> float:
        """Writing an epoch's checkpoints at the network's rate; all workers wait for the one that writes."""
        return self.checkpoints * self.checkpoint_bytes / self.cluster.bytes_per_s

    @property
    def run_s(self) -> float:
        """The run."""
        return self.config.train.epochs * (self.train_s + self.checkpoints_s) + self.validations * self.val_s

    # --- MLflow --------------------------------------------------------------------------------------------------

    @property
    def epoch_values(self) -> int:
        """Metrics of an epoch with validation."""
        mfu, decord = self.config.train.precision != "fp32", self.config.data.decoder == "decord"
        return TRAIN_METRICS + SPEED_METRICS + EPOCH_METRICS + VAL_METRICS + mfu + decord

    @property
    def samples(self) -> int:
        """Lines of system metrics in a run, without the last."""
        return int(self.run_s / SAMPLE_S)

    @property
    def sample_values(self) -> int:
        """Values in such a line, if the driver is on a GPU node: of its machine, and then of each of several nodes."""
        own, cluster = MACHINE_METRICS + GPU_METRICS * self.cluster.gpus_per_node, self.cluster
        if cluster.nodes + cluster.decode_nodes == 1:
            return own
        return own + cluster.nodes * own + cluster.decode_nodes * MACHINE_METRICS

    @property
    def tracking_calls(self) -> int:
        """Writes to MLflow over the run, if each epoch has a bad video, and MLflow keeps up with single lines."""
        params = math.ceil(len(self.config.flat()) / MAX_PARAMS)
        model = MODEL_CALLS if self.config.tracking.log_model else 0
        return START_CALLS + params + 2 * self.config.train.epochs + self.samples + END_CALLS + model

    @property
    def tracking_values(self) -> int:
        """Metric values over the run."""
        epochs = self.config.train.epochs
        values = epochs * self.epoch_values - (epochs - self.validations) * VAL_METRICS
        return COST_METRICS + values + (self.samples + 1) * self.sample_values


# --- making one ------------------------------------------------------------------------------------------------------


def make_cluster(
    gpus: int,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu: str = "H100",
    tflops: float | None = None,
    **rest: float,
) -> Cluster:
    """A cluster from what the command line has.

    Args:
        nodes, gpus_per_node: one of them, or neither: 8 GPUs a node, or all if there are fewer.
        gpu, tflops: a name in ``posmlp.model.cost.PEAKS``, or the peak in 1e12 operations a second.
        rest: fields of ``Cluster``.

    Raises:
        UserError: the numbers do not fit together.
    """
    if nodes and gpus % nodes:
        raise UserError(f"{gpus} GPUs do not spread evenly over {nodes} nodes")
    if tflops is None and gpu not in PEAKS:
        raise UserError(f"the peak of {gpu!r} is not known; give --tflops, or one of {', '.join(PEAKS)} for --gpu")
    peak, peak_from = (tflops * 1e12, GIVEN) if tflops else (PEAKS[gpu], f"{gpu}, data sheet")
    per_node = gpus // nodes if nodes else gpus_per_node or min(8, gpus)
    fields: dict[str, Any] = rest
    return Cluster(gpus, per_node, peak=peak, peak_from=peak_from, **fields)


def make_plan(
    recipe: str,
    overrides: list[str],
    cluster: Cluster,
    *,
    videos: int | None = None,
    val_videos: int | None = None,
    source: str = "as-is",
    decode_ms: float | None = None,
    video_kb: float | None = None,
) -> Plan:
    """A recipe on a cluster.

    Args:
        recipe, overrides: as for ``load_recipe``; ``scaling.workers`` becomes the number of GPUs.
        videos, val_videos: None counts the recipe's own lists.
        source: one of ``SOURCES``.
        decode_ms, video_kb: measured by the user, in place of the source's.

    Raises:
        UserError: it cannot run, or what it takes is not known.
    """
    try:
        config = load_recipe(recipe, [*overrides, f"scaling.workers={cluster.gpus}", "scaling.use_gpu=true"])
    except UserError as error:
        before = load_recipe(recipe, overrides)
        batch = before.train.global_batch // before.scaling.workers * cluster.gpus
        text = f"{error}\n  with scaling.workers={cluster.gpus}, a worker for each GPU; train.global_batch={batch} "
        raise UserError(f"{text}would keep the recipe's clips a worker") from error
    if config.train.precision == "fp32" and cluster.peak_from != GIVEN:
        raise UserError("train.precision is fp32, and only peaks of half precision are known: give --tflops")
    if source not in SOURCES:
        raise UserError(f"--source {source!r} was not measured; choose one of {', '.join(SOURCES)}")
    if config.model.choices:
        raise UserError("model.choices trains many models at once; a plan is of one: leave it out")
    variant = config.model.variant()
    with torch.device("meta"):
        model = create_model(config.model.name, **config.model.overrides())
    origin = GIVEN
    if decode_ms is None:
        decode_ms = measured_decode_ms(config, source)
        origin = f"{source}: README, `{SETTINGS}`"
    plan = Plan(
        config,
        cluster,
        count_videos(config, "train", "--videos", videos),
        count_videos(config, "val", "--val-videos", val_videos),
        decode_ms,
        SOURCES[source].kb if video_kb is None else video_kb,
        origin,
        count_macs(variant),
        count_params(model),
        len(list(model.parameters())),
        sum(b.numel() * b.element_size() for b in model.buffers()),
    )
    if plan.cores < 1:
        raise UserError(
            f"{cluster.gpus_per_node} workers x {config.scaling.cpus_per_worker:g} CPUs leave no core of a GPU node "
            "for decoding; give --decode-nodes or more --cores, or lower scaling.cpus_per_worker"
        )
    if not plan.steps:
        raise UserError(
            f"train.global_batch {config.train.global_batch} is more than the "
            f"{plan.videos * config.data.repeats} training clips; lower it"
        )
    return plan


def measured_decode_ms(config: Config, source: str) -> float:
    """Milliseconds of a core for one clip, from ``SOURCES``.

    Dense clips were measured with stride 2, over 31 frames; longer ones lie between these and uniform clips, over the
    whole video, in proportion to their length. More or fewer frames than 16 cost in proportion. Both are assumed.

    Raises:
        UserError: nothing like it was measured.
    """
    data, variant = config.data, config.model.variant()
    if variant.image_size != MEASURED_SIZE or data.cache_dir or data.format in ("images", "ssv1"):
        raise UserError(
            f"decoding was measured for clips of {MEASURED_SIZE} pixels from videos without a cache, and this recipe "
            f"has model.image_size {variant.image_size}, data.cache_dir {data.cache_dir}, data.format {data.format}; "
            f"give --decode-ms and --video-kb (`{SETTINGS} --manifest LIST` measures them)"
        )
    found = SOURCES[source]
    pyav = data.decoder == "pyav"
    uniform, dense = (found.uniform, found.dense) if pyav else (found.decord_uniform, found.decord_dense)
    place = 1.0
    if data.sampling == "dense":
        span = (variant.frames - 1) * data.stride + 1
        place = min(1.0, max(0.0, (span - MEASURED_SPAN) / (MEASURED_LENGTH - MEASURED_SPAN)))
    return (dense + (uniform - dense) * place) * variant.frames / MEASURED_FRAMES


def count_videos(config: Config, split: str, option: str, given: int | None) -> int:
    """The number given, else that of a recipe's list.

    Raises:
        UserError: neither is there, or the list is wrong.
    """
    if given is not None:
        return given
    path = config.data.train.path if split == "train" else config.data.val.path
    if not storage.are_files([path])[0] and not os.path.isdir(path):
        raise UserError(
            f"data.{split}.path {path} is not here: give {option} N "
            "(Kinetics-400 has about 240000 training and 20000 validation videos)"
        )
    return len(read_split(config.data, "train" if split == "train" else "val").rows)


# --- telling ---------------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """All numbers, each with its unit and where it is from; then the bottleneck and what would relieve it."""
    rows = [*training_rows(plan), *data_rows(plan), *network_rows(plan), *run_rows(plan)]
    lines = [f"  {name:<27}{show(value):>9}  {unit:<15}{origin}" for name, value, unit, origin in rows]
    return "\n".join([heading(plan), *lines, verdict(plan)])


Row = tuple[str, float, str, str]  # name, number, unit, where it is from


def heading(plan: Plan) -> str:
    """The recipe and the machines."""
    cluster = plan.cluster
    nodes = f"{plural(cluster.gpus, 'GPU')} in {plural(cluster.nodes, 'node')} of {cluster.gpu_node_cores} cores"
    if cluster.decode_nodes:
        nodes += f", {plural(cluster.decode_nodes, 'decode node')} of {cluster.decode_node_cores} cores"
    return f"{plan.config.name}: {nodes}, {cluster.gbit:g} Gbit/s"


def training_rows(plan: Plan) -> list[Row]:
    """What the GPUs do."""
    cluster, batch = plan.cluster, plan.config.train.global_batch
    mfu = f"MFU {cluster.mfu:g} ({'assumed, not measured' if cluster.mfu == MFU else GIVEN})"
    peak = f"{cluster.peak / 1e12:g} TFLOP/s ({cluster.peak_from})"
    return [
        ("arithmetic", plan.macs / 1e9, "GMACs a clip", "posmlp.model.cost.count_macs"),
        ("batch on a GPU", batch / cluster.gpus, "clips", f"train.global_batch {batch}"),
        ("GPUs take", plan.limits()[GPUS], "clips/s", f"{TRAIN_FLOPS} FLOPs a MAC, {peak}, {mfu}"),
    ]


def data_rows(plan: Plan) -> list[Row]:
    """From the videos to the object store."""
    limits, cluster, repeats = plan.limits(), plan.cluster, plan.config.data.repeats
    read, tasks = plan.rate / repeats * plan.video_kb / 1e6, plan.rate * plan.clip_bytes / plan.block_bytes
    asked = QUEUED * plan.cores * plan.block_bytes / 1e9
    return [
        ("videos read from storage", read, "GB/s", f"{plan.video_kb:g} KB each, for {plural(repeats, 'clip')}"),
        ("decoding a clip", plan.decode_ms, "ms of a core", plan.decode_from),
        ("cores that decode", plan.cores, "cores", f"{plan.cores_here:g} of a GPU node, all of a decode node"),
        ("they give", limits[DECODING], "clips/s", f"{RAY_SHARE:.0%} decoding: `benchmarks/ingest.py throughput`"),
        ("cores that the GPUs need", plan.cores_needed, "cores", "for all that the GPUs take"),
        ("decode nodes they need", plan.decode_nodes_needed, "nodes", "beside the GPU nodes' cores"),
        ("decode tasks", tasks, "a second", "data.rows_per_block"),
        ("a clip", plan.clip_bytes / 1e6, "MB", "uint8, T x H x W x 3"),
        ("object store", cluster.store_bytes / 1e9, "GB", f"{cluster.store_share:g} of memory, at most 200 a node"),
        ("blocks asked for", asked, "GB", f"at most, {QUEUED} tasks a core"),
        ("the store lets through", limits[STORE], "clips/s", f"{STORE_SHARE:g} of it is for training"),
    ]


def network_rows(plan: Plan) -> list[Row]:
    """A node's network, by what crosses it."""
    limits, ways = plan.limits(), plan.node_bytes(True)
    what = {NETWORK_IN: "clips, videos, gradients", NETWORK_OUT: "clips for others, gradients"}
    parallel, capacity = plan.config.scaling.parallel, plan.cluster.bytes_per_s / 1e9
    rows: list[Row] = [("gradients of a step", plan.gradient_bytes / 1e6, "MB a node", f"fp32, {parallel}, each way")]
    for name, per_clip in ways.items():
        crossing = f"{per_clip / 1e3:,.0f} KB for each clip of the run: {what.get(name, 'clips')}"
        rows.append((name, limits[name], "clips/s", crossing))
        rows.append(("  at the run's rate", plan.rate * per_clip / 1e9, "GB/s", f"of {capacity:g}"))
    return rows


def run_rows(plan: Plan) -> list[Row]:
    """Checkpoints, times, MLflow."""
    config, size, writes = plan.config, plan.checkpoint_bytes / 1e6, plan.checkpoints
    kept = config.train.keep_last + config.train.keep_best
    what = f"{plan.params:,} parameters, AdamW" + ", average" * bool(config.optim.ema)
    samples = (plan.train_s + plan.checkpoints_s) / SAMPLE_S
    values = f"{plan.epoch_values} of an epoch, {plan.sample_values} every {SAMPLE_S:g} s"
    return [
        ("a checkpoint", size, "MB", what),
        ("checkpoints written", writes * size, "MB an epoch", f"{writes:g} an epoch"),
        ("checkpoints kept", kept * size, "MB", "keep_last + keep_best, at most"),
        ("writing them", plan.checkpoints_s, "s an epoch", "at the network's rate; training waits"),
        ("steps", plan.steps, "an epoch", f"{plan.videos:,} videos x {plural(config.data.repeats, 'clip')}"),
        ("training", plan.train_s, "s an epoch", f"at {show(plan.rate)} clips/s"),
        ("validation", plan.val_s, "s each", f"{plan.val_videos:,} videos x {plural(plan.views(False), 'clip')}"),
        ("the run", plan.run_s / 3600, "hours", f"{config.train.epochs} epochs, {plan.validations} validations"),
        ("MLflow in an epoch", 1 + samples, "writes", "its metrics, system metrics; one more with bad videos"),
        ("MLflow in the run", plan.tracking_calls, "writes", "at most, all by the driver (pipelines/tracking.py)"),
        ("MLflow in the run", plan.tracking_values, "values", values),
    ]


def verdict(plan: Plan) -> str:
    """The bottleneck, the next one, and what would relieve it."""
    limits, name = plan.limits(), plan.bottleneck
    second = min((n for n in limits if n != name), key=limits.__getitem__)
    text = f"{name}, {show(plan.rate)} clips/s; next {second}, {show(limits[second])}"
    return f"bottleneck: {text}. What would relieve it: {relief(plan, name)}"


def relief(plan: Plan, name: str) -> str:
    """What would make a part of the system faster."""
    if name == GPUS:
        return "more GPUs, or a higher MFU (train.compile)"
    if name == STORE:
        return "more memory for it (--memory-gb, --store-share), or a smaller data.rows_per_block"
    if name == DECODING:
        text = f"{plural(plan.decode_nodes_needed, 'decode node')} of {plan.cluster.decode_node_cores} cores"
        packed = plan.decode_ms if plan.decode_from == GIVEN else measured_decode_ms(plan.config, "key12")
        if packed < plan.decode_ms:
            pack = "posmlp data shard --short-side 256 --keyframe-interval 12"
            text += f"; or `{pack}` (--source key12), {packed / plan.decode_ms:.0%} of the cores for a clip"
        return text
    others = min(rate for part, rate in plan.limits().items() if part in (GPUS, DECODING, STORE))
    gbit = others * plan.node_bytes(True)[name] * 8 / 1e9
    text = f"{math.ceil(gbit)} Gbit/s a node, with which {show(others)} clips/s would cross"
    if plan.gradient_bytes / plan.config.train.global_batch > plan.node_bytes(True)[name] / 2:
        text += "; or a larger train.global_batch, as most of it is gradients"
    return text


def plural(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}{'s' * (count != 1)}"


def show(value: float) -> str:
    """Readable at any size."""
    if math.isinf(value):
        return "no limit"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
