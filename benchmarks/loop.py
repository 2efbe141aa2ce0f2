"""The host's time of a training step before the model, and how fast the loop keeps a device busy.

With PyTorch on a CPU, launching an operation is computing it. So the host's own work (drawing and packing random
parameters, copying clips) is measured as it is. The launches of the augmentation are measured on clips of one frame of
8x8 pixels, where computing takes next to nothing: the same operators, on the same path through Python. The augmentation
of whole clips is work of the device; it is shown for the CPU. The former ways of drawing random numbers run between the
others.

The loop (``--device-ms``) has the real prefetching of batches, agreement of workers, host's part of the augmentation
and late reading of results. A stand-in for the device takes a fixed time for each step and works through its queue in
order, as a CUDA stream does. Decoded clips come from memory, read-only as from Ray's object store; a second copy, into
memory that is used again, stands in for the one into pinned memory. Without a device the loop shows how fast a worker
makes batches. What launching the model costs the host needs a GPU (``benchmarks/gpu.py``).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.training.agreement import Action, AgreedBatches
from posmlp.config import Config, load_recipe
from posmlp.tasks import task_of
from posmlp.video import augment
from posmlp.video.batch import Batch
from posmlp.video.prefetch import prefetch
from posmlp.video.random_bits import normals

SMALL_FRAME = 8  # pixels
LOOP_STEPS = 100  # of which the first ten do not count
BATCHES_IN_MEMORY = 4
WAIT = "wait for the device"
RUNS = 5  # of each part for one batch; their median counts
CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that do work on a device; views and reads of properties do none."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.count[str(function)] += 1
        return function(*args, **(kwargs or {}))


def random_batch(clips: int, frames: int, side: int, seed: int) -> Batch:
    """A batch of noise in frames of ``side`` pixels; the seeds do not depend on the size."""
    rng = np.random.default_rng(seed)
    seeds = torch.from_numpy(rng.integers(0, 2**63 - 1, clips))
    pixels = torch.from_numpy(rng.integers(0, 256, (clips, frames, side, side, 3), dtype=np.uint8))
    return Batch(pixels, torch.arange(clips), torch.ones(clips), seeds)


def parts(config: Config, batch: Batch, small: Batch) -> dict[str, Callable[[], object]]:
    """What is timed, by its name in the table."""
    settings, repeats, side = config.augment, config.data.repeats, batch.clips.shape[2]
    host = augment.draw_parameters(batch.seeds, settings, side, side, repeats)
    arrays = [*host.arrays.values(), *(array for each in host.passes for array in each[1:])]
    flipped = torch.arange(config.model.variant().num_classes)
    keys = [erasure.key for erasure in host.erasures]
    volume = 3 * batch.clips.shape[1]
    boxes = [erasure.box for erasure in host.erasures]
    counts = [volume * box.height * box.width for box in boxes]
    read_only = batch.clips.numpy().view()
    read_only.flags.writeable = False
    rngs = [np.random.default_rng(seed) for seed in batch.seeds.tolist()]
    return {
        "host: random parameters": lambda: augment.draw_parameters(batch.seeds, settings, side, side, repeats),
        "host: pack and send them": lambda: augment.send(arrays, CPU),
        "host: all of the augmentation, one frame of 8x8": lambda: augment.to_train_input(small, config, flipped),
        "host: copy a read-only batch": lambda: torch.from_numpy(read_only.copy()),
        "device: noise of the erased boxes": lambda: normals(keys, counts, CPU),
        "device: augmentation of whole clips": lambda: augment.to_train_input(batch, config, flipped),
        "before, host: random streams": lambda: [np.random.default_rng(s).spawn(5) for s in batch.seeds.tolist()],
        "before, host: noise of the erased boxes": lambda: numpy_noise(rngs, counts),
    }


def numpy_noise(rngs: list[np.random.Generator], counts: list[int]) -> list[Tensor]:
    """The noise of the erased boxes from NumPy's generators."""
    return [
        torch.from_numpy(rng.standard_normal(count, dtype=np.float32)) for rng, count in zip(rngs, counts, strict=False)
    ]


class StandInDevice:
    """Works through a queue of steps, each of which takes a fixed time."""

    def __init__(self, step_s: float):
        self.step_s, self.queue = step_s, SimpleQueue[Event | None]()
        self.thread = Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        free_at = 0.0
        while (done := self.queue.get()) is not None:
            free_at = max(free_at, time.perf_counter()) + self.step_s
            time.sleep(max(0.0, free_at - time.perf_counter()))
            done.set()

    def start_step(self) -> Event:
        """Queue a step; the event is set when it is done."""
        done = Event()
        self.queue.put(done)
        return done


def decoded(config: Config, clips: int, rank: int) -> Iterator[Batch]:
    """Batches without end, as the loader makes them from decoded clips in Ray's object store."""
    variant, columns = config.model.variant(), []
    for number in range(BATCHES_IN_MEMORY):
        batch = random_batch(clips, variant.frames, variant.image_size, 1000 * rank + number)
        pixels = batch.clips.numpy()[:, None].view()
        pixels.flags.writeable = False
        text = np.full(clips, "", object)
        columns.append(
            {
                "clip": pixels,
                "row": np.arange(clips),
                "real": np.ones(clips, bool),
                "seeds": list(batch.seeds.numpy()[:, None]),
                "reason": text,
            }
        )
    task, table = task_of(config), pa.table({"label": np.zeros(clips, np.int32)})
    pinned = [torch.empty_like(batch.clips) for _ in range(BATCHES_IN_MEMORY)]
    for number in itertools.count():
        batch = task.collate(columns[number % BATCHES_IN_MEMORY], table, config, train=True)
        yield replace(batch, clips=pinned[number % BATCHES_IN_MEMORY].copy_(batch.clips))


def run_loop(config: Config, clips: int, rank: int, device_s: float) -> dict[str, float]:
    """The loop of a training worker.

    Returns:
        Milliseconds of each part on the training thread, and of a whole step, by name; means over the steps.
    """
    small = random_batch(clips, 1, SMALL_FRAME, rank)
    flipped = torch.arange(config.model.variant().num_classes)
    device, pending = StandInDevice(device_s), None
    names = ("batch and agreement", "augmentation", "start the step", WAIT)
    spent = dict.fromkeys(names, 0.0)
    with closing(prefetch(decoded(config, clips, rank), CPU)) as ahead:
        batches = AgreedBatches(ahead, LOOP_STEPS, lambda: Action.CONTINUE, lambda reason: None)
        for step in range(LOOP_STEPS):
            if step == LOOP_STEPS // 10:
                begin, spent = time.perf_counter(), dict.fromkeys(spent, 0.0)
            times = [time.perf_counter()]
            batches.action()
            batch = batches.take()
            times.append(time.perf_counter())
            augment.to_train_input(replace(small, seeds=batch.seeds), config, flipped)
            times.append(time.perf_counter())
            started = device.start_step()
            times.append(time.perf_counter())
            if pending:
                pending.wait()
            pending = started
            times.append(time.perf_counter())
            for name, (before, after) in zip(spent, itertools.pairwise(times), strict=True):
                spent[name] += after - before
    counted = LOOP_STEPS - LOOP_STEPS // 10
    device.queue.put(None)
    whole = {"a step": time.perf_counter() - begin, "device": device_s * counted}
    return {name: 1e3 * total / counted for name, total in (spent | whole).items()}


def print_loop(config: Config, clips: int, ranks: int, device_ms: float) -> None:
    """Run the loop with the clips of each of several workers, one after another, and print the slowest."""
    results = [run_loop(config, clips, rank, device_ms / 1e3) for rank in range(ranks)]
    slowest = max(results, key=lambda found: found["a step"])
    host = sum(v for k, v in slowest.items() if k not in ("a step", "device", WAIT))
    print(f"\nThe loop, a device of {device_ms:g} ms a step, the slowest of {ranks} workers' clips:\n")
    print("| on the training thread | mean ms |\n|---|---|")
    for name, value in slowest.items():
        if name not in ("device", "a step"):
            print(f"| {name} | {value:.2f} |")
    print(f"| a step in all | {slowest['a step']:.2f} |")
    print(f"| host in all, without waiting | {host:.2f} |")
    share = slowest["device"] / slowest["a step"]
    print(f"\nThe loop has {share:.1%} of the device's rate, {1e3 * clips / slowest['a step']:.0f} clips/s a worker.")
    alone = max(run_loop(config, clips, rank, 0.0)["a step"] for rank in range(ranks))
    print(f"Without a device a step takes {alone:.2f} ms, {1e3 * clips / alone:.0f} clips/s a worker.")


def seconds(function: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Print a Markdown table of milliseconds, over batches, and the number of operators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="k400_s16", help="model size and augmentation (default: k400_s16)")
    parser.add_argument("--clips", type=int, default=16, help="clips of one worker (default: 16)")
    parser.add_argument("--repeats", type=int, default=10, help="different batches that are timed (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: 1)")
    parser.add_argument("--host-only", action="store_true", help="leave out the augmentation of whole clips")
    parser.add_argument("--device-ms", type=float, default=26.0, help="a step of the stand-in device (default: 26)")
    parser.add_argument("--ranks", type=int, default=8, help="workers whose clips go through the loop (default: 8)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = load_recipe(options.recipe, [])
    frames, side = config.model.variant().frames, config.model.variant().image_size
    times: dict[str, list[float]] = {}
    for seed in range(-1, options.repeats):  # the first is a warm-up
        batch = random_batch(options.clips, frames, side, seed + 1)
        small = random_batch(options.clips, 1, SMALL_FRAME, seed + 1)
        for name, function in parts(config, batch, small).items():
            if options.host_only and "whole clips" in name:
                continue
            taken = [seconds(function) for _ in range(1 if "whole clips" in name else RUNS)]
            if seed >= 0:
                times.setdefault(name, []).append(1e3 * statistics.median(taken))
    with Operators() as operators:
        augment.to_train_input(small, config, torch.arange(config.model.variant().num_classes))
    print(f"{options.clips} clips of {frames}x{side}x{side}, recipe {options.recipe}, {options.threads} thread(s)\n")
    print("| part of a step | median ms | fastest | slowest |\n|---|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    print(f"\nThe last batch's augmentation runs {operators.count.total()} operators that are not views.")
    print_loop(config, options.clips, options.ranks, options.device_ms)


if __name__ == "__main__":
    main()
