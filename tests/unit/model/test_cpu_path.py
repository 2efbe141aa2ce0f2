"""The fast path on CPUs against the reference: ``Block.run_step`` in fp64, which it does not support."""

import copy
import math
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from posmlp import create_model
from posmlp.model import cpu
from posmlp.model.backbone import Block, grid, padding_mask
from posmlp.model.spec import BLOCKS
from posmlp.model.supernet import Supernet

side = st.integers(1, 5)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def make(kind, groups, window, size, batch, drop_path=0.0):
    """A block with random parameters, tokens for it, their extent and their mask."""
    block = Block(kind, 4 * groups, groups, window, drop_path)  # a norm over 2 channels would amplify roundings
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    extent = tuple(min(n, w) for n, w in zip(size, window, strict=True))
    real = padding_mask(size, extent, torch.device("cpu"))
    t, h, w = extent
    x = torch.randn(4 * groups, batch, math.prod(grid(size, extent)), t, h * w)
    return block, x if real is None else x * real, extent, real


def run(block, x, extent, real, weight, dtype=None):
    """The output, and the gradients of the input and of all parameters."""
    torch.manual_seed(0)  # what drop path drops
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = block(x, extent, real)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])]


@settings(max_examples=100)
@given(
    kind=st.sampled_from(sorted(BLOCKS)),
    groups=st.integers(1, 3),
    window=st.tuples(side, side, side),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunk=st.sampled_from([1, 3000, 2**22]),
    drop_path=st.sampled_from([0.0, 0.5]),
    large=st.sampled_from([1, 2**20]),
    large_window=st.sampled_from([1, 2**20]),
    onednn=st.booleans(),
    window_order=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_block_and_its_gradients_equal_the_reference(
    kind, groups, window, size, batch, dtype, chunk, drop_path, large, large_window, onednn, window_order, seed
):
    torch.manual_seed(seed)
    block, x, extent, real = make(kind, groups, window, size, batch, drop_path)
    weight = torch.randn_like(x)
    if window_order:  # as a stage lays them
        x, weight = (each.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4) for each in (x, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK_BYTES", chunk)
        patch.setattr(cpu, "ONEDNN_MIN_MACS", large)
        patch.setattr(cpu, "WINDOW_ELEMENTS", large_window)
        patch.setattr(cpu, "ONEDNN", onednn and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
        served = []
        patch.setattr(cpu, "forward", lambda *a, whole=cpu.forward, **k: served.append(1) or whole(*a, **k))
        fast = run(block, x, extent, real, weight, dtype if dtype == torch.bfloat16 else None)
        assert served
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            torch.manual_seed(0)
            alone = block(x.clone(), extent, real)
        served.clear()
        exact = run(copy.deepcopy(block).double(), x.double(), extent, real, weight.double())
        assert not served
    torch.testing.assert_close(alone.double(), fast[0].double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4)
    largest = max(truth.norm() for truth in exact)  # a short sum that cancels has the error of what it adds
    for actual, truth in zip(fast, exact, strict=True):
        assert actual.shape == truth.shape
        assert (actual.double() - truth).norm() <= TOLERANCE[dtype] * (truth.norm() + 0.1 * largest)


@settings(max_examples=20)
@given(
    kind=st.sampled_from(sorted(BLOCKS)), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 9)
)
def test_a_frozen_model_computes_the_same_until_it_is_frozen_again_or_trained(kind, dtype, seed):
    torch.manual_seed(seed)
    sizes = {"frames": 4, "image_size": 32, "num_classes": 3, "depths": (1, 1, 1, 1)}
    model = create_model("tiny", blocks=kind, **sizes).eval()
    clips = torch.randn(2, 3, 4, 32, 32), torch.randn(1, 3, 3, 24, 40)

    def logits(model):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return [model(clip) for clip in clips]

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    before = logits(model)
    frozen = model.freeze()
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    for _ in range(2):
        assert equal(logits(frozen), before)
    units = [unit for module in model.modules() if isinstance(module, Block) for unit in module.units.values()]
    with torch.no_grad():
        for unit in units:
            for parameter in unit.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert equal(logits(frozen), before)
    after = logits(copy.deepcopy(frozen).freeze())
    assert not equal(after, before)
    assert equal(logits(frozen), before)
    assert equal(logits(frozen.train().eval()), after)


FAULTS = """
import resource, torch
from posmlp import create_model
model = create_model("tiny")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
model.freeze()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told")
def test_the_process_of_a_frozen_model_keeps_freed_memory():
    """32 MiB are 8,192 pages, of which each is faulted in again if the system has it back (512 pages at a time, if it
    has huge ones)."""
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    before, after = map(int, printed.split())
    assert before >= 3 * 16 and after < before / 10


def test_a_frozen_model_still_has_the_gradient_of_its_input():
    torch.manual_seed(0)
    model, clip = create_model("tiny", frames=4, image_size=32).eval(), torch.randn(1, 3, 4, 32, 32).requires_grad_()
    (expected,) = torch.autograd.grad(model(clip).square().sum(), clip)
    frozen = model.freeze()
    frozen(clip.detach())
    (found,) = torch.autograd.grad(frozen(clip).square().sum(), clip)
    torch.testing.assert_close(found, expected)


def test_a_frozen_supernet_is_its_own_architecture():
    torch.manual_seed(0)
    choices = {"blocks": (("parallel", "joint"),) * 4, "depths": ((1,),) * 4}
    sizes = {"frames": 4, "image_size": 32, "num_classes": 3, "depths": (1, 1, 1, 1)}
    model, clip = create_model("tiny", choices=choices, blocks="joint", **sizes).eval(), torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        expected = model(clip)
        frozen = model.freeze()
        assert not isinstance(frozen, Supernet)
        torch.testing.assert_close(frozen(clip), expected, rtol=0, atol=0)
        for parameter in model.stages.parameters():
            parameter.zero_()
        blocks = [module for module in frozen.modules() if isinstance(module, Block)]
        assert all(block.frozen for block in blocks)


def test_frozen_parameters_get_no_gradient_and_what_is_compiled_or_in_fp64_is_not_served():
    block, x, extent, real = make("parallel", 2, (2, 2, 2), (2, 4, 4), 1)
    block.requires_grad_(False)
    gate = block.units["spatial"].gate.requires_grad_(True)
    block(x, extent, real).sum().backward()
    assert {name for name, p in block.named_parameters() if p.grad is not None} == {
        "units.spatial.gate.table",
        "units.spatial.gate.bias",
    }
    assert gate.table.grad.abs().sum() > 0
    assert cpu.supports(x) and not cpu.supports(x.double())
    with torch.autocast("cpu", torch.float16):
        assert not cpu.supports(x)


def test_the_batch_norm_kernel_is_a_layer_norm_over_channels_forward_and_backward():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x = (3 * torch.randn(2, 24, 50) + 100).to(dtype)  # a mean much larger than the deviation
        weight = torch.randn_like(x)
        exact = x.double().requires_grad_()
        truth = nn.functional.layer_norm(exact.mT, (24,)).mT
        (gradient,) = torch.autograd.grad((truth * weight.double()).sum(), exact)
        normed, rstd = cpu.channel_norm(x, dtype)
        assert normed.dtype == dtype and rstd.dtype == torch.float32 and (normed[:, -1] == 1).all()
        torch.testing.assert_close(normed[:, :-1].double(), truth.detach(), rtol=tolerance, atol=tolerance * 4)
        found = cpu.channel_norm_backward(weight, normed, rstd)
        torch.testing.assert_close(found.double(), gradient, rtol=tolerance, atol=tolerance * 4)
