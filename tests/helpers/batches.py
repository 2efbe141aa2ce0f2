"""Batches of random clips."""

import torch

from posmlp.video.batch import Batch


def make_batch(count=8, seed=0, classes=8):
    g = torch.Generator().manual_seed(seed)
    return Batch(
        clips=torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=g),
        labels=torch.arange(count) % classes,
        weights=torch.ones(count),
        seeds=torch.randint(0, 2**63 - 1, (count,), generator=g),
    )
