"""How far a run is, and what it says of that."""

from __future__ import annotations

from dataclasses import dataclass, field

from posmlp.config import Config

WAIT_LIMIT = 0.2  # share of an epoch that may pass in waiting for clips before the run says what helps


@dataclass
class Progress:
    """How far a run is, beside the weights; plain data, in ``checkpoint.json``. The first worker's counts.

    Attributes:
        history: metrics of each finished epoch.
        steps: done of the running epoch.
        loss, grad_norm: sums over these steps; a gradient that overflowed in fp16 is left out.
        norms: the gradients that are in the sum.
        bad: the running epoch's bad videos so far (``BadVideo``).
        taken_over: its videos that PyAV decoded in place of decord.
        trained: the epoch's metrics so far, when all its steps are done and only validation is left.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    norms: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    taken_over: int = 0
    trained: dict[str, float] = field(default_factory=dict)

    def next_epoch(self, metrics: dict[str, float]) -> Progress:
        """As the next epoch begins."""
        return Progress([*self.history, metrics])


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
