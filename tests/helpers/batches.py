"""Batches of random clips."""

import torch

from posmlp.video.batch import Batch, Boxes

DETECTION = ("task=detection", "data.format=ava", "data.classes=map.pbtxt")  # overrides of a recipe


def make_batch(count=8, seed=0, classes=8):
    g = torch.Generator().manual_seed(seed)
    return Batch(
        clips=torch.randint(0, 256, (count, 4, 32, 32, 3), dtype=torch.uint8, generator=g),
        labels=torch.arange(count) % classes,
        weights=torch.ones(count),
        seeds=torch.randint(0, 2**63 - 1, (count,), generator=g),
    )


def make_box_batch(count=8, seed=0, classes=8):
    """Each clip has 0 to 3 boxes, each of them 0 to all classes."""
    plain, g = make_batch(count, seed, classes), torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (count,), generator=g)
    number = torch.cat([torch.arange(n) for n in counts.tolist()])
    corners = torch.rand(len(number), 2, 2, generator=g).sort(1).values.flatten(1)
    boxes = Boxes(corners, torch.arange(count).repeat_interleave(counts), number, counts)
    labels = (torch.rand(len(number), classes, generator=g) < 0.3).float()
    return Batch(plain.clips, labels, plain.weights, plain.seeds, torch.arange(count), boxes)
