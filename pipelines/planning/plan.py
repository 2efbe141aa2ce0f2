"""Estimate what a recipe needs on a cluster that does not have to exist. Pure arithmetic: nothing is started.

Each part of the system has a highest rate in training clips per second: the GPUs, the two threads of each training
worker, the cores that decode, the object store, the network into and out of a GPU node, and the network of a decode
node. The parts work at the same time, so the slowest one sets the rate of the run. No Ray is needed. Each constant is
measured (the command is named), taken from the code (a test compares them), or assumed; ``format_plan`` says which.
docs/scale.md lists what is left out.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.planning.measured_gpu import COMMAND as MEASURE_GPU_COMMAND
from pipelines.planning.measured_gpu import MeasuredGpu, MeasuredStep, read_measured_gpu
from posmlp import create_model, metrics, storage
from posmlp.config import Config, load_recipe
from posmlp.errors import UserError
from posmlp.model.cost import EVAL_FLOPS_PER_MAC, PEAKS, TRAIN_FLOPS_PER_MAC, count_macs, count_params
from posmlp.tasks import task_of
from posmlp.text import quantity
from posmlp.video.draws import epoch_length

# GPUs
ASSUMED_MFU = 0.15  # share of the peak that training reaches; benchmarks/gpu.py measures it

# The training loop, with 16 clips of 16x224x224 a step and a stand-in for the GPU (benchmarks/loop.py; docs/results.md)
LOOP_CLIPS = 16
LOOP_CLIP_BYTES = 16 * 224 * 224 * 3
LOOP_SHARE = 0.99  # of the rate of a GPU that takes 26 ms a step
LOOP_HOST_MS = 4.6  # work of a step on the training thread, without launching the model's kernels
LOOP_BATCH_MS = 7.2  # a step if the GPU takes no time: the prefetching thread copies a batch

# Data
RAY_DECODE_SHARE = 0.96  # of a core's time under Ray Data: 14.2 / 14.8 (benchmarks/data_loading.py throughput)
OBJECT_STORE_SHARE = 0.25  # of the object store is for training (pipelines.data.loader)
DECODE_TASKS_PER_CPU = 2  # running or waiting (pipelines.data.loader)
RAY_MAX_STORE_GB = 200.0  # largest object store that Ray gives a node by default (ray._private.ray_constants)

# MLflow
SYSTEM_SAMPLE_S = 10.0  # seconds between two samples of system metrics (pipelines.tracking.node_monitors)
MAX_PARAMS = 100  # parameters in one call (pipelines.tracking.mlflow_client)
TRAIN_METRICS = 9  # values per epoch (Worker.training_metrics in pipelines.training.worker)
THROUGHPUT_METRICS = 4  # values per epoch without perf/mfu (Worker.throughput_metrics)
EPOCH_METRICS = 2  # values per epoch without data/decoded_by_pyav (Worker.run_epoch)
VAL_METRICS = 7  # of recognition (ClassificationMetrics.metrics and best_so_far)
MAX_STEP_POINTS = 500  # of each metric by step in a run (pipelines.training.progress)
SEND_STEPS_S = 3.0  # seconds between two writes of metrics by step (pipelines.training.progress)
NODE_METRICS = 8  # values in a node's sample of system metrics, without its GPUs (mlflow.system_metrics)
GPU_METRICS = 5  # values in that sample for each GPU (mlflow.system_metrics)
START_WRITES = 5  # create the run, store config.yaml, set the status, log the cost and the lists; params are apart
END_WRITES = 7  # two plots, the classes, the videos, the description, the last sample of system metrics, the status
MODEL_WRITES = 5  # create the model, its outputs, its files, finalize it, its metrics
LINK_WRITES = (
    3  # create the logged model of a checkpoint, finalize it, its metrics; the run's outputs are counted apart
)

# The clips and videos that VIDEO_STORAGE was measured with
MEASURED_CLIP_FRAMES = 16
MEASURED_IMAGE_SIZE = 224  # pixels
MEASURED_DENSE_SPAN = 31  # frames of the video from the first to the last frame of a dense clip
MEASURED_VIDEO_FRAMES = 300


@dataclass(frozen=True)
class VideoStorage:
    """Measured costs of one way to store videos.

    Attributes:
        video_kb: size of a video (10 s, 340x256, H.264), in 1000 bytes.
        uniform_ms, dense_ms: milliseconds of one core to decode a clip of 16 frames of 224x224 with PyAV, by sampling.
        decord_uniform_ms, decord_dense_ms: the same with decord.
    """

    video_kb: float
    uniform_ms: float
    dense_ms: float
    decord_uniform_ms: float
    decord_dense_ms: float


MEASURE_COMMAND = "python benchmarks/data_loading.py settings"
# By the value of --source. Measured on one core of an AMD EPYC (Zen 5) by MEASURE_COMMAND; also in docs/results.md.
VIDEO_STORAGE = {
    "as-is": VideoStorage(581, 69, 43, 92, 63),
    "shard": VideoStorage(583, 68, 41, 94, 63),
    "key250": VideoStorage(716, 75, 51, 113, 75),
    "key32": VideoStorage(785, 67, 27, 112, 75),
    "key12": VideoStorage(907, 48, 24, 119, 80),
    "key4": VideoStorage(1372, 35, 27, 153, 101),
}

GIVEN = "given"  # origin of a number that the user gave

# Parts of the system
GPUS = "GPUs"
TRAINING_THREADS = "training threads"
PREFETCH_THREADS = "prefetching threads"
DECODING = "decoding"
OBJECT_STORE = "object store"
NETWORK_IN = "network into a GPU node"
NETWORK_OUT = "network out of a GPU node"
NETWORK_DECODE = "network of a decode node"


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes of a cluster. All nodes of a kind are alike; a decode node has no GPU.

    Attributes:
        gpus, gpus_per_node: number of GPUs; each runs one training worker.
        gpu_node_cores, decode_nodes, decode_node_cores: number of decode nodes, and of the CPU cores that Ray counts
            on a node of each kind.
        gbit: network of a node in each direction, 1e9 bits per second.
        memory_gb, store_share: memory of a node, in 1e9 bytes, and the share of it that is Ray's object store.
        peak_flops, peak_origin: peak of one GPU, in operations per second, and where the number is from.
        mfu: share of the peak that training reaches.
        measured: what was measured on such a GPU, in place of the peak and the share.

    Raises:
        UserError: the GPUs do not fill the nodes, or a share is not above 0 and at most 1.
    """

    gpus: int
    gpus_per_node: int = 8
    gpu_node_cores: int = 96
    decode_nodes: int = 0
    decode_node_cores: int = 64
    gbit: float = 100.0
    memory_gb: float = 256.0
    store_share: float = 0.3
    peak_flops: float = PEAKS["H100"]
    peak_origin: str = "H100, data sheet"
    mfu: float = ASSUMED_MFU
    measured: MeasuredGpu | None = None

    def __post_init__(self) -> None:
        if self.gpus % self.gpus_per_node:
            raise UserError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}; change --gpus, --gpus-per-node or --nodes"
            )
        for name, value in (("--mfu", self.mfu), ("--store-share", self.store_share)):
            if not 0 < value <= 1:
                raise UserError(f"{name} {value:g} is a share; give a number above 0 and at most 1")

    @property
    def gpu_nodes(self) -> int:
        """Return the number of GPU nodes."""
        return self.gpus // self.gpus_per_node

    @property
    def store_bytes(self) -> float:
        """Return the bytes of the object stores of all nodes together."""
        return (self.gpu_nodes + self.decode_nodes) * min(self.memory_gb * self.store_share, RAY_MAX_STORE_GB) * 1e9

    @property
    def network_bytes_per_s(self) -> float:
        """Return the bytes per second of a node's network, in each direction."""
        return self.gbit * 1e9 / 8


@dataclass(frozen=True)
class RunPlan:
    """Estimates for one run of a recipe on a cluster. Rates are clips per second of the whole cluster.

    Attributes:
        config: the recipe, with one worker for each GPU.
        cluster: the nodes.
        videos, val_videos: number of videos in the training and the validation split.
        decode_ms, decode_origin: milliseconds of one core to decode a clip, and where the number is from.
        video_kb: size of a video, in 1000 bytes.
        macs: multiply-accumulates of a forward pass of one clip.
        num_params: number of values in all parameters.
        num_param_tensors: number of parameter tensors.
        buffer_bytes: bytes of the model's buffers.
    """

    config: Config
    cluster: ClusterSpec
    videos: int
    val_videos: int
    decode_ms: float
    video_kb: float
    decode_origin: str
    macs: int
    num_params: int
    num_param_tensors: int
    buffer_bytes: int

    # --- cores and bytes -----------------------------------------------------------------------------------------

    @property
    def decode_cores_per_gpu_node(self) -> float:
        """Return the cores of one GPU node that training leaves for decoding."""
        training_cores = self.cluster.gpus_per_node * self.config.scaling.cpus_per_worker
        return max(0.0, self.cluster.gpu_node_cores - training_cores)

    @property
    def decode_cores(self) -> float:
        """Return the cores of the whole cluster that decode."""
        cluster = self.cluster
        return cluster.gpu_nodes * self.decode_cores_per_gpu_node + cluster.decode_nodes * cluster.decode_node_cores

    @property
    def clip_bytes(self) -> int:
        """Return the bytes of a decoded clip, uint8 ``[T, H, W, 3]``."""
        variant = self.config.model.variant()
        return variant.frames * variant.image_size**2 * 3

    @property
    def block_bytes(self) -> int:
        """Return the bytes that one training decode task returns."""
        repeats = self.config.data.repeats
        return max(1, self.config.data.rows_per_block // repeats) * repeats * self.clip_bytes

    @property
    def gradient_bytes(self) -> float:
        """Return the bytes of gradients that enter each node, and leave it, in one training step.

        Gradients are fp32 and travel in a ring over all GPUs that enters and leaves a node once. FSDP also gathers the
        weights, twice for each micro-batch.
        """
        if self.cluster.gpu_nodes == 1:
            return 0.0
        passes, scaling = 2, self.config.scaling
        if scaling.parallel == "fsdp":
            passes = 1 + 2 * self.micro_batches
        return passes * (self.cluster.gpus - 1) / self.cluster.gpus * 4 * self.num_params

    @property
    def checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint's tensors.

        They are the evaluation weights, AdamW's two moments and counters and, with EMA, the live weights.
        """
        weights = 4 * self.num_params + self.buffer_bytes
        moments = 2 * 4 * self.num_params + 4 * self.num_param_tensors
        return weights + moments + (weights if self.config.optim.ema else 0)

    def network_bytes_per_clip(self, train: bool) -> dict[str, float]:
        """Return the bytes that cross a node's network for each clip of the whole cluster, by network.

        Decode tasks run on any free core, so a node's share of the decoding is its share of the decoding cores.
        """
        node_share = self.decode_cores_per_gpu_node / self.decode_cores
        video_bytes = 1000 * self.video_kb / self.clips_per_video(train)
        gradient_bytes = self.gradient_bytes / self.config.train.global_batch if train else 0.0
        nodes = self.cluster.gpu_nodes
        found = {
            NETWORK_IN: self.clip_bytes * (1 - node_share) / nodes + video_bytes * node_share + gradient_bytes,
            NETWORK_OUT: self.clip_bytes * node_share * (1 - 1 / nodes) + gradient_bytes,
        }
        if self.cluster.decode_nodes:
            node_share = self.cluster.decode_node_cores / self.decode_cores
            found[NETWORK_DECODE] = max(self.clip_bytes, video_bytes) * node_share
        return found

    def clips_per_video(self, train: bool) -> int:
        """Return the number of clips of a video, which are decoded together."""
        return self.config.data.repeats if train else self.config.eval.clips * self.config.eval.crops

    # --- the training loop ---------------------------------------------------------------------------------------

    @property
    def worker_batch(self) -> float:
        """Return the number of clips of a worker in a step."""
        return self.config.train.global_batch / self.cluster.gpus

    @property
    def micro_batches(self) -> int:
        """Return the number of micro-batches of a worker in a step."""
        return math.ceil(self.worker_batch / (self.config.scaling.micro_batch or self.worker_batch))

    @property
    def measured_step(self) -> MeasuredStep | None:
        """Return what was measured of a training step on such a GPU, eager or compiled as the recipe says."""
        measured = self.cluster.measured
        if measured is None:
            return None
        return measured.compiled if self.config.train.compile else measured.eager

    @property
    def gpu_flops(self) -> float:
        """Return the operations per second of one GPU in a training step, without the loop around it."""
        return self.measured_step.flops if self.measured_step else self.cluster.peak_flops * self.cluster.mfu

    @property
    def gpu_ms(self) -> float:
        """Return the milliseconds of a GPU in a step."""
        return 1e3 * self.worker_batch * TRAIN_FLOPS_PER_MAC * self.macs / self.gpu_flops

    @property
    def host_ms(self) -> float:
        """Return the milliseconds of a worker's training thread in a step. It works while the GPU does."""
        measured = self.measured_step and self.measured_step.host_ms
        return self.micro_batches * (measured or LOOP_HOST_MS)

    @property
    def prefetch_ms(self) -> float:
        """Return the milliseconds of a worker's prefetching thread in a step. It works while the GPU does."""
        return LOOP_BATCH_MS * self.worker_batch / LOOP_CLIPS * self.clip_bytes / LOOP_CLIP_BYTES

    @property
    def loop_share(self) -> float:
        """Return the share of the GPUs' rate that the training loop keeps."""
        return (self.measured_step and self.measured_step.loop_share) or LOOP_SHARE

    # --- rates and times -----------------------------------------------------------------------------------------

    def max_rates(self, train: bool = True) -> dict[str, float]:
        """Return the highest rate of each part of the system, in clips per second."""
        cluster = self.cluster
        flops = (TRAIN_FLOPS_PER_MAC if train else EVAL_FLOPS_PER_MAC) * self.macs
        per_ms = 1000 * self.config.train.global_batch  # a rate is this over the milliseconds of a step
        core_rate = RAY_DECODE_SHARE * 1000 / self.decode_ms
        tasks_that_fit = cluster.store_bytes * OBJECT_STORE_SHARE / self.block_bytes
        rates = {
            GPUS: self.loop_share * cluster.gpus * self.gpu_flops / flops,
            PREFETCH_THREADS: per_ms / self.prefetch_ms,
            DECODING: self.decode_cores * core_rate,
            OBJECT_STORE: tasks_that_fit * core_rate,
        }
        if train:
            rates[TRAINING_THREADS] = per_ms / self.host_ms
        for network, size in self.network_bytes_per_clip(train).items():
            rates[network] = cluster.network_bytes_per_s / size if size else math.inf
        return rates

    @property
    def bottleneck(self) -> str:
        """Return the slowest part of the system in training."""
        rates = self.max_rates()
        return min(rates, key=rates.__getitem__)

    @property
    def rate(self) -> float:
        """Return the training clips per second."""
        return min(self.max_rates().values())

    @property
    def decode_cores_needed(self) -> float:
        """Return the number of decoding cores with which the GPUs do not wait for clips."""
        return self.max_rates()[GPUS] * self.decode_ms / 1000 / RAY_DECODE_SHARE

    @property
    def decode_nodes_needed(self) -> int:
        """Return the number of decode nodes for the needed cores that the GPU nodes do not have."""
        missing = self.decode_cores_needed - self.cluster.gpu_nodes * self.decode_cores_per_gpu_node
        return max(0, math.ceil(missing / self.cluster.decode_node_cores))

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of training steps in an epoch."""
        return self.videos // (self.config.train.global_batch // self.config.data.repeats)

    @property
    def train_epoch_s(self) -> float:
        """Return the seconds of the training steps of one epoch."""
        return self.steps_per_epoch * self.config.train.global_batch / self.rate

    @property
    def validation_s(self) -> float:
        """Return the seconds of one validation."""
        return self.val_videos * self.clips_per_video(False) / min(self.max_rates(train=False).values())

    @property
    def validations(self) -> int:
        """Return the number of validations in the run."""
        epochs, every = self.config.train.epochs, self.config.eval.every
        return epochs // every + (epochs % every > 0)

    @property
    def checkpoints_per_epoch(self) -> float:
        """Return the mean number of checkpoints written in an epoch: one at its end, and those within it."""
        train, steps, epochs = self.config.train, self.steps_per_epoch, self.config.train.epochs
        every, minutes = train.checkpoint_every_steps, train.checkpoint_every_minutes
        if not every:
            return 1.0 + (int(self.train_epoch_s / (60 * minutes)) if minutes else 0)
        return 1 + (epochs * steps // every - epochs * steps // math.lcm(every, steps)) / epochs

    @property
    def checkpoint_s_per_epoch(self) -> float:
        """Return the seconds to write an epoch's checkpoints at the network's rate.

        One worker writes, and all workers wait for it.
        """
        return self.checkpoints_per_epoch * self.checkpoint_bytes / self.cluster.network_bytes_per_s

    @property
    def run_s(self) -> float:
        """Return the seconds of the whole run."""
        epoch_s = self.train_epoch_s + self.checkpoint_s_per_epoch
        return self.config.train.epochs * epoch_s + self.validations * self.validation_s

    # --- MLflow --------------------------------------------------------------------------------------------------

    @property
    def values_per_epoch(self) -> int:
        """Return the number of metric values of an epoch with validation."""
        mfu, decord = self.config.train.precision != "fp32", self.config.data.decoder == "decord"
        return TRAIN_METRICS + THROUGHPUT_METRICS + EPOCH_METRICS + VAL_METRICS + mfu + decord

    @property
    def step_points(self) -> int:
        """Return the number of points of the metrics by step in a run."""
        steps = self.steps_per_epoch * self.config.train.epochs
        return steps // math.ceil(steps / MAX_STEP_POINTS)

    @property
    def step_writes(self) -> int:
        """Return an upper bound of the writes of metrics by step in a run."""
        return min(self.step_points, int(self.run_s / SEND_STEPS_S) + self.config.train.epochs)

    @property
    def system_samples(self) -> int:
        """Return the number of samples of system metrics in a run, without the last one."""
        return int(self.run_s / SYSTEM_SAMPLE_S)

    @property
    def values_per_system_sample(self) -> int:
        """Return the number of values in a sample of system metrics, if the driver runs on a GPU node.

        A sample has the values of the driver's node and, in a cluster of several nodes, those of every node.
        """
        cluster = self.cluster
        gpu_node = NODE_METRICS + GPU_METRICS * cluster.gpus_per_node
        if cluster.gpu_nodes + cluster.decode_nodes == 1:
            return gpu_node
        return gpu_node + cluster.gpu_nodes * gpu_node + cluster.decode_nodes * NODE_METRICS

    @property
    def mlflow_writes(self) -> int:
        """Return an upper bound of the writes to MLflow in a run.

        Each epoch is assumed to have a bad video, and MLflow to be fast enough that no two writes are joined.
        """
        params = math.ceil(len(self.config.flat()) / MAX_PARAMS)
        model = MODEL_WRITES if self.config.tracking.log_model else 0
        kept = min(self.config.train.keep_last + self.config.train.keep_best, self.config.train.epochs)
        epochs = 3 * self.config.train.epochs + self.step_writes
        return START_WRITES + params + epochs + self.system_samples + END_WRITES + model + LINK_WRITES * kept + 1

    @property
    def mlflow_values(self) -> int:
        """Return the number of metric values that a run writes to MLflow."""
        epochs = self.config.train.epochs
        values = epochs * self.values_per_epoch - (epochs - self.validations) * VAL_METRICS
        values += len(metrics.BY_STEP) * self.step_points
        return values + (self.system_samples + 1) * self.values_per_system_sample


# --- making a plan ---------------------------------------------------------------------------------------------------


def make_cluster_spec(
    gpus: int,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu: str | None = None,
    tflops: float | None = None,
    mfu: float | None = None,
    measured: str | None = None,
    **rest: float,
) -> ClusterSpec:
    """Return the cluster that the options of the command line describe.

    Args:
        gpus: number of GPUs.
        nodes, gpus_per_node: give at most one of them; the default is 8 GPUs per node, or all if there are fewer.
        gpu, tflops: a name in ``posmlp.model.cost.PEAKS`` (None: H100), or the peak of a GPU in 1e12 operations per
            second.
        mfu: share of the peak that training reaches; None: ``ASSUMED_MFU``.
        measured: path for ``read_measured_gpu``, in place of ``gpu``, ``tflops`` and ``mfu``.
        rest: other fields of ``ClusterSpec``.

    Raises:
        UserError: the numbers do not fit together, the GPU's peak is not known, or as ``read_measured_gpu``.
    """
    if measured and (gpu or tflops or mfu):
        raise UserError("--measured has the rate of the GPU; leave out --gpu, --tflops and --mfu")
    gpu = gpu or "H100"
    if nodes and gpus % nodes:
        raise UserError(f"{gpus} GPUs do not spread evenly over {nodes} nodes; change --gpus or --nodes")
    if tflops is None and gpu not in PEAKS:
        raise UserError(f"the peak of {gpu!r} is not known; give --tflops, or one of {', '.join(PEAKS)} for --gpu")
    peak_flops, peak_origin = (tflops * 1e12, GIVEN) if tflops else (PEAKS[gpu], f"{gpu}, data sheet")
    per_node = gpus // nodes if nodes else gpus_per_node or min(8, gpus)
    fields: dict[str, Any] = rest
    return ClusterSpec(
        gpus,
        per_node,
        peak_flops=peak_flops,
        peak_origin=peak_origin,
        mfu=mfu or ASSUMED_MFU,
        measured=read_measured_gpu(measured) if measured else None,
        **fields,
    )


def make_plan(
    recipe: str,
    overrides: list[str],
    cluster: ClusterSpec,
    *,
    videos: int | None = None,
    val_videos: int | None = None,
    source: str = "as-is",
    decode_ms: float | None = None,
    video_kb: float | None = None,
) -> RunPlan:
    """Return the estimates for a recipe on a cluster.

    Args:
        recipe, overrides: as for ``load_recipe``; ``scaling.workers`` becomes the number of GPUs.
        cluster: the nodes.
        videos, val_videos: number of videos; None counts the recipe's own lists.
        source: how the videos are stored, a name in ``VIDEO_STORAGE``.
        decode_ms, video_kb: measured by the user; None takes the values of ``source``.

    Raises:
        UserError: the recipe cannot run on this cluster, or a number is missing.
    """
    try:
        whole_gpus = [f"scaling.workers={cluster.gpus}", "scaling.gpus_per_worker=1", "scaling.use_gpu=true"]
        config = load_recipe(recipe, [*overrides, *whole_gpus])
    except UserError as error:
        before = load_recipe(recipe, overrides)
        batch = before.train.global_batch // before.scaling.workers * cluster.gpus
        text = f"{error}\n  with scaling.workers={cluster.gpus}, one worker per GPU; train.global_batch={batch} "
        raise UserError(f"{text}would keep the recipe's number of clips per worker") from error
    if config.train.precision == "fp32" and cluster.peak_origin != GIVEN:
        raise UserError("train.precision is fp32, and only rates of half precision are known; give --tflops")
    if source not in VIDEO_STORAGE:
        raise UserError(f"--source {source!r} was not measured; choose one of {', '.join(VIDEO_STORAGE)}")
    if config.model.choices:
        raise UserError("model.choices trains many models at once, and a plan is for one model; leave it out")
    variant = config.model.variant()
    with torch.device("meta"):
        model = create_model(config.model.name, **config.model.overrides())
    decode_origin = GIVEN
    if decode_ms is None:
        decode_ms = measured_decode_ms(config, source)
        decode_origin = f"{source}: docs/results.md, `{MEASURE_COMMAND}`"
    plan = RunPlan(
        config,
        cluster,
        count_videos(config, "train", "--videos", videos),
        count_videos(config, "val", "--val-videos", val_videos),
        decode_ms,
        VIDEO_STORAGE[source].video_kb if video_kb is None else video_kb,
        decode_origin,
        count_macs(variant),
        count_params(model),
        len(list(model.parameters())),
        sum(b.numel() * b.element_size() for b in model.buffers()),
    )
    if cluster.measured and not plan.measured_step:
        compiled = str(config.train.compile).lower()
        raise UserError(
            f"train.compile is {compiled}, and {cluster.measured.path} has no time of such a step of our model; "
            f"give `{MEASURE_GPU_COMMAND}` more --minutes"
        )
    if plan.decode_cores < 1:
        raise UserError(
            f"{cluster.gpus_per_node} workers x {config.scaling.cpus_per_worker:g} CPUs leave no core of a GPU node "
            "for decoding; give --decode-nodes or more --cores, or lower scaling.cpus_per_worker"
        )
    if not plan.steps_per_epoch:
        raise UserError(
            f"train.global_batch {config.train.global_batch} is more than the "
            f"{plan.videos * config.data.repeats} training clips; give that or less"
        )
    return plan


def measured_decode_ms(config: Config, source: str) -> float:
    """Return the milliseconds of one core to decode a clip, from ``VIDEO_STORAGE``.

    Dense clips were measured with stride 2, over 31 frames of the video. A longer dense clip is assumed to lie between
    that and a uniform clip, which covers the whole video, in proportion to its length. The time is assumed to be
    proportional to the number of frames.

    Raises:
        UserError: no similar clip was measured.
    """
    data, variant = config.data, config.model.variant()
    if variant.image_size != MEASURED_IMAGE_SIZE or data.cache_dir or data.format in ("images", "ssv1"):
        raise UserError(
            f"decoding was measured for clips of {MEASURED_IMAGE_SIZE} pixels from videos without a cache, and this "
            f"recipe has model.image_size {variant.image_size}, data.cache_dir {data.cache_dir}, data.format "
            f"{data.format}; give --decode-ms and --video-kb (`{MEASURE_COMMAND} --manifest LIST` measures them)"
        )
    costs = VIDEO_STORAGE[source]
    uniform_ms, dense_ms = costs.uniform_ms, costs.dense_ms
    if data.decoder != "pyav":
        uniform_ms, dense_ms = costs.decord_uniform_ms, costs.decord_dense_ms
    uniform_share = 1.0
    if data.sampling == "dense":
        span = (variant.frames - 1) * data.stride + 1
        uniform_share = (span - MEASURED_DENSE_SPAN) / (MEASURED_VIDEO_FRAMES - MEASURED_DENSE_SPAN)
        uniform_share = min(1.0, max(0.0, uniform_share))
    return (dense_ms + (uniform_ms - dense_ms) * uniform_share) * variant.frames / MEASURED_CLIP_FRAMES


def count_videos(config: Config, split: str, option: str, given: int | None) -> int:
    """Return the given number of videos, or else the length of the recipe's list.

    Raises:
        UserError: no number is given, and the list does not exist or is wrong.
    """
    if given is not None:
        return given
    paths = {name: config.data.list_of(name) for name in ("train", "val")}
    here = {name: storage.are_files([path])[0] or os.path.isdir(path) for name, path in paths.items()}
    if not here[split]:
        raise UserError(
            f"data.{split}.path {paths[split]} does not exist here: give {option} N "
            "(Kinetics-400 has about 240000 training and 20000 validation videos)"
        )
    task = task_of(config)
    known = task.training_classes(config) if split == "val" and here["train"] else None
    rows = task.read_split(config, "train" if split == "train" else "val", known).rows
    return epoch_length(rows, config.data.balance) if split == "train" else len(rows)


# --- printing a plan -------------------------------------------------------------------------------------------------

TableRow = tuple[str, float, str, str]  # label, number, unit, where the number is from


def format_plan(plan: RunPlan) -> str:
    """Return the text that ``posmlp plan`` prints: the nodes, the verdict, then a line for each number."""
    rows = [*gpu_rows(plan), *data_rows(plan), *network_rows(plan), *run_rows(plan)]
    lines = [f"  {label:<27}{format_number(value):>9}  {unit:<15}{origin}" for label, value, unit, origin in rows]
    verdict = f"run time {format_number(plan.run_s / 3600)} hours; {describe_bottleneck(plan)}"
    return "\n".join([describe_cluster(plan), verdict, *lines])


def describe_cluster(plan: RunPlan) -> str:
    """Return the first line: the recipe's name and the nodes."""
    cluster = plan.cluster
    nodes = f"{quantity(cluster.gpus, 'GPU')} in {quantity(cluster.gpu_nodes, 'node')}"
    nodes += f" of {cluster.gpu_node_cores} cores"
    if cluster.decode_nodes:
        nodes += f", {quantity(cluster.decode_nodes, 'decode node')} of {cluster.decode_node_cores} cores"
    return f"{plan.config.name}: {nodes}, {cluster.gbit:g} Gbit/s per node"


def gpu_rows(plan: RunPlan) -> list[TableRow]:
    """Return the lines for the GPUs and the training loop."""
    cluster, rates, measured = plan.cluster, plan.max_rates(), plan.measured_step
    on_gpu, on_cpu = cluster.measured and cluster.measured.origin, "measured: `benchmarks/loop.py`"
    mfu = f"MFU {cluster.mfu:g} ({'assumed, not measured' if cluster.mfu == ASSUMED_MFU else GIVEN})"
    speed = f"{cluster.peak_flops / 1e12:g} TFLOP/s ({cluster.peak_origin}), {mfu}"
    if measured:
        speed = f"{measured.flops / 1e12:.4g} TFLOP/s ({on_gpu})"
    host = on_gpu if measured and measured.host_ms else f"{on_cpu}, without launching kernels"
    share = on_gpu if measured and measured.loop_share else on_cpu
    batch = f"train.global_batch {plan.config.train.global_batch}"
    return [
        ("forward pass of the model", plan.macs / 1e9, "GMACs/clip", "posmlp.model.cost.count_macs"),
        ("batch of a GPU", plan.worker_batch, "clips", batch + f", in {quantity(plan.micro_batches, 'micro-batch')}"),
        ("step on the GPU", plan.gpu_ms, "ms", f"{TRAIN_FLOPS_PER_MAC} FLOPs per MAC, {speed}"),
        ("  on the training thread", plan.host_ms, "ms", f"meanwhile ({host})"),
        ("  on the prefetching thread", plan.prefetch_ms, "ms", f"meanwhile ({on_cpu})"),
        ("GPU rate", rates[GPUS], "clips/s", f"{plan.loop_share:.0%} of that in the training loop ({share})"),
    ]


def data_rows(plan: RunPlan) -> list[TableRow]:
    """Return the lines for storage, decoding and the object store."""
    rates, cluster, repeats = plan.max_rates(), plan.cluster, plan.config.data.repeats
    read_gb_per_s = plan.rate / repeats * plan.video_kb / 1e6
    tasks_per_s = plan.rate * plan.clip_bytes / plan.block_bytes
    store_gb_needed = DECODE_TASKS_PER_CPU * plan.decode_cores * plan.block_bytes / 1e9
    per_node = f"{plan.decode_cores_per_gpu_node:g} of a GPU node, all of a decode node"
    decode_share = f"{RAY_DECODE_SHARE:.0%} of a core's time: `benchmarks/data_loading.py throughput`"
    return [
        (
            "video storage reads",
            read_gb_per_s,
            "GB/s",
            f"{plan.video_kb:g} KB per video, for {quantity(repeats, 'clip')}",
        ),
        ("decode time", plan.decode_ms, "core ms/clip", plan.decode_origin),
        ("decode cores", plan.decode_cores, "cores", per_node),
        ("decode rate", rates[DECODING], "clips/s", decode_share),
        ("decode cores needed", plan.decode_cores_needed, "cores", "to reach the GPU rate"),
        ("decode nodes needed", plan.decode_nodes_needed, "nodes", "in addition to the GPU nodes"),
        ("decode tasks", tasks_per_s, "tasks/s", "data.rows_per_block"),
        ("clip size", plan.clip_bytes / 1e6, "MB", "uint8, T x H x W x 3"),
        (
            "object store",
            cluster.store_bytes / 1e9,
            "GB",
            f"{cluster.store_share:g} of memory, at most 200 GB per node",
        ),
        ("object store needed", store_gb_needed, "GB", f"at most, {DECODE_TASKS_PER_CPU} tasks per core"),
        ("object store rate", rates[OBJECT_STORE], "clips/s", f"{OBJECT_STORE_SHARE:g} of the store for training"),
    ]


def network_rows(plan: RunPlan) -> list[TableRow]:
    """Return the lines for the gradients and for each network of a node."""
    rates, capacity = plan.max_rates(), plan.cluster.network_bytes_per_s / 1e9
    contents = {NETWORK_IN: "clips, videos, gradients", NETWORK_OUT: "clips for other nodes, gradients"}
    parallel = f"fp32, {plan.config.scaling.parallel}, in each direction"
    rows: list[TableRow] = [("gradients", plan.gradient_bytes / 1e6, "MB/node/step", parallel)]
    for network, size in plan.network_bytes_per_clip(True).items():
        origin = f"{size / 1e3:,.0f} KB per clip of the run: {contents.get(network, 'clips')}"
        rows.append((network, rates[network], "clips/s", origin))
        rows.append(("  at the run's rate", plan.rate * size / 1e9, "GB/s", f"of {capacity:g}"))
    return rows


def run_rows(plan: RunPlan) -> list[TableRow]:
    """Return the lines for checkpoints, times and MLflow."""
    config, checkpoint_mb, writes = plan.config, plan.checkpoint_bytes / 1e6, plan.checkpoints_per_epoch
    kept = config.train.keep_last + config.train.keep_best
    contents = f"{plan.num_params:,} parameters, AdamW" + ", EMA" * bool(config.optim.ema)
    samples = (plan.train_epoch_s + plan.checkpoint_s_per_epoch) / SYSTEM_SAMPLE_S
    per_epoch = 2 + samples + plan.step_writes / config.train.epochs  # 2: the metrics, the description
    steps = f"{plan.videos:,} videos x {quantity(config.data.repeats, 'clip')}"
    validation = f"{plan.val_videos:,} videos x {quantity(plan.clips_per_video(False), 'clip')}"
    by_step = f"{len(metrics.BY_STEP)} x {plan.step_points} by step"
    system = f"{plan.values_per_system_sample} every {SYSTEM_SAMPLE_S:g} s"
    values = f"{plan.values_per_epoch} per epoch, {by_step}, {system}"
    return [
        ("checkpoint size", checkpoint_mb, "MB", contents),
        ("checkpoints written", writes * checkpoint_mb, "MB/epoch", f"{writes:g} per epoch"),
        ("checkpoints kept", kept * checkpoint_mb, "MB", "at most train.keep_last + train.keep_best"),
        ("checkpoint time", plan.checkpoint_s_per_epoch, "s/epoch", "at the network's rate; training waits"),
        ("steps", plan.steps_per_epoch, "steps/epoch", steps),
        ("training time", plan.train_epoch_s, "s/epoch", f"at {format_number(plan.rate)} clips/s"),
        ("validation time", plan.validation_s, "s/validation", validation),
        ("run time", plan.run_s / 3600, "hours", f"{config.train.epochs} epochs, {plan.validations} validations"),
        ("MLflow writes per epoch", per_epoch, "writes", "metrics, by step, of machines; one more with bad videos"),
        ("MLflow writes per run", plan.mlflow_writes, "writes", "at most, all by the driver (pipelines/tracking)"),
        ("MLflow values per run", plan.mlflow_values, "values", values),
    ]


def describe_bottleneck(plan: RunPlan) -> str:
    """Describe the bottleneck, the next one, and what would remove the first."""
    rates, part = plan.max_rates(), plan.bottleneck
    second = min((name for name in rates if name != part), key=rates.__getitem__)
    text = f"{part}, {format_number(plan.rate)} clips/s; next {second}, {format_number(rates[second])} clips/s"
    return f"bottleneck: {text}. To remove it: {suggest_change(plan, part)}"


def suggest_change(plan: RunPlan, part: str) -> str:
    """Return what would make a part of the system faster."""
    if part == GPUS:
        return "more GPUs, or a higher MFU (train.compile)"
    if part == TRAINING_THREADS:
        return "a larger train.global_batch or scaling.micro_batch, or train.compile"
    if part == PREFETCH_THREADS:
        return "more GPUs, each with its threads, or faster memory"
    if part == OBJECT_STORE:
        return "a larger object store (--memory-gb, --store-share), or a smaller data.rows_per_block"
    if part == DECODING:
        text = f"{quantity(plan.decode_nodes_needed, 'decode node')} of {plan.cluster.decode_node_cores} cores"
        packed_ms = plan.decode_ms if plan.decode_origin == GIVEN else measured_decode_ms(plan.config, "key12")
        if packed_ms < plan.decode_ms:
            command = "posmlp data shard --short-side 256 --keyframe-interval 12"
            text += f"; or `{command}` (--source key12), {packed_ms / plan.decode_ms:.0%} of the decode time"
        return text
    bytes_per_clip = plan.network_bytes_per_clip(True)[part]
    other_rates = min(rate for name, rate in plan.max_rates().items() if "network" not in name)
    gbit = other_rates * bytes_per_clip * 8 / 1e9
    text = f"{math.ceil(gbit)} Gbit/s per node, enough for {format_number(other_rates)} clips/s"
    if plan.gradient_bytes / plan.config.train.global_batch > bytes_per_clip / 2:
        text += "; or a larger train.global_batch, because most of the traffic is gradients"
    return text


def format_number(value: float) -> str:
    """Return a number with four digits, or with all digits before the point."""
    if math.isinf(value):
        return "no limit"
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
