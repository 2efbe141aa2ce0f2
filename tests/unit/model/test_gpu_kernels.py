"""The gate's operator for GPUs against the formula in fp64, on a GPU if there is one, else in Triton's interpreter."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch.nn.parallel import DistributedDataParallel

import posmlp
from benchmarks.plain import position_index
from posmlp.model import cpu, gpu, spec
from posmlp.model.backbone import Stage
from posmlp.model.gates import PositionGate
from posmlp.model.spec import unit_window

triton = pytest.importorskip("triton")
from triton.runtime import interpreter  # noqa: E402

from posmlp.model import gpu_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not isinstance(gpu_kernels.mix, interpreter.InterpretedFunction):
    pytest.skip("Triton was imported before tests/conftest.py chose its interpreter", allow_module_level=True)

has_kernels = gpu.has_kernels  # as it is outside these tests
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
KINDS = ("temporal", "spatial", "joint")


@pytest.fixture(autouse=True, scope="module")
def everywhere():
    """The operator serves CPUs too, in the interpreter, and the fast path for CPUs none."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(gpu, "has_kernels", lambda device: True)
            patch.setattr(cpu, "supports", lambda x: False)
            # The interpreter holds bfloat16 as integers, and would multiply those.
            whole = interpreter.InterpreterBuilder.create_dot
            patch.setattr(
                interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: whole(self, up(a), up(b), *rest)
            )
        yield


def up(handle):
    """A block of bfloat16 in the interpreter as one of fp32."""
    if handle.dtype.scalar != triton.language.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, triton.language.float32)


def make(window, extent, groups, group_channels, clips, windows, dtype):
    """A gate, u and v that are halves of one tensor, and a gradient."""
    gate = PositionGate(groups, window).to(DEVICE)
    nn.init.normal_(gate.table)
    nn.init.normal_(gate.bias)
    channels, tokens = groups * group_channels, (extent[0], extent[1] * extent[2])
    hidden = torch.randn(2 * channels, clips, windows, *tokens, device=DEVICE).to(dtype)
    u, v = (half.requires_grad_() for half in hidden.chunk(2))
    return gate, u, v, torch.randn_like(u)


def formula(u, v, table, bias, window, extent):
    """The gate from an explicit ``[L, L]`` index of pairs of tokens."""
    t, h, w = (min(n, m) for n, m in zip(extent, window, strict=True))
    index = position_index(window).view(*window, *window)[:t, :h, :w, :t, :h, :w].reshape(t * h * w, -1)
    maps, bias = table[:, index], bias.view(window)[:t, :h, :w].flatten()
    x = u.unflatten(0, (len(maps), -1))
    if window[1:] == (1, 1):
        mixed = torch.einsum("smn,scbwnk->scbwmk", maps, x) + bias[:, None]
    elif window[0] == 1:
        mixed = torch.einsum("smn,scbwtn->scbwtm", maps, x) + bias
    else:
        mixed = (torch.einsum("smn,scbwn->scbwm", maps, x.flatten(-2)) + bias).view(x.shape)
    return mixed.flatten(0, 1) * v


def with_gradients(function, inputs, grad):
    """The result and the gradients of all inputs."""
    inputs = [each.detach().requires_grad_() for each in inputs]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, grad)]


def check(gate, u, v, grad, extent):
    """The result and all gradients equal the formula's in fp64, to the rounding of u's type."""
    inputs, window = (u, v, gate.table, gate.bias), gate.window
    actual = with_gradients(lambda *args: gpu.gate(*args, window, extent), inputs, grad)
    exact, most = (
        with_gradients(
            lambda *args: formula(*args, window, extent), [f(each.double()) for each in inputs], f(grad.double())
        )
        for f in (lambda x: x, torch.abs)  # rounding errors are relative to the sum of what is added
    )
    for result, truth, magnitude, like in zip(actual, exact, most, (u, *inputs), strict=True):
        assert result.dtype == like.dtype and result.shape == like.shape
        assert ((result.double() - truth).abs() <= 4 * torch.finfo(u.dtype).eps * magnitude).all()


side = st.integers(1, 5)


@settings(max_examples=20)
@given(
    kind=st.sampled_from(KINDS),
    window=st.tuples(side, side, side),
    size=st.tuples(side, side, side),
    groups=st.integers(1, 3),
    group_channels=st.integers(1, 3),
    clips=st.integers(1, 3),
    windows=st.integers(1, 3),
    dtype=st.sampled_from([*gpu.TYPES]),
    programs=st.sampled_from([1, 20, 512]),
    seed=st.integers(0, 999),
)
def test_a_gate_and_its_gradients_equal_the_formula(
    kind, window, size, groups, group_channels, clips, windows, dtype, programs, seed
):
    torch.manual_seed(seed)
    extent = tuple(map(min, size, window))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_kernels, "PROGRAMS", programs)
        check(*make(unit_window(kind, window), extent, groups, group_channels, clips, windows, dtype), extent)


@pytest.mark.parametrize(
    ("window", "extent", "windows", "dtype"),
    [
        ((1, 14, 14), (1, 14, 14), 1, torch.bfloat16),
        ((1, 9, 12), (1, 9, 11), 20, torch.float32),
        ((1, 7, 7), (8, 7, 7), 1, torch.float32),
        ((16, 1, 1), (16, 7, 7), 1, torch.bfloat16),
        ((70, 1, 1), (66, 2, 3), 1, torch.float32),
        ((3, 9, 8), (2, 9, 8), 20, torch.float32),
    ],
)
def test_lines_or_columns_of_more_than_a_tile_or_that_fill_it(window, extent, windows, dtype):
    torch.manual_seed(0)
    check(*make(window, extent, 2, 1, 2, windows, dtype), extent)


@pytest.mark.parametrize("kind", KINDS)
def test_results_repeat_bit_for_bit(kind):
    torch.manual_seed(0)
    window = (3, 4, 4)
    gate, u, v, grad = make(unit_window(kind, window), window, 2, 2, 3, 2, torch.float32)
    inputs = (u, v, gate.table, gate.bias)
    results = [with_gradients(lambda *args: gpu.gate(*args, gate.window, window), inputs, grad) for _ in range(2)]
    assert all(map(torch.equal, *results))


def test_no_clips_give_no_gradient():
    extent = (2, 3, 3)
    for kind in KINDS:
        check(*make(unit_window(kind, extent), extent, 2, 2, 0, 3, torch.float32), extent)


def test_inputs_in_any_order_of_memory():
    torch.manual_seed(0)
    gate, u, v, grad = make((1, 3, 3), (2, 3, 3), 2, 2, 2, 2, torch.float32)
    assert u.is_contiguous() and v.is_contiguous()  # halves as they are: no copies
    turned = [x.detach().mT.contiguous().mT.requires_grad_() for x in (u, v)]
    check(gate, *turned, grad[:, :1].expand_as(grad), (2, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_are_what_pytorch_asks_of_operators(kind):
    torch.manual_seed(0)
    window, extent = unit_window(kind, (3, 2, 3)), (2, 2, 3)
    gate, u, v, grad = make(window, extent, 2, 1, 1, 2, torch.float32)
    rest = (gate.table, gate.bias, list(window), list(extent))
    library.opcheck(gpu.gate, (u, v, *rest))
    library.opcheck(gpu.gate_backward, (grad, u, v, *rest), test_utils=["test_schema", "test_faketensor"])


def gradients(model, x, weight, dtype=None):
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(x)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *model.parameters()])]


def random_stage(kind, size, window=(3, 3, 2)):
    """A stage of two blocks with random parameters, and its input, of a ``size`` with padded tokens or not."""
    torch.manual_seed(0)
    stage = Stage(None, 8, kind, 2, 2, window, [0.0, 0.0]).to(DEVICE)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, *size, device=DEVICE)
    return stage, x, torch.randn_like(x)


@pytest.fixture
def served(monkeypatch):
    """What the gates that the operator served were given."""
    calls, whole = [], gpu_kernels.forward
    monkeypatch.setattr(gpu_kernels, "forward", lambda u, *rest: calls.append(u.dtype) or whole(u, *rest))
    return calls


@pytest.mark.parametrize("kind", ["parallel", "joint"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_stage_with_checkpoints_and_autocast_equals_the_reference(kind, dtype, served):
    stage, x, weight = random_stage(kind, (3, 5, 2))
    exact = gradients(copy.deepcopy(stage).double(), x.double(), weight.double())
    assert not served  # fp64 goes PyTorch's way
    tolerance = 2e-5 if dtype is None else 4e-2
    results = []
    for stage.recompute in (False, True):
        results.append(gradients(stage, x, weight, dtype))
        assert {*served} == {dtype or torch.float32}
    for actual, again, truth in zip(*results, exact, strict=True):
        assert torch.equal(actual, again)
        assert (actual.double() - truth).norm() <= tolerance * (truth.norm() + 1e-3 * exact[0].norm())


@pytest.mark.parametrize("kind", ["parallel", "joint"])
def test_a_compiled_stage_has_one_graph_and_the_same_results(kind, served):
    stage, x, weight = random_stage(kind, (3, 5, 2))
    expected = gradients(stage, x, weight)
    eager = len(served)
    torch._dynamo.reset()
    compiled = torch.compile(stage, backend="aot_eager", fullgraph=True)
    for actual, truth in zip(gradients(compiled, x, weight), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())
    assert len(served) == 2 * eager > 0
    torch._dynamo.reset()


def test_units_that_mix_one_side_of_a_frame_equal_the_reference(served, monkeypatch):
    for unit, axes in {"rows": "w", "columns": "h", "time_rows": "tw"}.items():
        monkeypatch.setitem(spec.UNITS, unit, axes)
    monkeypatch.setitem(spec.BLOCKS, "axial", (("rows", "columns"), ("time_rows",)))
    stage, x, weight = random_stage("axial", (3, 5, 2))
    exact = gradients(copy.deepcopy(stage).double(), x.double(), weight.double())
    for actual, truth in zip(gradients(stage, x, weight), exact, strict=True):
        assert (actual.double() - truth).norm() <= 2e-5 * (truth.norm() + 1e-3 * exact[0].norm())
    assert served


def test_ddp_has_the_same_gradients(tmp_path):
    stage, x, weight = random_stage("parallel", (3, 5, 2))
    expected = gradients(stage, x, weight)[2:]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        (DistributedDataParallel(stage)(x) * weight).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, truth in zip(stage.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, truth)


def test_served_are_two_of_one_type_on_a_device_with_the_kernels(monkeypatch):
    u = torch.empty(1, device=DEVICE)
    assert all(gpu.supports(u.to(dtype), u.to(dtype)) for dtype in gpu.TYPES)
    assert not gpu.supports(u.double(), u.double())
    assert not gpu.supports(u, u.half())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for major in (7, 8, 9):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, major=major: SimpleNamespace(major=major)
        )
        assert has_kernels(torch.device("cuda", 0)) == (major >= 8)
    assert not has_kernels(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)  # as on AMD's GPUs
    assert not has_kernels(torch.device("cuda", 0))


def test_kernels_compile_for_gpus_and_fit_them():
    """To machine code, without a GPU: nothing spills, and on sm_90 a multiprocessor holds two programs or more."""
    root = Path(__file__).parents[3]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/kernels.py", "--windows", "space 14", "time 16"]
    table = subprocess.check_output(command, cwd=root, env=environment | {"PYTHONPATH": str(root)}, text=True)
    rows = [line.rsplit(maxsplit=5) for line in table.splitlines()[2:]]
    kernels = ("space 14: mix", "space 14: unmix", "space 14: correlate", "space 14: fold")
    kernels += ("time 16: mix", "time 16: unmix_short", "time 16: fold")
    expected = [f"sm_{sm} {dtype} {kernel}" for sm in (80, 90) for dtype in ("bf16", "fp32") for kernel in kernels]
    assert [row[0] for row in rows] == expected
    for label, _, stack, _, _, at_once in rows:
        assert int(stack) == 0, label
        assert int(at_once) >= (2 if "sm_90" in label else 1), label


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_released_model_on_a_gpu_equals_its_reference(dtype, served, monkeypatch):
    torch.manual_seed(0)
    model = posmlp.create_model("s16").to(DEVICE).eval()
    clip, weight = torch.randn(2, 3, 16, 224, 224, device=DEVICE), torch.randn(2, 400, device=DEVICE)
    results = gradients(model, clip, weight, dtype)
    assert len(served) >= 2 * 19
    monkeypatch.setattr(gpu, "supports", lambda u, v: False)
    for actual, reference in zip(results, gradients(model, clip, weight, dtype), strict=True):
        assert (actual - reference).norm() <= (1e-3 if dtype is None else 1e-1) * reference.norm()


@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last group of a tensor beyond 2^31 elements is what it is alone."""
    window, channels = (1, 14, 14), 2**31 // (64 * 16 * 196) + 2
    channels += channels % 2
    if torch.cuda.get_device_properties(DEVICE).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    gate = PositionGate(2, window).to(DEVICE)
    u, v = (torch.randn(channels, 64, 1, 16, 196, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    alone = PositionGate(1, window).to(DEVICE)
    alone.load_state_dict({"table": gate.table[1:], "bias": gate.bias})
    with torch.no_grad():
        whole, last = gate(u, v, (16, 14, 14)), alone(u[channels // 2 :], v[channels // 2 :], (16, 14, 14))
    assert u.numel() > 2**31
    assert torch.equal(whole[-1], last[-1])
