"""From decoded clips to the model's input, on the training device: augment, normalise, mix.

A clip's random numbers come from its seed, which travels with it from where it was decoded; each augmentation has a
stream of its own, so that switching one on does not change another's numbers. They are drawn on the CPU; what happens
on the device is a pure function of them and the pixels of one clip or one pair. So the number of workers, and what else
is in the batch, change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp.config import AugmentSection, Config
from posmlp.errors import UserError
from posmlp.model.spec import suggest
from posmlp.video.randaugment import draw_steps, randaugment
from posmlp.video.sampling import Box, random_resized_crop

if TYPE_CHECKING:
    from posmlp.learn.learner import Batch

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1; the release has 0.45 and 0.225 for all three
STD = (0.229, 0.224, 0.225)
ERASED_AREA = (0.02, 1 / 3)  # of the frame
ERASED_RATIO = (0.3, 1 / 0.3)  # width : height

Rngs = Sequence[np.random.Generator]  # one a clip


def to_input(clips: Tensor, config: Config) -> Tensor:
    """Model input of clips as they are, for evaluation.

    Args:
        clips: uint8 ``[B, T, H, W, 3]``, on the device that shall do the work.
        config: the recipe, for ``data.modality``.

    Returns:
        float32 ``[B, 3, T, H, W]``, normalised; of the modality ``rgb_difference`` (TSN, arXiv:1608.00859, section 3.2)
        every frame minus the one before, the first as the second.
    """
    return normalise(channels_first(clips).float().div_(255), config)


def to_train_input(batch: Batch, config: Config, flipped: Tensor) -> tuple[Tensor, Tensor]:
    """Model input and targets for training: flip, RandAugment, jitter, normalise, difference, erase, mix.

    Colours change before frames are differenced; erasing and mixing act on the model's input, whatever the modality.

    Args:
        batch: the clips; the repeats of a video are adjacent (``data.repeats``), and so are the videos of a pair.
        flipped: int64 ``[num_classes]``, a class's label after a flip (``flip_labels``).

    Returns:
        float32 ``[B, 3, T, H, W]`` as of ``to_input``, and float32 ``[B, num_classes]``: the share of each class.
        Label smoothing is left to the loss; as it is linear, smoothing before or after mixing is the same.
    """
    settings = config.augment
    streams = (np.random.default_rng(seed).spawn(5) for seed in batch.seeds.tolist())
    flips, operations, colours, boxes, mixes = zip(*streams, strict=True)

    x, labels = channels_first(batch.clips), batch.labels
    turned = [i for i, rng in enumerate(flips) if rng.random() < settings.flip]
    if turned:
        index = torch.tensor(turned, device=x.device)
        x.index_copy_(0, index, x.index_select(0, index).flip(-1))
        labels = labels.index_copy(0, index, flipped[labels[index]])
    if settings.randaug_layers:
        plans = [draw_steps(rng, settings.randaug_layers, settings.randaug_magnitude) for rng in operations]
        x = randaugment(x, plans)
    x = normalise(jitter(x, colours, settings), config)
    targets = F.one_hot(labels, len(flipped)).float()
    erase(x, boxes, settings.erasing)
    if settings.mixup or settings.cutmix:
        mix(x, targets, batch.weights.tolist(), mixes, settings, config.data.repeats)
    return x, targets


def flip_labels(flip_classes: Mapping[str, str], classes: Sequence[str], num_classes: int) -> Tensor:
    """A class's label after a flip: int64 ``[num_classes]``.

    Args:
        flip_classes: ``augment.flip_classes``; either class of an item becomes the other.
        classes: the class names; where there are none, classes are called by their labels, ``"0"`` and so on.

    Raises:
        UserError: an unknown class, or a class with two partners.
    """
    names = {name: i for i, name in enumerate(classes or map(str, range(num_classes)))}
    partner: dict[str, str] = {}
    for one, other in [pair for item in flip_classes.items() for pair in (item, item[::-1])]:
        if one not in names:
            raise UserError(f"augment.flip_classes: the data set has no class {one!r}{suggest(one, names)}")
        if partner.setdefault(one, other) != other:
            raise UserError(f"augment.flip_classes: a flip cannot turn {one!r} into {partner[one]!r} and {other!r}")
    labels = torch.arange(num_classes)
    for one, other in partner.items():
        labels[names[one]] = names[other]
    return labels


def channels_first(clips: Tensor) -> Tensor:
    """A copy, ``[B, T, H, W, 3]`` to ``[B, 3, T, H, W]``; cheaper of bytes than of floats."""
    return clips.permute(0, 4, 1, 2, 3).clone(memory_format=torch.contiguous_format)


def normalise(x: Tensor, config: Config) -> Tensor:
    """Values in 0..1 to the model's input, ``[B, 3, T, H, W]``; ``x`` is used up."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1, 1) for v in (MEAN, STD))
    x = x.sub_(mean).div_(std)
    if config.data.modality == "rgb_difference":
        change = x.diff(dim=2)
        x = torch.cat([change[:, :, :1], change], dim=2)
    return x


def jitter(x: Tensor, rngs: Rngs, config: AugmentSection) -> Tensor:
    """Values in 0..1, colours changed: uint8 to float32, ``[B, 3, T, H, W]``.

    Brightness scales the values, contrast their distance from the clip's mean, saturation that from grey.
    """
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    values = x.float().div_(255)
    if not strengths.any():
        return values
    factors = np.stack([1 + strengths * (2 * rng.random(3) - 1) for rng in rngs]).astype(np.float32)  # [B, 3]
    brightness, contrast, saturation = torch.from_numpy(factors).to(x.device).view(-1, 3, 1, 1, 1, 1).unbind(1)
    if config.brightness or config.contrast:
        sums = x.sum((1, 2, 3, 4), keepdim=True)  # of integers: the same in any batch
        mean = brightness * (sums / (255 * x[0].numel())).float()
        values.mul_(brightness * contrast).add_(mean * (1 - contrast))
    if config.saturation:
        grey = luma(values)
        values.sub_(grey).mul_(saturation).add_(grey)
    return values.clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Brightness of RGB ``[B, 3, ...]`` as ``[B, 1, ...]`` (ITU-R BT.601)."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def erase(x: Tensor, rngs: Rngs, probability: float) -> None:
    """Random erasing (arXiv:1708.04896) in place, as MViT's: the same box of all frames is filled with N(0, 1), new for
    each pixel of each frame."""
    channels, frames, height, width = x.shape[1:]
    for clip, rng in zip(x, rngs, strict=True):
        if rng.random() < probability:
            box = random_resized_crop(height, width, ERASED_AREA, ERASED_RATIO, rng)
            noise = rng.standard_normal((channels, frames, box.height, box.width), dtype=np.float32)
            inside(clip, box).copy_(torch.from_numpy(noise))


def mix(x: Tensor, y: Tensor, weights: Sequence[float], rngs: Rngs, config: AugmentSection, repeats: int) -> None:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of neighbouring videos, in place.

    The videos of a pair are 2k and 2k + 1, and their clips go together in order; both take the same share of each
    other, drawn from the first's numbers. Where both ways are on, each has half of the pairs. A pair with a clip that
    does not count stays as it is.

    Args:
        x: ``[B, 3, T, H, W]``, B a multiple of ``2 * repeats``.
        y: ``[B, num_classes]``, the shares of the classes.
        weights: of the B clips.
        repeats: adjacent clips of one video.
    """
    height, width = x.shape[-2:]
    for i, rng in enumerate(rngs):
        j = i + repeats
        if i // repeats % 2 or not (weights[i] and weights[j]):
            continue
        choice, *centre = rng.random(3)
        cut = config.cutmix and (not config.mixup or choice < 0.5)
        alpha = config.cutmix if cut else config.mixup
        kept = float(rng.beta(alpha, alpha))
        if cut:
            box = cut_box(height, width, 1 - kept, *centre)
            one, other = inside(x[i], box), inside(x[j], box)
            held = one.clone()
            one.copy_(other)
            other.copy_(held)
            kept = 1 - box.height * box.width / (height * width)
        else:
            blend(x[i], x[j], kept)
        blend(y[i], y[j], kept)


def blend(one: Tensor, other: Tensor, kept: float) -> None:
    """Each keeps a share of itself and takes the rest from the other, in place."""
    blended = torch.lerp(other, one, kept)
    other.lerp_(one, 1 - kept)
    one.copy_(blended)


def cut_box(height: int, width: int, share: float, y: float, x: float) -> Box:
    """A box of about that share of the frame, of the frame's shape, around (y, x) in 0..1; cut off at the border."""
    halves = (int(side * share**0.5) // 2 for side in (height, width))
    (top, bottom), (left, right) = (
        (max(int(place * side) - half, 0), min(int(place * side) + half, side))
        for place, side, half in zip((y, x), (height, width), halves, strict=True)
    )
    return Box(top, left, bottom - top, right - left)


def inside(clip: Tensor, box: Box) -> Tensor:
    """The box of all frames: a view ``[..., h, w]`` of ``[..., H, W]``."""
    return clip[..., box.top : box.top + box.height, box.left : box.left + box.width]
