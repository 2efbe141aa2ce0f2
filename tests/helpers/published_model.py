"""A checkpoint as the published code writes it, with deterministic weights, and the run that is imported from it."""

import importlib.util
import json
from pathlib import Path

import torch

import posmlp
from pipelines.inference.importing import import_model
from tests.helpers.small_runs import recipe_for

PARITY = Path(__file__).parents[1] / "parity"
CASE = json.loads((PARITY / "cases.json").read_text())["tiny"]
PUBLISHED = ["data.normalisation=slowfast", "eval.fusion=logits", "eval.clip_positions=slowfast", "data.modality=rgb"]
WINDOWS = f"model.windows={CASE['win']}"

spec = importlib.util.spec_from_file_location("fill", PARITY / "fill.py")
fill = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill)


def release_state():
    """The tiny model with 7 classes, by the release's names."""
    return {k: torch.from_numpy(v) for k, v in fill.state(PARITY / "layout_tiny.json").items()}


def write_imported_run(folder, motion_set):
    """Import a model of the motion set's 8 classes, to be tested with 2 x 3 views as the published code does.

    Returns:
        The run's folder, its recipe, and the model, loaded from the file without the run.
    """
    state = release_state()
    state |= {key: torch.cat([state[key], state[key][:1] + 0.1]) for key in ("head.weight", "head.bias")}
    torch.save({"model_state": state}, folder / "w.pth")
    views = ["eval.clips=2", "eval.crops=3", "eval.short_side=32", "data.short_side=4096", "data.cache_dir=null"]
    config = recipe_for(folder, motion_set, *PUBLISHED, WINDOWS, *views)
    model = posmlp.create_model("tiny", windows=CASE["win"], num_classes=8).eval()
    posmlp.load_published(model, folder / "w.pth")
    return import_model(str(folder / "w.pth"), config).run, config, model


def published_logits(model, clips):
    """Logits of uint8 clips ``[B, T, H, W, 3]``, normalised by the published code's rule; float64 ``[B, classes]``."""
    with torch.no_grad():
        return model((torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 255 - 0.45) / 0.225).double().numpy()
