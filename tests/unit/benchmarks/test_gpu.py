"""The command that measures a GPU (``benchmarks/gpu.py``), on a CPU: parts, files, limits of time, errors, gates."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu
from pipelines.planning.measured_gpu import MeasuredStep, read_measured_gpu
from posmlp.config import load_recipe
from posmlp.errors import UserError
from posmlp.model import cost
from posmlp.model import gpu as model_gpu
from posmlp.model.gates import PositionGate
from posmlp.model.spec import UNITS, unit_window

gpu_parts = gpu.gpu_parts
ROOT = Path(gpu.__file__).parents[1]
CPU = torch.device("cpu")
EXTENT = (3, 2, 4)
UNNEEDED = (
    "pydantic",
    "yaml",
    "ray",
    "mlflow",
    "decord",
    "av",
    "pyarrow",
    "pandas",
    "scipy",
    "optuna",
    "matplotlib",
    "safetensors",
)


@pytest.mark.slow
def test_all_parts_run_in_small_on_a_cpu_and_leave_their_files(tmp_path):
    site, out = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    # Python imports this first.
    (site / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({UNNEEDED}))")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--tiny", "--minutes", "20"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}
    result = subprocess.run([*command, "--out", out], capture_output=True, text=True, cwd="/", env=environment)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md"]
    record, tables = json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()
    assert list(record["parts"]) == list(gpu_parts.MEASUREMENTS)
    for name, part in record["parts"].items():
        assert part["status"] == "done", (name, part)
        assert part["rows"] and not any(row.get("errors") for row in part["rows"]), (name, part)
        assert f"## {name}\n" in tables and f"## {name}\n" in result.stdout
    assert len(record["parts"]["gates"]["rows"]) == 4 * len(UNITS)
    unmeasured = {figure["figure"] for figure in record["summary"] if not figure["measured"]}
    assert unmeasured == {"copy from pinned memory, GB/s"}
    assert all(figure["figure"] in tables for figure in record["summary"])
    step, loop = ({gpu.row_name(row): row for row in record["parts"][name]["rows"]} for name in ("step", "loop"))
    assert {"plain", "ours"} <= set(step)
    assert loop["loop"]["clips/s"] == pytest.approx(1e3 * loop["loop"]["clips"] / loop["loop"]["ms"])
    check_that_a_plan_can_read(out / "gpu.json", record)


def check_that_a_plan_can_read(path, record):
    """Every number that ``posmlp plan --measured`` uses is the one of the file."""
    with pytest.raises(UserError, match="--tiny"):
        read_measured_gpu(str(path))
    path.write_text(json.dumps(record | {"tiny": False}))
    found, macs = read_measured_gpu(str(path)), cost.count_macs(gpu_parts.model_variant("tiny"))

    def cell(part, row, column):
        return gpu.value(record, part, row, column)

    assert found.device == record["about"]["device"]
    assert found.eager == MeasuredStep(
        flops=pytest.approx(6 * macs * cell("step", "ours", "clips/s")),
        loop_share=pytest.approx(cell("loop", "loop", "of the bare step %") / 100),
        host_ms=cell("loop", gpu_parts.LAUNCHES, "ms"),
    )
    assert found.compiled == MeasuredStep(
        flops=pytest.approx(6 * macs * cell("compiled whole", "ours", "clips/s")),
        loop_share=pytest.approx(cell("compiled loop", "loop", "of the bare step %") / 100),
    )


def test_without_time_every_part_says_so(tmp_path):
    out = tmp_path / "new" / "folder"
    assert gpu.main(["--device", "cpu", "--tiny", "--minutes", "0", "--out", str(out)]) == 0
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert list(parts) == list(gpu_parts.MEASUREMENTS)
    assert {part["status"] for part in parts.values()} == {"out of time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def two_rows(job):
    yield {"row": "a", "ms": 1.0}
    yield {"row": "b"}
    yield {"row": "a", "ms": 2.0}


def one_row_then(what):
    """A measurement that tells its process and then does something."""

    def measure(job):
        yield {"row": "first", "process": os.getpid()}
        what()

    return measure


def fail():
    raise ValueError("first line\nsecond line")


def need_numpy():
    raise ModuleNotFoundError("No module named 'numpy'", name="numpy")


def need_a_module_of_ours():
    raise ModuleNotFoundError("No module named 'posmlp.gone'", name="posmlp.gone")


def skip():
    raise gpu.SkippedError("no such device")


@pytest.fixture
def record():
    return {"about": {"device": "some"}, "started": "now", "tiny": True, "summary": [], "parts": {}}


def test_a_part_that_fails_dies_or_hangs_costs_no_other_part(tmp_path, record, monkeypatch, capsys):
    measurements = {
        "fails": one_row_then(fail),
        "dies": one_row_then(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "hangs": one_row_then(lambda: time.sleep(3600)),
        "skips": one_row_then(skip),
        "lacks a package": one_row_then(need_numpy),
        "is broken": one_row_then(need_a_module_of_ours),
        "works": two_rows,
    }
    shares = {name: (measure, 0.02 if name == "hangs" else 0.9) for name, measure in measurements.items()}
    monkeypatch.setattr(gpu_parts, "MEASUREMENTS", shares)
    gpu.measure_all(record, tmp_path, CPU, True, 120)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    ends = {name: (part["status"], part["reason"]) for name, part in parts.items()}
    assert ends["fails"] == ("failed", "ValueError: first line")
    assert "second line" in parts["fails"]["trace"]
    assert ends["dies"] == ("failed", "its process ended with exit code -9")
    assert ends["hangs"][0] == "out of time"
    assert ends["skips"] == ("skipped", "no such device")
    assert ends["lacks a package"] == ("skipped", "needs the package numpy")
    assert ends["is broken"][0] == "failed"
    assert ends["works"] == ("done", None)
    assert parts["works"]["rows"] == [{"row": "a", "ms": 2.0}, {"row": "b"}]
    for name in set(measurements) - {"works"}:
        assert [row["row"] for row in parts[name]["rows"]] == ["first"]
        with pytest.raises(ProcessLookupError):
            os.kill(parts[name]["rows"][0]["process"], 0)
    printed = capsys.readouterr().out
    assert all(text.count("## fails\n\nFailed: ValueError: first line") for text in (printed, read(tmp_path)))


def read(out):
    return (out / "gpu.md").read_text()


def test_processes_can_also_be_spawned():
    (row, last) = gpu.run_alone(gpu_parts.about, gpu.Job(CPU), 600, "spawn")
    assert (row.kind, last.kind) == ("row", "done")
    assert row.content == next(gpu_parts.about(gpu.Job(CPU)))


def test_each_row_is_in_the_file_before_the_next_is_measured(tmp_path, record, monkeypatch):
    def measure(job):
        yield {"row": "a"}
        end = time.monotonic() + 60
        while time.monotonic() < end:
            parts = json.loads((tmp_path / "gpu.json").read_text())["parts"] if (tmp_path / "gpu.json").exists() else {}
            if parts.get("watches", {}).get("rows"):
                yield {"row": "b", "status then": parts["watches"]["status"]}
                return
            time.sleep(0.01)

    monkeypatch.setattr(gpu_parts, "MEASUREMENTS", {"watches": (measure, 0.9)})
    gpu.measure_all(record, tmp_path, CPU, True, 100)
    assert record["parts"]["watches"]["rows"][1:] == [{"row": "b", "status then": "running"}]


def test_a_file_is_whole_at_any_time(tmp_path, record, monkeypatch):
    gpu.write_results(record, tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    write = Path.write_text

    def write_half(path, text):
        write(path, text[: len(text) // 2])
        raise OSError("no space left")

    record["parts"]["step"] = {"status": "done", "rows": [{"step": "plain", "ms": 1.0}]}
    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space"):
        gpu.write_results(record, tmp_path)
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_numbers_that_json_lacks_are_text(tmp_path, record):
    record["parts"]["gates"] = {"rows": [{"gate": "a", "bf16": math.inf, "all": [math.nan]}], "status": "done"}
    record["parts"]["gates"]["rows"][0]["within bounds"] = False
    gpu.write_results(record, tmp_path)
    text = (tmp_path / "gpu.json").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))["parts"]["gates"]["rows"][0]
    assert (row["bf16"], row["all"]) == ("inf", ["nan"])


def test_goals_by_hand(record):
    assert {figure.met for figure in gpu.summary(record)} == {None}
    lines = gpu.summary_lines(gpu.summary(record))
    assert [line.endswith("| - | at least 95 | unmeasured |") for line in lines].count(True) == 1
    assert {line.split(" | ")[-1] for line in lines[4:10]} == {"unmeasured |"}
    assert {line.split(" | ")[-1] for line in lines[10:]} == {"- |"}

    def part(*rows):
        return {"rows": list(rows), "status": "done"}

    record["parts"] = {
        "gates": part({"gate": "a", "within bounds": True}, {"gate": "b", "within bounds": False}),
        "step": part(
            {"step": "plain", "ms": 90.0, "peak MB": 1000.0},
            {"step": "ours", "ms": 30.0, "floor ms": 6.0, "peak MB": 550.0},
        ),
        "compiled step": part({"step": "plain", "ms": 45.0}, {"step": "ours", "errors": {"ours": "failed"}}),
        "compiled whole": part({"step": "plain", "ms": 40.0}, {"step": "ours", "ms": 20.0}),
        "loop": part({"loop": "bare step"}, {"loop": "loop", "of the bare step %": 94.0}),
    }
    figures = gpu.summary(record)
    assert [line.split(" | ")[-1] for line in gpu.summary_lines(figures)[4:10]] == [
        "not met |",
        "met |",
        "met |",
        "not met |",
        "met |",
        "not met |",
    ]
    found = [(round(figure.measured, 9), figure.met) for figure in figures if figure.goal]
    assert found == [(50, False), (3, True), (2, True), (30, False), (55, True), (94, False)]
    assert {figure.figure: figure.measured for figure in figures}["our fastest step, ms"] == 20
    assert not any(figure.met is not None for figure in figures if not figure.goal)


@pytest.mark.parametrize(
    ("status", "within", "expected"),
    [("done", [True], True), ("out of time", [True], None), ("out of time", [True, False], False)],
)
def test_gates_that_were_not_checked_are_not_within_bounds(record, status, within, expected):
    rows = [{"gate": str(i), "within bounds": each} for i, each in enumerate(within)]
    record["parts"]["gates"] = {"rows": rows, "status": status}
    assert gpu.summary(record)[0].met is expected


def test_a_table_has_all_columns_and_shows_three_digits():
    rows = [{"a": "x", "b": 1234.5, "errors": {"b": "E"}}, {"a": "y|z", "c": 0.012345, "d": True, "e": 7, "f": None}]
    assert gpu.table(rows) == [
        "| a | b | c | d | e | f |",
        "|---|---:|---:|---:|---:|---:|",
        "| x | 1234 | - | - | - | - |",
        "| y/z | - | 0.0123 | yes | 7 | - |",
    ]


def test_runs_are_timed_in_turn_and_a_failing_one_is_left_out():
    order = []

    def run(name):
        return lambda: order.append(name)

    def broken():
        raise RuntimeError("no such kernel")

    found = list(gpu_parts.compare({"a": run("a"), "b": broken, "c": run("c")}, gpu.Job(CPU, tiny=True), share=0.5))
    assert order == ["a", "a", "c", "c"] + gpu_parts.FEWEST_ROUNDS * ["a", "c"]
    order.clear()
    list(gpu_parts.compare({"a": run("a"), "c": run("c")}, gpu.Job(CPU, tiny=True), share=0.5, lead=2))
    assert order == ["a", "a", "c", "c"] + gpu_parts.FEWEST_ROUNDS * ["a", "a", "a", "c", "c", "c"]
    assert [name for name, _ in found] == ["a", "b", "c", "a", "c"]
    assert found[1][1] == {"error": "RuntimeError: no such kernel"}
    assert found[-1][1]["rounds"] == gpu_parts.FEWEST_ROUNDS


def test_the_loop_has_the_values_of_the_recipe():
    config = load_recipe("k400_s16", ["model.weights=null"])
    for section, values in gpu_parts.RECIPE.items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == value, (section, name)
    assert (config.model.drop_path, config.clips_together) == (gpu_parts.DROP_PATH, gpu_parts.CLIPS_TOGETHER)
    assert config.model.name == gpu_parts.FULL.model


def test_every_window_of_the_released_models_is_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(gpu_parts, "check_gate", lambda name, stage, kind, job: checked.append((name, stage, kind)))
    list(gpu_parts.gates(gpu.Job(CPU)))
    gates = set()
    for name, stage, kind in checked:
        variant = gpu_parts.model_variant(name)
        window = unit_window(kind, variant.full_windows()[stage])
        gates.add((window, variant.dims[stage], variant.image_size >> (stage + 2)))
    expected = set()
    for name in ("s16", "b16", "s32", "b32"):
        variant = gpu_parts.model_variant(name)
        for stage, window in enumerate(variant.full_windows()):
            side = variant.image_size >> (stage + 2)
            expected |= {(unit_window(kind, window), variant.dims[stage], side) for kind in UNITS}
    assert gates == expected and len(checked) == len(expected)


def gate_row(*failed):
    """A row of a gate of which some cells failed."""
    return {"gate": str(failed), "within bounds": not failed, "errors": dict.fromkeys(failed, "E")}


@pytest.mark.parametrize(
    ("part", "work"),
    [
        ({"status": "done", "rows": [gate_row(), gate_row("PyTorch fp32")]}, True),
        ({"status": "done", "rows": [gate_row(), gate_row("kernels bf16")]}, False),
        ({"status": "failed", "rows": []}, False),
        ({"status": "out of time", "rows": []}, True),
    ],
)
def test_kernels_that_fail_are_not_used_in_what_follows(record, tmp_path, monkeypatch, capsys, part, work):
    def measure(job):
        yield {"gates": "kernels" if model_gpu.supports is supports else "PyTorch"}

    supports = model_gpu.supports
    record["parts"] = {"gates": part}
    monkeypatch.setattr(gpu_parts, "MEASUREMENTS", {"step": (measure, 0.9)})
    gpu.measure_all(record, tmp_path, CPU, True, 100)
    assert record["parts"]["step"]["rows"] == [{"gates": "kernels" if work else "PyTorch"}]
    assert ("Without the kernels" in capsys.readouterr().out) == (not work)
    assert model_gpu.supports is supports


def make_gate(kind, dtype, cls=PositionGate):
    torch.manual_seed(0)
    gate = cls(2, unit_window(kind, EXTENT))
    nn.init.normal_(gate.table)
    nn.init.normal_(gate.bias)
    return gate, *(gpu_parts.random_signs(channels, 2, 5, EXTENT, CPU, dtype) for channels in (12, 6))


@pytest.mark.parametrize("kind", UNITS)
def test_the_formula_in_fp64_against_loops_over_tokens(kind):
    gate, hidden, grad = make_gate(kind, torch.float64)
    t, h, w = gate.window
    u, v = (half.clone().requires_grad_() for half in hidden.chunk(2))
    table, bias = (p.detach().double().requires_grad_() for p in (gate.table, gate.bias))
    offsets = table.view(2, 2 * t - 1, 2 * h - 1, 2 * w - 1)
    tokens = list(itertools.product(range(EXTENT[0]), range(EXTENT[1] * EXTENT[2])))
    out = torch.zeros_like(u)
    for m, (to_time, to_place) in enumerate(tokens):
        y, x = divmod(to_place, EXTENT[2])
        mixed = torch.zeros_like(u[..., 0, 0])
        for from_time, from_place in tokens:
            down, right = (a - b for a, b in zip((y, x), divmod(from_place, EXTENT[2]), strict=True))
            if (t == 1 and to_time != from_time) or (h * w == 1 and (down or right)):
                continue  # tokens of other windows
            entry = offsets[:, to_time - from_time + t - 1, down + h - 1, right + w - 1]
            mixed = mixed + entry.repeat_interleave(3)[:, None, None] * u[..., from_time, from_place]
        token = ((to_time if t > 1 else 0) * h + (y if h > 1 else 0)) * w + (x if w > 1 else 0)
        chosen = torch.zeros(*out.shape[-2:], dtype=torch.float64).view(-1)
        chosen[m] = 1
        out = out + ((mixed + bias[token]) * v[..., to_time, to_place])[..., None, None] * chosen.view(*out.shape[-2:])
    expected = [out, *torch.autograd.grad(out, (u, v, table, bias), grad)]
    lines = [gpu_parts.to_lines(each.detach(), 2, kind) for each in (u, v, grad)]
    index = gpu_parts.pair_index(gate.window, CPU)
    found = gpu_parts.gate_in_fp64(*lines, table.detach(), bias.detach(), index)
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gpu_parts.to_lines(truth, 2, kind) if truth.ndim == 5 else truth)


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("dtype", gpu_parts.NAMES)
def test_a_gate_is_within_its_bounds(kind, dtype):
    gate, hidden, grad = make_gate(kind, dtype)
    errors = gpu_parts.gate_errors(gate, hidden, grad, EXTENT, kind)
    assert 0 < max(errors.values()) <= gpu_parts.BOUNDS[gpu_parts.NAMES[dtype]]


class WrongToken(PositionGate):
    def forward(self, u, v, extent):
        return super().forward(u.roll(1, -1), v, extent)


class NaNInOneElement(PositionGate):
    def forward(self, u, v, extent):
        result = super().forward(u, v, extent)
        return torch.where(torch.arange(result.numel()).view_as(result) == 7, torch.nan, result)


class NoGradientOfTheTable(PositionGate):
    def mixing_weights(self, extent, dtype):
        return super().mixing_weights(extent, dtype).detach() + 0 * self.table.sum()


class BiasInTheWrongOrder(PositionGate):
    def token_bias(self, extent):
        return super().token_bias(extent).flip(-1).flip(0)


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("dtype", gpu_parts.NAMES)
@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [
        (WrongToken, "result"),
        (NaNInOneElement, "result"),
        (NoGradientOfTheTable, "table"),
        (BiasInTheWrongOrder, "bias"),
    ],
)
def test_a_wrong_gate_is_out_of_bounds(kind, dtype, wrong, tensor):
    gate, hidden, grad = make_gate(kind, dtype, wrong)
    errors = gpu_parts.gate_errors(gate, hidden, grad, EXTENT, kind)
    assert errors[tensor] > gpu_parts.BOUNDS[gpu_parts.NAMES[dtype]]


def test_both_ways_of_a_gate_are_checked_and_an_error_stays_in_its_cell(monkeypatch):
    called = []

    def not_on_this_device(u, *others):
        called.append(u.dtype)
        if u.dtype == torch.bfloat16:
            raise RuntimeError("no kernel")
        return gate(u, *others)

    pytest.importorskip("triton")
    gate = model_gpu.gate
    monkeypatch.setattr(model_gpu, "has_kernels", lambda device: True)  # in Triton's interpreter
    monkeypatch.setattr(model_gpu, "gate", not_on_this_device)
    row = next(gpu_parts.gates(gpu.Job(CPU, tiny=True)))
    assert row["kernels fp32"] <= gpu_parts.BOUNDS["fp32"] and row["PyTorch bf16"] <= gpu_parts.BOUNDS["bf16"]
    assert row["PyTorch fp32"] <= gpu_parts.BOUNDS["fp32"]
    assert called == [torch.float32, torch.bfloat16], (
        "the kernels are called once in each type, PyTorch's way without them"
    )
    assert row["errors"] == {"kernels bf16": "RuntimeError: no kernel"}
    assert row["kernels bf16"] is None and row["within bounds"] is False


def test_a_step_is_related_to_the_rates_of_the_device():
    variant, rows = gpu_parts.model_variant("tiny"), [{"type": "bf16", "TFLOP/s": 2.0, "GB/s": 1e9}]
    job = gpu.Job(CPU, tiny=True, rows={"device": rows})
    *_, row = gpu_parts.compared_steps({"ours": lambda: time.sleep(0.01)}, job, clips=4)
    flops = 6 * 4 * cost.count_macs(variant)
    assert row["MFU %"] == pytest.approx(100 * flops / (row["ms"] / 1e3) / 2e12)
    assert row["clips/s"] == pytest.approx(4e3 / row["ms"])
    assert row["floor ms"] / row["ms"] == pytest.approx(row["of the floor %"] / 100)
    assert 0.9 < row["floor ms"] / (1e3 * flops / 2e12) < 1  # the first layer has no gradient of its input
