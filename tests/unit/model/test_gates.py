"""The gates against a naive oracle, their gradients, and properties that hold in closed form."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posmlp.model import gates
from posmlp.model.backbone import Block, from_windows, padding_mask, to_windows
from posmlp.model.gates import PositionGate
from posmlp.model.spec import BLOCKS, unit_window
from tests.helpers import oracle

KINDS = ("temporal", "spatial", "joint")
AXES = {"time": 2, "height": 3, "width": 4}


def make_gate(kind, window, groups, dtype=torch.float64):
    """A gate whose tables and biases are all different from each other and from zero."""
    gate = PositionGate(groups, unit_window(kind, window))
    with torch.no_grad():
        gate.table.normal_()
        gate.bias.normal_()
    return gate.to(dtype)


def run_gate(gate, u, v, window):
    """``gate`` on plain ``[B, C, T, H, W]`` in a stage of ``window``; padded tokens hold rubbish until masked."""
    size = u.shape[2:]
    extent = tuple(map(min, size, window))
    real = padding_mask(size, extent, u.device)
    u, v = to_windows(u, extent), to_windows(v, extent)
    if real is not None:
        u = u.masked_fill(real == 0, 1e4) * real.to(u.dtype)
    return from_windows(gate(u, v, extent), extent, size)


def side(most):
    return st.integers(1, most)


@settings(max_examples=120)
@given(
    kind=st.sampled_from(KINDS),
    window=st.tuples(side(4), side(3), side(3)),
    size=st.tuples(side(5), side(4), side(5)),  # smaller than the window, whole windows, and anything between
    groups=side(3),
    group_channels=side(2),
    batch=side(2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_a_gate_equals_the_formula(kind, window, size, groups, group_channels, batch, dtype, seed):
    torch.manual_seed(seed)
    gate = make_gate(kind, window, groups, dtype)
    u, v = torch.randn(2, batch, groups * group_channels, *size).to(dtype)
    before = u.clone(), v.clone()
    with torch.no_grad():
        actual = run_gate(gate, u, v, window)
    args = [a.detach().double().numpy() for a in (u, v, gate.table, gate.bias)]
    expected = torch.from_numpy(oracle.gate(*args, gate.window))
    magnitude = torch.from_numpy(oracle.gate(*map(abs, args), gate.window))  # rounding errors are relative to this
    assert actual.dtype == dtype
    assert actual.shape == u.shape
    assert ((actual.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * magnitude).all()
    assert torch.equal(u, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(3, 2, 2), (4, 3, 2), (2, 2, 1)], ids=["whole", "padded", "small"])
def test_gradients_are_right(kind, size):
    torch.manual_seed(0)
    window = (3, 2, 2)
    gate = make_gate(kind, window, groups=2)
    u, v = torch.randn(2, 1, 4, *size, dtype=torch.float64)

    def product(u, v, table, bias):
        parameters = {"table": table, "bias": bias}
        return run_gate(lambda *args: torch.func.functional_call(gate, parameters, args), u, v, window)

    inputs = [a.detach().requires_grad_() for a in (u, v, gate.table, gate.bias)]
    assert torch.autograd.gradcheck(product, inputs)


@given(window=st.tuples(side(4), side(4), side(4)), size=st.tuples(side(9), side(9), side(9)), batch=side(2))
def test_windows_are_undone_exactly(window, size, batch):
    extent = tuple(map(min, size, window))
    x = torch.arange(1, batch * 3 * math.prod(size) + 1).view(batch, 3, *size)
    tokens = to_windows(x, extent)
    assert tokens.shape[:2] == (3, batch)
    assert tokens.shape[3:] == (extent[0], extent[1] * extent[2])
    assert torch.equal(from_windows(tokens, extent, size), x)
    real = padding_mask(size, extent, x.device)
    assert (real is None) == (tokens.numel() == x.numel())
    assert torch.equal(tokens[0, 0] > 0, torch.ones_like(tokens[0, 0]) > 0 if real is None else real > 0)


def test_a_window_is_a_box_of_neighbours():
    x = torch.arange(4 * 4 * 6).view(1, 1, 4, 4, 6)
    tokens = to_windows(x, (2, 2, 3))
    assert torch.equal(tokens[0, 0, 0], x[0, 0, :2, :2, :3].flatten(1))
    assert torch.equal(tokens[0, 0, 1], x[0, 0, :2, :2, 3:].flatten(1))
    assert torch.equal(tokens[0, 0, 2], x[0, 0, :2, 2:, :3].flatten(1))
    assert torch.equal(tokens[0, 0, 4], x[0, 0, 2:, :2, :3].flatten(1))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_tokens_contribute_exactly_nothing(kind, dtype):
    torch.manual_seed(0)
    extent, size = (2, 3, 3), (5, 7, 4)
    block = Block(kind, 8, groups=2, window=extent, drop_path=0).to(dtype)
    real = padding_mask(size, extent, "cpu")
    x = to_windows(torch.randn(2, 8, *size), extent).to(dtype)
    rubbish = torch.where(real == 1, x, 1e4 * torch.randn_like(x))
    with torch.no_grad():
        results = [from_windows(block(a, extent, real), extent, size) for a in (x.clone(), rubbish)]
    assert torch.equal(*results)


def test_a_large_joint_window_equals_its_full_map():
    torch.manual_seed(0)
    t, h, w = window = (8, 7, 6)
    gate = make_gate("joint", window, groups=2)
    u, v, weight = torch.randn(3, 2, 4, *window, dtype=torch.float64).requires_grad_().unbind()
    place = torch.cartesian_prod(*map(torch.arange, window))
    offset = place[:, None] - place + torch.tensor(window) - 1  # [N, N', 3]
    full = gate.table[:, (offset * torch.tensor([(2 * h - 1) * (2 * w - 1), 2 * w - 1, 1])).sum(-1)]
    mixed = torch.einsum("smn,bsgn->bsgm", full, u.view(2, 2, 2, t * h * w)) + gate.bias
    expected = mixed.reshape(v.shape) * v
    actual = run_gate(gate, u, v, window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    inputs = (u, v, gate.table, gate.bias)
    gradients = [torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


@pytest.mark.parametrize("groups_at_once", [1, 2, 3])
def test_maps_made_for_a_few_groups_at_a_time_are_the_same(groups_at_once, monkeypatch):
    """5 groups, so that the last chunk is smaller; 9 frequencies of 2 x 3 tokens in fp64 are 9 * 6^2 * 8 bytes."""
    torch.manual_seed(0)
    window = (5, 2, 3)
    gate, chunks = make_gate("joint", window, groups=5), []
    expand = gates.expand_table

    def record(table, dtype, out=None):
        chunks.append((table.shape[1], out is not None))
        return expand(table, dtype, out)

    monkeypatch.setattr(gates, "JOINT_MAP_BYTES", {"cpu": groups_at_once * 9 * 36 * 8 + 100, "cuda": 1})
    monkeypatch.setattr(gates, "expand_table", record)
    u, v = torch.randn(2, 1, 10, *window, dtype=torch.float64)
    with torch.no_grad():
        actual = run_gate(gate, u, v, window)
    args = [a.detach().numpy() for a in (u, v, gate.table, gate.bias)]
    torch.testing.assert_close(actual, torch.from_numpy(oracle.gate(*args, window)), rtol=0, atol=1e-12)
    sizes = {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[groups_at_once]
    assert chunks == [(size, size == groups_at_once) for size in sizes]  # full chunks share their memory
    components = gate.mixing_weights(window, torch.float64).detach().requires_grad_()
    x = torch.randn(5, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gates.JointProduct.apply, (components, x), fast_mode=True)


def test_maps_have_the_type_of_the_products_and_components_that_of_the_table():
    for kind, dtype in [("temporal", torch.bfloat16), ("spatial", torch.bfloat16), ("joint", torch.float32)]:
        weights = make_gate(kind, (3, 2, 2), 2, torch.float32).mixing_weights((3, 2, 2), torch.bfloat16)
        assert weights.dtype == dtype
    assert make_gate("spatial", (3, 2, 2), 2).mixing_weights((3, 2, 2), torch.float64).shape == (2, 4, 4)
    assert make_gate("temporal", (3, 2, 2), 2).mixing_weights((3, 2, 2), torch.float64).shape == (2, 1, 3, 3)
    assert make_gate("joint", (3, 2, 2), 2).mixing_weights((3, 2, 2), torch.float64).shape == (5, 2, 1, 3, 3)


@pytest.mark.parametrize(
    ("kind", "axis"), [("temporal", "time"), ("spatial", "height"), ("spatial", "width"), *(("joint", a) for a in AXES)]
)
def test_a_reversed_signal_needs_the_reversed_table(kind, axis):
    """Reversing time (or a side) of the input, the tables and the biases reverses the output."""
    torch.manual_seed(0)
    window, dim = (4, 3, 2), AXES[axis]
    gate, reverse = make_gate(kind, window, groups=2), make_gate(kind, window, groups=2)
    offsets = [2 * n - 1 for n in gate.window]
    with torch.no_grad():
        reverse.table.copy_(gate.table.view(-1, *offsets).flip(dim - 1).reshape(2, -1))
        reverse.bias.copy_(gate.bias.view(gate.window).flip(dim - 2).flatten())
    u, v = torch.randn(2, 2, 4, 8, 6, 6, dtype=torch.float64)  # whole windows
    expected = run_gate(gate, u, v, window).flip(dim)
    torch.testing.assert_close(run_gate(reverse, u.flip(dim), v.flip(dim), window), expected, rtol=0, atol=1e-12)


def test_a_fresh_gate_starts_near_v_and_can_learn():
    torch.manual_seed(0)
    gate = PositionGate(4, (4, 3, 3))
    u, v = torch.randn(2, 8, 1, 1, 4, 9)
    u.requires_grad_()
    out = gate(u, v, gate.window)
    assert (out - v).std() < 0.3 * v.std()
    out.square().sum().backward()
    assert u.grad.abs().min() > 0
