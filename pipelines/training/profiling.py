"""What a training worker measures of its own process: a trace of some steps, and its peak memory."""

from __future__ import annotations

import gzip
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from posmlp.model.cost import reset_resident_peak

TRACED_STEPS = 3  # after as many warm-up steps
TRACE_FILE = "profile/trace.json.gz"  # MLflow artifact


def start_profiler(device: torch.device, on_trace: Callable[[bytes], None]) -> torch.profiler.profile:
    """Start a profiler that skips ``TRACED_STEPS`` steps to warm up and traces as many.

    Args:
        device: the training device; on a GPU its kernels are traced too.
        on_trace: called once with the trace, a gzipped Chrome trace in JSON.

    Returns:
        The profiler; call its ``step`` after each training step.
    """

    def export(profile: torch.profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profile.export_chrome_trace(str(path))
            on_trace(gzip.compress(path.read_bytes()))

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=TRACED_STEPS, active=TRACED_STEPS, repeat=1)
    profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=export)
    profiler.start()
    return profiler


def reset_peak_memory(device: torch.device) -> None:
    """Reset ``peak_memory_mb``, where the system can: an earlier run in this process no longer counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_resident_peak()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of training so far, MB (1e6 bytes): of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
