"""``posmlp init``: look at a folder or a list of videos, and write a recipe that trains on it as it stands."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from pipelines.data.scan import ScanProgress
from posmlp import create_model
from posmlp.config import RECIPES, Config, load_recipe
from posmlp.errors import UserError
from posmlp.learn.learner import Learner
from posmlp.model.cost import count_macs, count_params
from posmlp.video.batch import Batch
from posmlp.video.decode import DecodeError, span_of
from posmlp.video.holdout import hash_place
from posmlp.video.isolated import open_isolated
from posmlp.video.manifest import VIDEO_SUFFIXES, Manifest, read_manifest, read_split

LOOK_S = 60.0  # longest look at the videos; of more videos than fit, a sample
TIMEOUT_S = 30.0  # for one video
TIMED_STEPS = 3
BAD_SHOWN = 10
SHARE = 0.2  # of the videos, for validation
LONG_S = 8.0  # of videos with a longer median, a clip shows a part
CLIP_S = 4.0  # seconds that a clip of a long video shows
LARGE = 2000  # from this number of training videos, and with a GPU, a published size of the model
RARE = 3.0  # largest class over the smallest, from which classes are balanced
CROP_STRETCH = 1.2  # how much wider or higher than the frames a training crop may be
# The first line of a list of boxes (``posmlp.detection.lists``): video, second, four fractions, action, and one more
BOX_LINE = re.compile(r"[^,]+,\s*[0-9]+(,\s*[01]?(\.[0-9]*)?){4},\s*(-1|[0-9]*)(,[^,]*)?")
MAX_CACHE_GB = 20.0  # decoded frames of all videos together that may be cached
# As in the recipe small_data: weights of the package fit it.
SMALL_MODEL = {"name": "tiny", "dims": [32, 64, 96, 128], "depths": [1, 1, 2, 1], "groups": [8, 8, 8, 16]}
PACKAGED_WEIGHTS = "posmlp:motion"


@dataclass
class Look:
    """What a look at the videos has found.

    Attributes:
        videos: number of videos in the lists.
        seen: number of videos that were opened.
        sizes: width and height of each good one, in pixels.
        frames, seconds, rates: number of frames of each, and, where known, its length and its frames per second.
        codecs: how many have each codec.
        decode_s: mean seconds of one core to open a video and decode three of its frames.
        bad: URI and reason of each bad one.
    """

    videos: int
    seen: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    codecs: Counter[str] = field(default_factory=Counter)
    decode_s: float = 0.0
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Lists:
    """The lists of a recipe, as they stand in it.

    Attributes:
        train: the training list, a path.
        val: the validation list, or the share of the training videos.
        test: the test list, if there is one.
        group_by: as in the recipe.
    """

    train: str
    val: str | float
    test: str | None = None
    group_by: str | None = None


def init(path: str, out: str | None = None, group_by: str | None = None) -> str:
    """Write a recipe for the videos of a folder or a list; returns what was found and proposed, as text.

    Args:
        path: a folder with a folder of videos per class, or with such folders ``train`` and ``val`` (and ``test``); or
            a list of videos.
        out: the recipe's file; None: ``NAME.yaml`` in the current folder, after the folder or list.
        group_by: as ``data.group_by``.

    Raises:
        UserError: the file exists or cannot be written, or the videos cannot be trained on.
    """
    if path.lower().endswith(VIDEO_SUFFIXES) and not os.path.isdir(path):
        raise UserError(
            f"{path} is one video; give a folder with a folder of videos for each class, or a list of videos"
        )
    name = recipe_name(out or path)
    file = Path(out or f"{name}.yaml")
    if file.exists():
        raise UserError(f"{file} exists; choose another file with --out, or remove it")
    refuse_boxes(path)
    lists = find_lists(path, group_by)
    manifest = read_manifest(lists.train)
    refuse_unfit(path, manifest)
    look = look_at(manifest)
    if not look.sizes:
        raise UserError(
            f"none of the {look.seen} videos of {path} can be read; the first, {look.bad[0][0]}: {look.bad[0][1]}"
        )
    tree = propose(name, lists, manifest, look)
    text = recipe_text(tree, comments(tree, lists, manifest, look), f"posmlp init {shlex.quote(path)}")
    try:
        with file.open("x") as opened:
            opened.write(text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); choose another file with --out") from error
    try:
        config = load_recipe(file)
        parts = [*describe_look(path, manifest, look), *describe_recipe(config, look), f"{file} is written. Next:"]
    except BaseException:  # the lists do not fit the proposal, as a group of videos for each class; or Ctrl-C
        file.unlink()
        raise
    return "\n".join([*parts, f"  posmlp train {shlex.quote(str(file))}"])


# --- the data ------------------------------------------------------------------------------------------------------


def recipe_name(path: str) -> str:
    """The name of a recipe and its run: that of the folder, list or recipe, as far as a name allows."""
    stem = os.path.basename(path.rstrip("/"))
    stem = os.path.splitext(stem)[0] if os.path.isfile(path) or stem.endswith((".yaml", ".yml")) else stem
    letters = "".join(c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))  # no accents
    return re.sub(r"[^A-Za-z0-9_]+", "-", letters).strip("-_") or "mine"


def find_lists(path: str, group_by: str | None) -> Lists:
    """The lists of a data set: the folders ``train`` and ``val`` if there are both, otherwise a share for validation.

    Raises:
        UserError: there are both, and ``group_by``.
    """
    train, val, test = (os.path.join(path, name) for name in ("train", "val", "test"))
    if os.path.isdir(train) and os.path.isdir(val):
        if group_by:
            raise UserError(f"{path} is split already, into train and val; leave out --group-by")
        return Lists(train, val, test if os.path.isdir(test) else None)
    return Lists(path, SHARE, group_by=group_by)


def refuse_unfit(path: str, manifest: Manifest) -> None:
    """Raise a UserError for data that a recipe for videos does not fit: images, or one class."""
    if len(manifest.classes) < 2:
        raise UserError(f"{path} has one class, {manifest.classes[0]!r}; sort the videos into a folder for each class")
    if set(manifest.rows["frames"].to_pylist()) == {1}:
        raise UserError(f"{path} has images; init is for videos. `posmlp recipes copy in1k_s FILE` starts with images")


def refuse_boxes(path: str) -> None:
    """Raise a UserError for a list of boxes, in CSV or Parquet, or a label map: they are for action detection."""
    if not os.path.isfile(path):
        return
    with open(path, "rb") as file:
        first = file.readline(10_000).decode(errors="replace").strip()
    found = path.endswith(".pbtxt") or bool(BOX_LINE.fullmatch(first))
    if path.endswith(".parquet"):
        with contextlib.suppress(pa.ArrowException, OSError):  # reported when the list is read
            found = {"boxes", "actions"} <= {*pq.read_schema(path).names}
    if found:
        raise UserError(
            f"{path} has boxes of action detection; init is for recognition. `posmlp recipes copy ava_s16 FILE` starts "
            "with boxes"
        )


def look_at(manifest: Manifest) -> Look:
    """Open the videos and decode three frames of each, in random order, for at most ``LOOK_S`` seconds."""
    rows = sorted(manifest.rows.to_pylist(), key=lambda row: hash_place(row["sample_id"], 0))
    look, progress, busy = Look(len(rows)), ScanProgress(len(rows), "looked at"), 0.0
    for row in rows:
        if progress.seconds > LOOK_S:
            break
        start = time.perf_counter()
        try:
            with open_isolated(row["uri"], row["frames"], timeout_s=TIMEOUT_S, span=span_of(row)) as video:
                info = video.info
                height, width = video.read(sorted({0, info.frames // 2, info.frames - 1})).shape[1:3]
        except DecodeError as error:
            look.bad.append((row["uri"], error.reason))
        else:
            look.sizes.append((width, height))
            look.frames.append(info.frames)
            look.codecs[info.codec] += 1
            if info.fps:
                look.rates.append(info.fps)
                look.seconds.append(info.frames / info.fps)
            busy += time.perf_counter() - start
        look.seen += 1
        progress.add(1)
    look.decode_s = busy / max(1, len(look.sizes))
    return look


# --- the recipe ----------------------------------------------------------------------------------------------------


def propose(name: str, lists: Lists, manifest: Manifest, look: Look) -> dict[str, Any]:
    """The recipe as a tree of plain data."""
    videos, large = len(manifest.rows), len(manifest.rows) > LARGE and torch.cuda.is_available()
    frames = 16 if np.median(look.frames) >= 16 else 8
    model: dict[str, Any] = {"name": f"s{frames}"} if large else {**SMALL_MODEL, "frames": frames, "image_size": 64}
    if not large and frames == 16 and (RECIPES.parent / "weights" / "motion.safetensors").exists():
        model["weights"] = PACKAGED_WEIGHTS
    data: dict[str, Any] = {"train": lists.train, "val": lists.val}
    data |= {"test": lists.test} if lists.test else {}
    data |= {"group_by": lists.group_by} if lists.group_by else {}
    if look.seconds and np.median(look.seconds) > LONG_S:
        data |= {"sampling": "dense", "fps": frames / CLIP_S}
    if not large:
        data["modality"] = "rgb_difference"
        low, high = np.percentile([width / height for width, height in look.sizes], [5, 95])
        data |= {"full_frame": True, "crop_scale": [0.5, 1.0]}
        data["crop_ratio"] = [round(float(low) / CROP_STRETCH, 2), round(float(high) * CROP_STRETCH, 2)]
        if "sampling" not in data:
            data |= {"clip_share": [0.75, 1.2], "pace": 0.8}
    if max_over_min(manifest) >= RARE:
        data["balance"] = "sampling"
    if cache_gb(model, manifest, look) < MAX_CACHE_GB:
        data["cache_dir"] = f"cache/{name}"
    training = videos * (1 - lists.val) if isinstance(lists.val, float) else videos
    batch = next((size for size in (32, 16, 8) if training >= 16 * size), 4 if training >= 8 else 2)
    epochs = 40 if training < 1000 else 30 if training < 10_000 else 20
    tree: dict[str, Any] = {"name": name, "model": model, "data": data}
    if large:
        tree["augment"] = {"randaug_layers": 2, "erasing": 0.25}
        tree["optim"] = {"lr": 4e-4, "lr_batch": 128, "warmup_epochs": 3, "label_smoothing": 0.1, "clip_grad": 20.0}
        tree["scaling"] = {"micro_batch": 8}
    else:
        tree["augment"] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "mixup": 0.4}
        tree["optim"] = {"lr": 1.5e-3, "warmup_epochs": 3, "label_smoothing": 0.1, "ema": 0.99}
        tree["scaling"] = {"cpus_per_worker": 0.5, "threads_per_worker": 1}
    tree["train"] = {"epochs": epochs, "global_batch": batch} | ({"precision": "bf16"} if large else {})
    return tree


def max_over_min(manifest: Manifest) -> float:
    """Number of videos of the largest class over that of the smallest that occurs."""
    counts = np.bincount(manifest.rows["label"].to_numpy())
    return float(counts.max() / counts[counts > 0].min())


def cache_gb(model: dict[str, Any], manifest: Manifest, look: Look) -> float:
    """Size of the decoded frames of all videos, in 10^9 bytes; None of them is enlarged."""
    side = -(-model.get("image_size", 224) * 8 // 7)
    shares = [min(1.0, side / min(size)) ** 2 * size[0] * size[1] * 3 for size in look.sizes]
    return len(manifest.rows) * float(np.mean(np.array(shares) * look.frames)) / 1e9


def comments(tree: dict[str, Any], lists: Lists, manifest: Manifest, look: Look) -> dict[str, str]:
    """Why the recipe has its values, by key."""
    model = tree["model"]
    found = {
        "model": "a published size" if "dims" not in model else "small: quick, and enough for few videos",
        "augment": "no flip: it exchanges left and right",
        "train": "train.epochs=10 for a first try",
        "data.modality": "frame differences: with few videos a model memorises the backgrounds",
        "data.full_frame": "validation sees whole frames, training at least half of one",
        "data.crop_ratio": "width : height of a training crop, around that of the frames",
        "data.clip_share": "training clips vary the timing, of which few videos show little",
        "data.balance": f"the largest class has {max_over_min(manifest):.0f} times the videos of the smallest",
        "data.cache_dir": f"each video is decoded once; {cache_gb(model, manifest, look):.2g} GB",
        "data.test": "for `posmlp evaluate NAME --split test` alone",
        "data.sampling": f"the median video has {np.median(look.seconds or [0]):.3g} s",
        "data.fps": f"so that a clip shows {CLIP_S:g} s of any video",
        "data.group_by": "no group is on both sides",
    }
    if isinstance(lists.val, float):
        found["data.val"] = "a share of each class, the same videos in every run"
    if "weights" in model:
        found["model"] += "; starts from weights that know motion"
    return found


def recipe_text(tree: dict[str, Any], comments: dict[str, str], command: str) -> str:
    """The recipe as commented YAML, one line for a section, or for each key of ``data``.

    Args:
        comments: by full key.
        command: that made it.
    """
    lines = [f"# Made by `{command}`. `posmlp recipes show FILE` prints every key with its value."]

    def line(key: str, value: Any) -> str:
        text = (
            yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000, allow_unicode=True)
            .removesuffix("\n...\n")
            .strip()
        )
        section, _, name = key.rpartition(".")
        comment = f" # {comments[key]}" if key in comments else ""
        return f"{'  ' * bool(section)}{name}: {text}{comment}"

    for key, value in tree.items():
        if key == "data":
            lines += ["data:", *(line(f"data.{name}", each) for name, each in value.items())]
        else:
            lines.append(line(key, value))
    return "\n".join(lines) + "\n"


# --- what is said --------------------------------------------------------------------------------------------------


def describe_look(path: str, manifest: Manifest, look: Look) -> list[str]:
    """Lines about the videos: how many, how large, how long, which are bad."""
    counts = np.bincount(manifest.rows["label"].to_numpy(), minlength=len(manifest.classes))
    lines = [f"{path}: {look.videos} videos of {len(counts)} classes, {counts.min()} to {counts.max()} of a class"]
    if len(counts) <= 20:
        lines.append("  " + ", ".join(f"{name} {n}" for name, n in zip(manifest.classes, counts, strict=True)))
    seen = "all" if look.seen == look.videos else f"{look.seen}, a random sample,"
    lines.append(f"  looked at {seen}: {len(look.bad)} bad")
    here = os.getcwd() + os.sep
    lines += [f"    {uri.removeprefix(here)}: {reason}" for uri, reason in look.bad[:BAD_SHOWN]]
    if len(look.bad) > BAD_SHOWN:
        lines.append(f"    ... and {len(look.bad) - BAD_SHOWN} more")
    if look.bad or look.seen < look.videos:
        check = f"posmlp data check {shlex.quote(path)} --out check"
        lines.append(f"    `{check}` decodes every frame of all and lists the good ones")
    widths, heights = zip(*look.sizes, strict=True)
    parts = [f"{between(widths)} x {between(heights)} pixels", f"{between(look.frames)} frames"]
    parts += [f"{between(look.seconds)} s", f"{between(look.rates)} frames/s"] if look.seconds else []
    lines.append(f"  {', '.join(parts)}; {', '.join(f'{codec} {n}' for codec, n in look.codecs.most_common())}")
    return lines


def between(values: Sequence[float]) -> str:
    """The smallest and the largest of some numbers."""
    low, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def describe_recipe(config: Config, look: Look) -> list[str]:
    """Lines about the split, the model, and what training takes here.

    Raises:
        UserError: a list is wrong, or leaves no video for a split.
    """
    train, val = (len(read_split(config.data, name).rows) for name in ("train", "val"))
    own = f"data.val: {config.data.val.share:g}, the same videos in every run" if config.data.val.share else "as given"
    with torch.device("meta"):
        params = count_params(create_model(config.model.name, num_classes=2, **config.model.overrides()))
    variant = config.model.variant()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step_s, steps = measure_step_s(config, device), train // config.train.global_batch
    cores = max(1.0, (os.cpu_count() or 1) - config.scaling.cpus_per_worker)
    first_s = max(steps * step_s, train * look.decode_s / cores)
    later_s = steps * step_s if config.data.cache_dir else first_s
    total_s = first_s + (config.train.epochs - 1) * later_s
    size = f"{variant.frames} frames of {variant.image_size} x {variant.image_size}"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    gmacs, epochs = count_macs(variant) / 1e9, config.train.epochs
    cost = (
        f"{step_s:.2g} s for a step of {config.train.global_batch} clips, {look.decode_s * 1e3:.0f} ms to open a video"
    )
    return [
        f"split: {train} videos for training, {val} for validation ({own})",
        f"model: {config.model.name}, {params / 1e6:.2g} M parameters, {gmacs:.2g} GMACs for a clip of {size}; "
        f"starts from {config.model.weights or 'random weights'}",
        f"cost here ({where}): {cost}; {epochs} epochs of {steps} steps take about {total_s / 60:.1f} min",
    ]


def measure_step_s(config: Config, device: torch.device) -> float:
    """Seconds of a training step of the recipe on random clips, without the first one: the fastest of some."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.scaling.threads_per_worker or threads)
    variant, batch = config.model.variant(), config.train.global_batch
    side = variant.image_size
    clips = torch.randint(0, 256, (batch, variant.frames, side, side, 3), dtype=torch.uint8)
    random = Batch(clips, torch.zeros(batch, dtype=torch.int64), torch.ones(batch), torch.arange(batch)).to(device)
    model = create_model(config.model.name, **config.model.overrides()).to(device)
    learner, taken = Learner(model, config, 100), []
    for _ in range(1 + TIMED_STEPS):
        start = time.perf_counter()
        learner.train_step(random)
        taken.append(time.perf_counter() - start)  # a step ends with the loss on the CPU
    torch.set_num_threads(threads)
    return min(taken[1:])
