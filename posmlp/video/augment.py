"""Model input from decoded clips, on the training device: augment, normalise, mix.

A clip's random numbers come from its seed, which is set where the clip is decoded. Each augmentation has its own random
stream, so switching one on does not change the numbers of another. Random numbers are drawn on the CPU. The work on the
device is a pure function of these numbers and the pixels of one clip or one pair, so the result depends neither on the
number of workers nor on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posmlp.config import AugmentSection, Config
from posmlp.errors import UserError
from posmlp.model.spec import suggest
from posmlp.video.batch import Batch
from posmlp.video.classes import ClassIndex
from posmlp.video.randaugment import draw_operations, randaugment
from posmlp.video.sampling import Box, random_resized_crop

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1; the release uses 0.45 and 0.225 for all three channels
STD = (0.229, 0.224, 0.225)
ERASED_AREA = (0.02, 1 / 3)  # as a share of the frame
ERASED_RATIO = (0.3, 1 / 0.3)  # width : height

Rngs = Sequence[np.random.Generator]  # one per clip


def to_input(clips: Tensor, config: Config) -> Tensor:
    """Model input for evaluation: clips without augmentation.

    Args:
        clips: uint8 ``[B, T, H, W, 3]``, on the device that does the work.
        config: the recipe, for ``data.modality``.

    Returns:
        float32 ``[B, 3, T, H, W]``, normalised. For modality ``rgb_difference`` (TSN, arXiv:1608.00859, section 3.2)
        each frame minus the one before; the first difference is repeated to keep T frames.
    """
    return normalise(channels_first(clips).float().div_(255), config)


def to_train_input(batch: Batch, config: Config, flipped: Tensor) -> tuple[Tensor, Tensor]:
    """Model input and targets for training: flip, RandAugment, jitter, normalise, difference, erase, mix.

    Colours change before frames are differenced. Erasing and mixing act on the model's input, for any modality.

    Args:
        batch: the clips. The ``data.repeats`` clips of a video are adjacent, and so are the two videos of a pair.
        flipped: int64 ``[num_classes]``, the label of each class after a flip (``flip_labels``).

    Returns:
        float32 ``[B, 3, T, H, W]`` as from ``to_input``, and float32 ``[B, num_classes]``: the share of each class.
        The loss does the label smoothing. Smoothing is linear, so its order relative to mixing makes no difference.
    """
    settings = config.augment
    streams = (np.random.default_rng(seed).spawn(5) for seed in batch.seeds.tolist())
    flip_rngs, randaug_rngs, color_rngs, erase_rngs, mix_rngs = zip(*streams, strict=True)

    x, labels = channels_first(batch.clips), batch.labels
    mirrored = [i for i, rng in enumerate(flip_rngs) if rng.random() < settings.flip]
    if mirrored:
        index = torch.tensor(mirrored, device=x.device)
        x.index_copy_(0, index, x.index_select(0, index).flip(-1))
        labels = labels.index_copy(0, index, flipped[labels[index]])
    if settings.randaug_layers:
        operations = [draw_operations(rng, settings.randaug_layers, settings.randaug_magnitude) for rng in randaug_rngs]
        x = randaugment(x, operations)
    x = normalise(color_jitter(x, color_rngs, settings), config)
    targets = F.one_hot(labels, len(flipped)).float()
    random_erasing(x, erase_rngs, settings.erasing)
    if settings.mixup or settings.cutmix:
        mixup_or_cutmix(x, targets, batch.weights.tolist(), mix_rngs, settings, config.data.repeats)
    return x, targets


def flip_labels(flip_classes: Mapping[str, str], classes: Sequence[str], num_classes: int) -> Tensor:
    """The label of each class after a horizontal flip: int64 ``[num_classes]``.

    Args:
        flip_classes: ``augment.flip_classes``; a flip swaps the two classes of each item. Names match in any spelling
            (``posmlp.video.classes.same_name``).
        classes: the class names. If empty, the labels ``"0"``, ``"1"``, ... are the names.

    Raises:
        UserError: an unknown class, or a class with two partners.
    """
    names = list(classes) or [str(label) for label in range(num_classes)]
    index = ClassIndex(names)
    partner: dict[int, int] = {}
    for one, other in flip_classes.items():
        for name in (one, other):
            if index.get(name) < 0:
                raise UserError(f"augment.flip_classes: the data set has no class {name!r}{suggest(name, names)}")
        left, right = index.get(one), index.get(other)
        for label, flipped in ((left, right), (right, left)):
            if partner.setdefault(label, flipped) != flipped:
                both = f"{names[partner[label]]!r} and {names[flipped]!r}"
                raise UserError(f"augment.flip_classes: a flip cannot turn {names[label]!r} into {both}")
    labels = torch.arange(num_classes)
    for label, flipped in partner.items():
        labels[label] = flipped
    return labels


def channels_first(clips: Tensor) -> Tensor:
    """Copy ``[B, T, H, W, 3]`` to ``[B, 3, T, H, W]``; cheaper for bytes than for floats."""
    return clips.permute(0, 4, 1, 2, 3).clone(memory_format=torch.contiguous_format)


def normalise(x: Tensor, config: Config) -> Tensor:
    """Model input from values in 0..1, ``[B, 3, T, H, W]``. Overwrites ``x``."""
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1, 1) for v in (MEAN, STD))
    x = x.sub_(mean).div_(std)
    if config.data.modality == "rgb_difference":
        change = x.diff(dim=2)
        x = torch.cat([change[:, :, :1], change], dim=2)
    return x


def color_jitter(x: Tensor, rngs: Rngs, config: AugmentSection) -> Tensor:
    """Change the colours at random: uint8 ``[B, 3, T, H, W]`` to float32 in 0..1 of the same shape.

    Brightness scales the values, contrast their distance from the clip's mean, saturation their distance from grey.
    """
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    values = x.float().div_(255)
    if not strengths.any():
        return values
    factors = np.stack([1 + strengths * (2 * rng.random(3) - 1) for rng in rngs]).astype(np.float32)  # [B, 3]
    brightness, contrast, saturation = torch.from_numpy(factors).to(x.device).view(-1, 3, 1, 1, 1, 1).unbind(1)
    if config.brightness or config.contrast:
        sums = x.sum((1, 2, 3, 4), keepdim=True)  # integers: the sum is the same in any batch
        mean = brightness * (sums / (255 * x[0].numel())).float()
        values.mul_(brightness * contrast).add_(mean * (1 - contrast))
    if config.saturation:
        grey = luma(values)
        values.sub_(grey).mul_(saturation).add_(grey)
    return values.clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of RGB ``[B, 3, ...]``, as ``[B, 1, ...]``."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def random_erasing(x: Tensor, rngs: Rngs, probability: float) -> None:
    """Random erasing (arXiv:1708.04896) in place, as in MViT.

    One box, the same in all frames, is filled with noise from N(0, 1), drawn for each pixel of each frame.
    """
    channels, frames, height, width = x.shape[1:]
    for clip, rng in zip(x, rngs, strict=True):
        if rng.random() < probability:
            box = random_resized_crop(height, width, ERASED_AREA, ERASED_RATIO, rng)
            noise = rng.standard_normal((channels, frames, box.height, box.width), dtype=np.float32)
            crop(clip, box).copy_(torch.from_numpy(noise))


def mixup_or_cutmix(
    x: Tensor, y: Tensor, weights: Sequence[float], rngs: Rngs, config: AugmentSection, repeats: int
) -> None:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of neighbouring videos, in place.

    Videos 2k and 2k + 1 are a pair, and their clips are matched in order. Both clips take the same share of each other,
    drawn from the random stream of the first. If both methods are on, each is used for half of the pairs. A pair with a
    clip that is padding stays unchanged.

    Args:
        x: ``[B, 3, T, H, W]``, B a multiple of ``2 * repeats``.
        y: ``[B, num_classes]``, the shares of the classes.
        weights: one per clip, 0 for padding.
        repeats: how many adjacent clips one video has.
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
            one, other = crop(x[i], box), crop(x[j], box)
            copy_of_one = one.clone()
            one.copy_(other)
            other.copy_(copy_of_one)
            kept = 1 - box.height * box.width / (height * width)
        else:
            blend(x[i], x[j], kept)
        blend(y[i], y[j], kept)


def blend(one: Tensor, other: Tensor, kept: float) -> None:
    """Blend two tensors in place: each keeps the share ``kept`` of itself and takes the rest from the other."""
    blended = torch.lerp(other, one, kept)
    other.lerp_(one, 1 - kept)
    one.copy_(blended)


def cut_box(height: int, width: int, share: float, y: float, x: float) -> Box:
    """The box of CutMix: about ``share`` of the frame's area, with its aspect ratio, clipped at the border.

    ``y`` and ``x`` are the centre, in 0..1.
    """
    halves = (int(side * share**0.5) // 2 for side in (height, width))
    (top, bottom), (left, right) = (
        (max(int(centre * side) - half, 0), min(int(centre * side) + half, side))
        for centre, side, half in zip((y, x), (height, width), halves, strict=True)
    )
    return Box(top, left, bottom - top, right - left)


def crop(clip: Tensor, box: Box) -> Tensor:
    """A view of the box in all frames: ``[..., h, w]`` of ``[..., H, W]``."""
    return clip[..., box.top : box.top + box.height, box.left : box.left + box.width]
