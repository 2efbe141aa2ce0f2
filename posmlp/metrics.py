"""The names of the metrics that a run, a study or an evaluation logs.

Metrics are plain dicts of floats under these names. They reach MLflow, a run's ``run.json`` and checkpoints, and the
tables of a study, so a name must not change once it is here. Shares and accuracies are 0 to 1. Not all names that end
in ``_mb`` have the same unit: ``data/*`` counts in MiB (2^20 bytes, as Ray does), the others in MB (10^6 bytes).

The metrics of a live run for Prometheus have names of their own (``pipelines.tracking.prometheus``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Progress (the training workers) -------------------------------------------------------------------------------------
EPOCH = "epoch"  # number of finished epochs, from 1; logged with the metrics of each epoch

# Validation after an epoch, over all videos of the split (posmlp.learn.evaluation.ClassificationMetrics) --------------
VAL = "val/"  # prefix
VAL_LOSS = "val/loss"  # mean cross-entropy of a video's prediction, nats
VAL_TOP1 = "val/top1"  # share of videos whose likeliest class is right
VAL_TOP5 = "val/top5"  # share of videos whose class is among the five likeliest
VAL_CLASS_MEAN = "val/class_mean"  # mean of the classes' own top-1, over the classes that occur
VAL_BEST_TOP1 = "val/best_top1"  # highest val/top1 of the epochs so far
VAL_BEST_EPOCH = "val/best_epoch"  # the epoch that has it, the newest of several, as for checkpoints
VAL_VIDEOS = "val/clips"  # number of videos scored (not of clips): a video counts once, however many views it has

# Of action detection, over all key frames of the split (posmlp.tasks.detection) -------------------------------
VAL_MAP = "val/map"  # frame mAP at IoU 0.5 (posmlp.detection.frame_map), over the classes with ground truth
VAL_MAP_OF = "val/map_"  # prefix; a group of classes follows: pose, object or person
VAL_MAP_SLOWFAST = "val/map_slowfast"  # by the rule of SlowFast's code; `posmlp evaluate` alone computes it
VAL_BEST_MAP = "val/best_map"  # highest val/map of the epochs so far; val/best_epoch has it
VAL_KEY_FRAMES = "val/key_frames"  # number of key frames scored
VAL_BOXES = "val/boxes"  # number of their boxes


class MainMetric(NamedTuple):
    """The metric by which a task's models are compared: higher is better, 0 to 1.

    Attributes:
        key, best: its name, and that of its highest value in the epochs so far.
        title: its name for users.
        samples, unit: the metric that has the number of samples, and what they are.
        is_mean: it is a mean over the samples, so that it is known how it varies with them.
    """

    key: str
    best: str
    title: str
    samples: str
    unit: str
    is_mean: bool

    @property
    def name(self) -> str:
        """The name without its prefix, as in columns, tags and names of metrics of a study."""
        return self.key.removeprefix(VAL)


MAIN_METRICS = {  # by the recipe's task
    "recognition": MainMetric(VAL_TOP1, VAL_BEST_TOP1, "top-1", VAL_VIDEOS, "videos", is_mean=True),
    "detection": MainMetric(VAL_MAP, VAL_BEST_MAP, "mAP", VAL_KEY_FRAMES, "key frames", is_mean=False),
}


def main_metric(metrics: Mapping[str, float]) -> MainMetric | None:
    """The main metric of the task whose metrics these are; None if they are not of a validation."""
    return next((main for main in MAIN_METRICS.values() if main.key in metrics), None)


# Training in an epoch (the training workers) -------------------------------------------------------------------------
TRAIN_LOSS = "train/loss"  # mean over the steps, nats. Every epoch has it.
TRAIN_GRAD_NORM = "train/grad_norm"  # mean 2-norm of the gradient before it is clipped
TRAIN_WORKERS = "train/workers"  # number of training workers
TRAIN_LR = "train/lr"  # learning rate of the last step

# Training by optimizer step (the training workers). MLflow's step is the optimizer's; all other metrics are by epoch.
# MLflow's pages sort groups of charts by name, so this group comes first.
BY_STEP_TRAIN_LOSS = "by_step/train_loss"  # mean over the steps since the last point, nats
BY_STEP_LR = "by_step/lr"  # learning rate of the step
BY_STEP_CLIPS_PER_S = "by_step/clips_per_s"  # since the last point, over all workers, without validation
BY_STEP = (BY_STEP_TRAIN_LOSS, BY_STEP_LR, BY_STEP_CLIPS_PER_S)

# Speed of training in an epoch (the training workers) ----------------------------------------------------------------
PERF_STEPS_PER_S = "perf/steps_per_s"  # optimizer steps per second
PERF_CLIPS_PER_S = "perf/clips_per_s"  # over all workers
PERF_TFLOPS = "perf/tflops"  # 10^12 operations/s over all workers (posmlp.model.cost.TRAIN_FLOPS_PER_MAC)
PERF_MFU = "perf/mfu"  # share of the devices' peak; left out where the peak is not known
PERF_MEMORY_MB = "perf/memory_mb"  # peak of the first worker, MB: of its GPU, or of its process on a CPU
PERF_DATA_WAIT_FRAC = (
    "perf/data_wait_frac"  # share of the time after the first batch spent waiting for clips, mean over workers
)
PERF_FIRST_BATCH_S = "perf/first_batch_s"  # seconds until the epoch's first batch, while the decoders start
PERF_EPOCH_S = "perf/epoch_s"  # seconds of the training part of the epoch

# Data in an epoch (the training workers) -----------------------------------------------------------------------------
DATA_BAD = "data/bad"  # number of videos that could not be decoded
DATA_DECODED_BY_PYAV = "data/decoded_by_pyav"  # number of videos where PyAV replaced decord (data.decoder decord)
DATA_OBJECT_STORE_MB = "data/object_store_mb"  # MiB: largest use of the cluster's object store that was seen
DATA_SPILLED_MB = "data/spilled_mb"  # MiB: moved from the object store to disk in the epoch

# Cost of a model for one clip (posmlp.model.cost), measured at the start of a run. They are params of its MLflow run.
# A study's trials have metrics instead: their latency is measured twice, and MLflow orders params as text -------------
COST = "cost/"  # prefix
COST_PARAMS_M = "cost/params_m"  # parameters, in millions
COST_GMACS = "cost/gmacs"  # multiply-accumulates, in 10^9
COST_LATENCY_MS = "cost/latency_ms"  # median of a forward pass of one clip
COST_CLIPS_PER_S = "cost/clips_per_s"  # of forward passes in batches
COST_PEAK_MB = "cost/peak_mb"  # MB: peak memory of such a pass on top of weights and clips; where known

# The costs that a study can weigh against its main metric, by their names on the command line
COSTS = {"latency": COST_LATENCY_MS, "gmacs": COST_GMACS, "params": COST_PARAMS_M}

# A study (its driver, in the study's own MLflow run; the step is the number of finished trials). ``MainMetric.name``
# follows STUDY_BEST and STUDY_FRESH: study/best_top1, study/best_map ------------------------------------------------
STUDY = "study/"  # prefix
STUDY_FINISHED = "study/finished"  # number of finished trials
STUDY_HYPERVOLUME = (
    "study/hypervolume"  # of the Pareto front of the main metric and a cost, as a share of the largest cost
)
STUDY_BEST = "study/best_"  # prefix; highest reported value: mean over fresh seeds, else that of one seed
PUBLISHED_LATENCY_MS = "published.latency_ms/"  # prefix; a published variant's name follows: its cost/latency_ms
# In the MLflow run of a member's first trial, once it has fresh seeds (those after its first seed)
STUDY_FRESH = "study/fresh_"  # prefix; mean of the main metric over the fresh seeds
STUDY_FRESH_LOW = "study/fresh_low"  # lower end of its 95 % interval over seeds and, for top-1, validation videos
STUDY_FRESH_HIGH = "study/fresh_high"  # upper end
STUDY_FRESH_SEEDS = "study/fresh_seeds"  # number of fresh seeds
STUDY_FRONT_PROBABILITY = (
    "study/front_probability"  # of being on the Pareto front of the main metric and the study's cost
)

# A study of folds (its driver, in the study's own MLflow run; the step is the number of finished trials). Predictions
# are pooled over the folds and scored once per seed; the value is the mean over seeds. A name may end in _deviation for
# the standard deviation over seeds. Those of one data set are folds/NAME/uf1 ------------------------------------------
FOLDS = "folds/"  # prefix
FOLDS_FINISHED = "folds/finished"  # number of finished trials, a fold with a seed each
ACCURACY = "accuracy"  # after the prefix: share of videos whose likeliest class is right
UF1 = "uf1"  # unweighted F1: mean of the classes' F1
UAR = "uar"  # unweighted average recall: mean of the classes' accuracies
ACCURACY_SHUFFLED = "accuracy_shuffled"  # accuracy on clips whose frames are shuffled, a control without motion
FOLDS_MEAN_ACCURACY = "folds/mean_accuracy"  # mean over folds of each fold's accuracy

# A supernet (the scoring of its members, in the supernet's MLflow run) -----------------------------------------------
SUPERNET_BEST_TOP1 = "supernet/best_top1"  # highest top-1 of a member with the shared weights
SUPERNET_SPEARMAN = "supernet/spearman"  # rank correlation of members' top-1: shared weights, and trained alone
SUPERNET_KENDALL = "supernet/kendall"  # likewise, Kendall's tau

# `posmlp evaluate` (in the run's MLflow run, at the checkpoint's step): the prefix, then loss, top1, top5, class_mean
# and videos (the number of videos) ------------------------------------------------------------------------------------
TEST = "test/"  # of the validation split
TEST_TRAIN = "test_train/"  # of the training split
HELD_OUT = "held_out/"  # of the test split, data.test

# Machines: MLflow's own names behind this prefix, such as system/cpu_utilization_percentage (the driver samples them
# every 10 s), and system/NODE/... of each node of a cluster -----------------------------------------------------------
SYSTEM = "system/"
