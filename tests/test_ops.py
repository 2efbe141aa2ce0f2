"""The one matrix product that everything goes through, whatever kernel it picks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from posmlp.model import ops
from posmlp.model.ops import matmul

LAYOUTS = {
    "contiguous": lambda *shape: torch.randn(*shape),
    "transposed": lambda *shape: torch.randn(*shape[:-2], shape[-1], shape[-2]).mT,
    "strided": lambda *shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
    "offset": lambda *shape: torch.randn(*shape[:-2], shape[-2] + 3, shape[-1])[..., 3:, :],
    "expanded": lambda *shape: torch.randn(*shape[:-2], 1, shape[-1]).expand(shape),
}
side = st.integers(1, 40)


@pytest.fixture(autouse=True, scope="module")
def small_products_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "ONEDNN_FROM", 0)
        yield


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def kernel(request, monkeypatch):
    if request.param and not ops.HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(ops, "HAS_ONEDNN", request.param)


@given(
    m=side,
    k=side,
    n=side,
    batch=st.sampled_from([(), (1,), (3,)]),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_the_product_and_its_gradients_are_right(m, k, n, batch, layouts, dtype, seed):
    torch.manual_seed(seed)
    a, b = LAYOUTS[layouts[0]](*batch, m, k).to(dtype), LAYOUTS[layouts[1]](*batch, k, n).to(dtype)
    grad = torch.randn(*batch, m, n).to(dtype)
    inputs = [x.detach().requires_grad_() for x in (a, b)]
    out = matmul(*inputs)
    a, b, g = (x.double() for x in (a, b, grad))
    results = [out, *torch.autograd.grad(out, inputs, grad)]
    for actual, x, y in zip(results, (a, g, a.mT), (b, b.mT, g), strict=True):
        assert actual.dtype == dtype
        assert actual.shape == (x @ y).shape
        bound = 4 * torch.finfo(dtype).eps * (x.abs() @ y.abs())
        assert ((actual.double() - x @ y).abs() <= bound).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shapes", [((5, 7), (7, 3)), ((2, 5, 7), (2, 7, 3))])
def test_every_kernel_agrees_and_is_counted_as_one_product(shapes):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results, flops = [], []
    for product in (matmul, torch.matmul):
        with FlopCounterMode(display=False) as counter:
            out = product(*inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        flops.append(counter.get_total_flops())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert flops[0] == flops[1] == 3 * 2 * torch.Size(shapes[0]).numel() * 3


@pytest.mark.usefixtures("kernel")
def test_only_what_needs_a_gradient_gets_one():
    a, b = torch.randn(3, 4), torch.randn(4, 5, requires_grad=True)
    matmul(a, b).sum().backward()
    assert a.grad is None
    torch.testing.assert_close(b.grad, a.sum(0)[:, None].expand(4, 5))
    assert not matmul(a, b.detach()).requires_grad


def test_autocast_reaches_the_product():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert matmul(a, b).dtype == torch.bfloat16
