"""What ``benchmarks/gpu.py`` has measured on a GPU, for ``posmlp plan --measured``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posmlp.errors import UserError
from posmlp.model.cost import TRAIN_FLOPS_PER_MAC, count_macs
from posmlp.model.spec import model_variant

COMMAND = "python benchmarks/gpu.py"
HOST_ALONE = "host alone, clips of 32 x 32"  # a row of its loop


@dataclass(frozen=True)
class MeasuredStep:
    """A training step in bf16. What was not measured is None.

    Attributes:
        flops: operations per second of the bare step.
        loop_share: share of the bare step's rate that the training loop reaches.
        host_ms: milliseconds of a step on the training thread, in which it launches all kernels.
    """

    flops: float
    loop_share: float | None = None
    host_ms: float | None = None


@dataclass(frozen=True)
class MeasuredGpu:
    """Results on one GPU.

    Attributes:
        path: the file.
        device: name of the GPU.
        eager, compiled: the training step, by ``train.compile``; None: not measured.
    """

    path: str
    device: str
    eager: MeasuredStep | None
    compiled: MeasuredStep | None

    @property
    def origin(self) -> str:
        """Where the numbers are from."""
        return f"measured: {self.device}, {self.path}"


def read_measured_gpu(path: str) -> MeasuredGpu:
    """Read the ``gpu.json`` of ``COMMAND``.

    Raises:
        UserError: it cannot be read, is another file, was made with ``--tiny``, or has a number that cannot be one.
    """
    try:
        record = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"--measured {path}: {error.strerror}; `{COMMAND}` writes it as gpu.json") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"--measured {path} is not JSON; give the gpu.json that `{COMMAND}` writes") from error
    try:
        device, tiny, macs = str(record["about"]["device"]), record["tiny"], count_macs(model_variant(record["model"]))
        tables = {
            name: {next(iter(row.values())): row for row in part["rows"]} for name, part in record["parts"].items()
        }
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(f"--measured {path} has another form than the gpu.json that `{COMMAND}` writes") from error
    if tiny:
        raise UserError(f"--measured {path} was made with --tiny, whose times mean nothing; run `{COMMAND}` without it")

    def number(part: str, row: str, column: str) -> float | None:
        value: Any = tables.get(part, {}).get(row, {}).get(column)
        if value is None:
            return None
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"--measured {path}: {column} of {row} in {part} is {value!r}, expected a number above 0")
        return value

    def step(part: str, loop: str, host_ms: float | None) -> MeasuredStep | None:
        rate, percent = number(part, "ours", "clips/s"), number(loop, "loop", "of the bare step %")
        return MeasuredStep(TRAIN_FLOPS_PER_MAC * macs * rate, percent and percent / 100, host_ms) if rate else None

    # train.compile compiles the whole model; its blocks compiled one by one are close to that, and compile sooner.
    compiled = (step(part, "compiled loop", None) for part in ("compiled whole", "compiled step"))
    eager = step("step", "loop", number("loop", HOST_ALONE, "ms"))
    return MeasuredGpu(path, device, eager, next(filter(None, compiled), None))
