"""The model against golden numbers of the published implementation (fp64, deterministic weights)."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import posmlp

FIXTURES = Path(__file__).parents[2] / "parity"


def load_fill():
    spec = importlib.util.spec_from_file_location("fill", FIXTURES / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fill = load_fill()
CASES = json.loads((FIXTURES / "cases.json").read_text())


def published_model(name, dtype):
    case = CASES[name]
    model = posmlp.create_model(
        "tiny" if name == "tiny" else "s16",
        dims=case["dims"],
        depths=case["layers"],
        groups=case["groups"],
        windows=case["win"],
        frames=case["frames"],
        num_classes=case["classes"],
        image_size=case["size"],
    )
    state = {k: torch.from_numpy(v) for k, v in fill.state(FIXTURES / f"layout_{name}.json").items()}
    report = posmlp.load_published(model, state)
    assert report.loaded == len(state) and not report.adapted
    clip = fill.clip((case["batch"], 3, case["frames"], case["size"], case["size"]))
    return model.to(dtype).eval(), torch.from_numpy(clip).to(dtype), np.load(FIXTURES / f"golden_{name}.npz")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_logits_equal_the_release(name, dtype, tolerance):
    model, clip, golden = published_model(name, dtype)
    with torch.no_grad():
        logits = model(clip)
    np.testing.assert_allclose(logits.double().numpy(), golden["logits"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_stage_statistics_and_table_gradients_equal_the_release(name):
    model, clip, golden = published_model(name, torch.float64)
    logits = model(clip)
    (logits * torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)).sum().backward()
    units = model.stages[0].blocks[0].units
    for kind in ("spatial", "temporal"):
        assert_close(units[kind].gate.table.grad.T, golden[f"grad_stage1_{kind}_table"])
    with torch.no_grad():
        for i, features in enumerate(model.features(clip), start=1):
            assert_close(features.mean((2, 3, 4)), golden[f"stage{i}_mean"])
            assert_close(features.std((2, 3, 4)), golden[f"stage{i}_std"])


def assert_close(actual, golden):
    """Within 1e-5 of the golden array's own size."""
    np.testing.assert_allclose(actual.detach().numpy(), golden, rtol=1e-5, atol=1e-5 * np.abs(golden).max())


def test_parameter_counts_are_the_published_ones():
    for name, case in CASES.items():
        model, _, _ = published_model(name, torch.float32)
        assert sum(p.numel() for p in model.parameters()) == case["params"]
