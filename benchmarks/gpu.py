"""Measure everything that matters about a GPU with one command, within some minutes, the most important first.

    python benchmarks/gpu.py [--minutes 8] [--out runs/gpu]

It needs PyTorch (2.11 or newer) with Triton, and a C compiler for Triton; the training loop also needs NumPy. This
project need not be installed. Without an NVIDIA GPU it says so and ends with exit code 2.

- gates: forward and backward against fp64, for all windows of ``s`` and ``b``
- step, compiled step: a training step of ``s16``, plain (``benchmarks/plain.py``) and ours; share of the floor
  (``benchmarks/floors.py``)
- loop: the training loop, from clips in the host's memory, against the bare step
- parts of a step, joint, inference, fp8, compiled loop, compiled whole: what explains the rest

``gpu_parts.py`` has the measurements. Each runs in a process of its own, which ends when its share of the time is used,
so one that fails, hangs or breaks the state of the GPU costs no other one. If the kernels of the gates fail, the rest
is measured without them. After each row the results are in ``gpu.json`` and in ``gpu.md``, whose first table has all
that matters. The exit code is 1 if a measurement failed or a gate is wrong.

``--device cpu --tiny`` runs the smallest sizes on a CPU, to test these scripts. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

START = time.monotonic()  # the import of PyTorch counts

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[1:1] = [str(HERE), str(HERE.parent)]  # the other scripts, and the project, which may not be installed

import gpu_parts  # noqa: E402
from gpu_parts import Job, Row, SkippedError, ratio, short  # noqa: E402
from model import supports_nothing  # noqa: E402

from posmlp.model import gpu as gates  # noqa: E402

Record = dict[str, Any]
OPTIONAL = ("numpy",)  # packages that only the loop needs
DONE, FAILED, SKIPPED, OUT_OF_TIME = "done", "failed", "skipped", "out of time"


class Message(NamedTuple):
    """What a measurement's process says: ``row`` and the row, or how it ended and why."""

    kind: str
    content: Any = None
    trace: str | None = None


def run_alone(
    measure: Callable[[Job], Iterator[Row]], job: Job, limit: float, start: str = "fork"
) -> Iterator[Message]:
    """Run a measurement in a process of its own, and end that after ``limit`` seconds. The last message is its end.

    Args:
        start: how the process starts (``multiprocessing``). ``fork`` saves the time to import PyTorch. It works as long
            as this process has not used the GPU, and it does not, unless the import of a package does.
    """
    context = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    sys.stdout.flush()
    process = context.Process(target=send_rows, args=(measure, job, sender))
    process.start()
    sender.close()
    end = time.monotonic() + limit
    try:
        while True:
            if not receiver.poll(max(0.0, end - time.monotonic())):
                yield Message(OUT_OF_TIME, f"stopped after {limit:.0f} s")
                return
            try:
                message = receiver.recv()
            except (EOFError, OSError):  # OSError: in the middle of a message
                process.join(5)
                yield Message(FAILED, f"its process ended with exit code {process.exitcode}")
                return
            yield message
            if message.kind != "row":
                return
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the compiler's helpers too
        process.kill()  # if it has no group yet
        process.join()
        receiver.close()


def send_rows(measure: Callable[[Job], Iterator[Row]], job: Job, sender: Connection) -> None:
    """The process of a measurement."""
    os.setsid()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    if not job.kernels:
        gates.supports = supports_nothing
    try:
        for row in measure(job):
            sender.send(Message("row", row))
        sender.send(Message(DONE))
    except SkippedError as error:
        sender.send(Message(SKIPPED, str(error)))
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
            sender.send(Message(SKIPPED, f"needs the package {error.name}"))
        else:
            sender.send(Message(FAILED, short(error), traceback.format_exc()))


def look_at(device: torch.device) -> tuple[str, Message]:
    """How processes start here, and the first message of ``gpu_parts.about``: its row, or why there is none."""
    for start in ("fork", "spawn"):
        message = next(run_alone(gpu_parts.about, Job(device), 120, start))
        if message.kind == "row":
            break
    return start, message


def measure_all(
    record: Record, out: Path, device: torch.device, tiny: bool, seconds: float, start_method: str = "fork"
) -> None:
    """Run all measurements, each within its share of the time left; the files are complete after each row."""
    end = time.monotonic() + seconds
    for name, (measure, share) in gpu_parts.MEASUREMENTS.items():
        part: Record = {"status": "running", "rows": []}
        record["parts"][name] = part
        start = time.monotonic()
        limit = share * max(0.0, end - start)
        rows = {done: each["rows"] for done, each in record["parts"].items()}
        part["kernels"] = kernels = kernels_work(record)
        for message in run_alone(measure, Job(device, tiny, start + limit, rows, kernels), limit, start_method):
            if message.kind == "row":
                put_row(part["rows"], message.content)
            else:
                part |= {"status": message.kind, "reason": message.content, "trace": message.trace}
            part["seconds"] = time.monotonic() - start
            write_results(record, out)
        print("\n".join(part_lines(name, part)), flush=True)


def kernels_work(record: Record) -> bool:
    """Whether no kernel of a gate has failed to compile or run, as far as is known. Wrong results are no failure."""
    failed = record["parts"].get("gates", {}).get("status") == FAILED
    errors = (cell for row in rows_of(record, "gates") for cell in row.get("errors", {}))
    return not failed and not any(cell.startswith("kernels") for cell in errors)


def put_row(rows: list[Row], row: Row) -> None:
    """Append a row, or replace the one with the same name."""
    for i, old in enumerate(rows):
        if row_name(old) == row_name(row):
            rows[i] = row
            return
    rows.append(row)


def row_name(row: Row) -> Any:
    """The name of a row: its first value."""
    return next(iter(row.values()))


def write_results(record: Record, out: Path) -> None:
    """Write ``gpu.json`` and ``gpu.md``; each is replaced at once, so it is complete at any time."""
    record["summary"] = [figure._asdict() for figure in summary(record)]
    for name, text in (("gpu.json", json.dumps(finite(record), indent=1)), ("gpu.md", markdown(record))):
        part = out / f"{name}.part"
        part.write_text(text + "\n")
        part.replace(out / name)


def finite(content: Any) -> Any:
    """Plain data with text in place of infinity and NaN, which JSON does not have."""
    match content:
        case dict():
            return {key: finite(each) for key, each in content.items()}
        case list():
            return [finite(each) for each in content]
        case float() if not math.isfinite(content):
            return str(content)
        case _:
            return content


# What matters


class Figure(NamedTuple):
    """A figure, its goal on an H100, and whether it is met; None where nothing was measured, or there is no goal."""

    figure: str
    measured: float | None
    goal: str | None = None
    met: bool | None = None


def summary(record: Record) -> list[Figure]:
    """The figures that matter, those with a goal first."""

    def at_least(figure: str, wanted: float, measured: float | None) -> Figure:
        return Figure(figure, measured, f"at least {wanted:g}", None if measured is None else measured >= wanted)

    def at_most(figure: str, wanted: float, measured: float | None) -> Figure:
        return Figure(figure, measured, f"at most {wanted:g}", None if measured is None else measured <= wanted)

    compiled = ("compiled step", "compiled whole")
    plain_compiled = best(value(record, part, "plain", "ms") for part in compiled)
    ours = [value(record, part, "ours", "ms") for part in ("step", *compiled)]
    floor = value(record, "step", "ours", "floor ms")
    memory = ratio(value(record, "step", "ours", "peak MB"), value(record, "step", "plain", "peak MB"))
    of_floor = ratio(floor, best(ours))
    utilisations = [value(record, part, "ours", "MFU %") for part in ("step", *compiled)]
    checked = [row["within bounds"] for row in rows_of(record, "gates")]
    if all(checked) and record["parts"].get("gates", {}).get("status") != DONE:
        checked = []  # the others may be wrong
    found = [
        at_least("gates within their bounds, %", 100, 100 * sum(checked) / len(checked) if checked else None),
        at_least("plain step / ours", 3, ratio(value(record, "step", "plain", "ms"), ours[0])),
        at_least("compiled plain step / ours compiled", 1.5, ratio(plain_compiled, best(ours[1:]))),
        at_least("floor / our fastest step, %", 40, of_floor and 100 * of_floor),
        at_most("memory of our step / of the plain one, %", 60, memory and 100 * memory),
        at_least("loop / bare step, clips/s, %", 95, value(record, "loop", "loop", "of the bare step %")),
        Figure("our fastest step, ms", best(ours)),
        Figure("clips of a step", value(record, "step", "ours", "clips")),
        Figure("MFU of our fastest step, %", most(utilisations)),
        Figure("loop, clips/s", value(record, "loop", "loop", "clips/s")),
        Figure("compiled loop, clips/s", value(record, "compiled loop", "loop", "clips/s")),
        Figure("the host's own time of a step, ms", value(record, "loop", gpu_parts.LAUNCHES, "ms")),
        Figure("copy from pinned memory, GB/s", value(record, "device", gpu_parts.PINNED_COPY, "GB/s")),
    ]
    for row in rows_of(record, "joint")[4:]:  # all of the model
        found += [Figure(f"joint / parallel, {mode}", row[f"joint / parallel {mode}"]) for mode in ("forward", "step")]
    found += [
        Figure(f"inference in {row_name(row)}, clips/s", row["most clips/s"]) for row in rows_of(record, "inference")
    ]
    gains = [row["bf16 / fp8 with conversion"] for row in rows_of(record, "fp8") if "fp8 ms" in row]
    return [*found, *([Figure("bf16 / fp8 with conversion, best product", most(gains))] if gains else [])]


def rows_of(record: Record, part: str) -> list[Row]:
    """The rows of a measurement so far."""
    return record["parts"].get(part, {}).get("rows", [])


def value(record: Record, part: str, row: str, column: str) -> float | None:
    """A value of a row of a measurement; None if it is not there."""
    return next((each.get(column) for each in rows_of(record, part) if row_name(each) == row), None)


def best(times: Iterator[float | None] | Sequence[float | None]) -> float | None:
    """The least of those times that were measured."""
    return min((ms for ms in times if ms), default=None)


def most(values: Iterator[float | None] | Sequence[float | None]) -> float | None:
    """The largest of those values that were measured."""
    return max((each for each in values if each), default=None)


# Tables


def markdown(record: Record) -> str:
    """The results as text with tables."""
    about = ", ".join(f"{name} {cell(content)}" for name, content in record["about"].items() if name != "device")
    lines = [f"# {record['about']['device']}", "", f"{about}. Started {record['started']}."]
    if record["tiny"]:
        lines += ["", "The smallest sizes, to test the scripts: the times mean nothing."]
    lines += ["", *summary_lines(summary(record))]
    for name, part in record["parts"].items():
        lines += part_lines(name, part)
    return "\n".join(lines)


def summary_lines(figures: list[Figure]) -> list[str]:
    """The figures that matter as a table, which says of each goal whether it is met."""
    rows = []
    for figure in figures:
        met = {True: "met", False: "not met", None: "unmeasured" if figure.goal else None}[figure.met]
        rows.append({"figure": figure.figure, "measured": figure.measured, "goal": figure.goal, "met": met})
    return ["Goals are for an H100.", "", *table(rows)]


def part_lines(name: str, part: Record) -> list[str]:
    """Title, table, and what went wrong, of one measurement."""
    reason = f": {part['reason']}" if part.get("reason") else ""
    without = "" if part.get("kernels", True) else " Without the kernels of the gates, which have failed."
    end = f"{part['status'].capitalize()}{reason}, {part.get('seconds', 0):.0f} s.{without}"
    lines = ["", f"## {name}", "", end, ""]
    lines += table(part["rows"])
    errors = [(row_name(row), *error) for row in part["rows"] for error in row.get("errors", {}).items()]
    return lines + ([""] if errors else []) + [f"- {row}, {what}: {cell(error)}" for row, what, error in errors]


def table(rows: list[Row]) -> list[str]:
    """Rows as a Markdown table, with all their columns but dictionaries."""
    columns = list(dict.fromkeys(key for row in rows for key, each in row.items() if not isinstance(each, dict)))
    if not columns:
        return []
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return lines + [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]


def cell(content: Any) -> str:
    """A value as text: three digits of a number with a fraction."""
    match content:
        case None:
            return "-"
        case bool():
            return "yes" if content else "no"
        case float():
            return f"{content:.0f}" if abs(content) >= 100 else f"{content:.3g}"
        case _:
            return str(content).replace("|", "/")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: runs/gpu)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to test the scripts")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    start = START if arguments is None else time.monotonic()
    start_method, first = look_at(device)
    if first.kind != "row":
        print(f"nothing measured: {first.content}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    model = Job(device, options.tiny).sizes.model
    record: Record = {
        "about": first.content,
        "started": started,
        "model": model,
        "tiny": options.tiny,
        "summary": [],
        "parts": {},
    }
    print(f"{first.content['device']}: {options.minutes:g} minutes; results in {options.out}", flush=True)
    for package in OPTIONAL:
        if importlib.util.find_spec(package) is None:
            print(f"without {package} the training loop is left out; pip install {package} adds it", flush=True)
    left = 60 * options.minutes - (time.monotonic() - start)
    measure_all(record, options.out, device, options.tiny, left, start_method)
    print("\n".join(["", *summary_lines(summary(record))]))
    wrong = any(part["status"] == FAILED for part in record["parts"].values())
    return int(wrong or any(not row["within bounds"] for row in rows_of(record, "gates")))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through run_alone, which ends its process
    sys.exit(main())
