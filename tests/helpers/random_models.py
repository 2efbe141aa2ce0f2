"""Checkpoints of models with random weights, for what needs a model but no training."""

import numpy as np
import torch

from pipelines.runs import checkpoints
from pipelines.runs.checkpoints import CheckpointInfo
from posmlp import create_model
from posmlp.video.augment import to_input
from posmlp.video.clip import load_clips

CLASSES = [f"class {i}" for i in range(8)]


def random_model(config, seed=0):
    """Of weights large enough that every clip gets other scores, the same for either ``model.init``."""
    torch.manual_seed(seed)
    model = create_model(config.model.name, **config.model.overrides() | {"init": "published"})
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.eval()


def write_checkpoint(run, config, step=3, metrics=None, classes=CLASSES):
    """A checkpoint of a random model of the recipe; returns its folder and the model."""
    model = random_model(config, step)
    about = CheckpointInfo(step, 1, metrics or {}, list(classes), config.model_dump(mode="json"))
    return checkpoints.save(str(run), about, model.state_dict(), {}), model


def plain_shares(model, config, uri, clips, crops, images=None):
    """A video's class probabilities by a plain loop over its views, in NumPy."""
    section = config.eval.model_copy(update={"clips": clips, "crops": crops})
    data = config.data.model_copy(update={"cache_dir": None})
    config = config.model_copy(update={"eval": section, "data": data})
    views, _ = load_clips(str(uri), "any", config, epoch=0, train=False, images=images)
    shares = []
    for view in views:
        with torch.no_grad():
            logits = model(to_input(torch.from_numpy(view)[None], config))[0].double().numpy()
        shares.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    return np.mean(shares, 0)


def videos_of(motion_set, count):
    lines = (motion_set / "val.csv").read_text().splitlines()[1:]
    return [str(motion_set / line.split(",")[0]) for line in lines[:count]]
