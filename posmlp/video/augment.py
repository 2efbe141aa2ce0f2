"""Model input from decoded clips, on the training device: augment, normalise, mix.

A clip's random numbers come from its seed, which is set where the clip is decoded, by counting
(``posmlp.video.random_bits``). Each augmentation has a key of its own, so switching one on does not change the numbers
of another. The host computes the random parameters of all clips at once and sends them to the device in one copy. It
reads nothing back and waits for nothing. The work on the device is a pure function of these parameters and the pixels
of one clip or one pair, so the result depends neither on the number of workers nor on the rest of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posmlp.errors import UserError
from posmlp.model.spec import suggest
from posmlp.video.batch import Batch
from posmlp.video.classes import ClassIndex
from posmlp.video.randaugment import NUMBERS_PER_LAYER, Pass, draw_operations, plan_passes, randaugment
from posmlp.video.random_bits import normals, random_bits, uniforms
from posmlp.video.sampling import Box, random_resized_crop

if TYPE_CHECKING:  # it needs pydantic
    from posmlp.config import AugmentSection, Config

# data.normalisation -> mean and standard deviation of the pixels, RGB in 0..1
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "slowfast": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),  # defaults of PySlowFast and of the published code
}
ERASED_AREA = (0.02, 1 / 3)  # as a share of the frame
ERASED_RATIO = (0.3, 1 / 0.3)  # width : height

Array = NDArray[np.generic]


def to_input(clips: Tensor, config: Config) -> Tensor:
    """Model input for evaluation: clips without augmentation.

    Args:
        clips: uint8 ``[B, T, H, W, 3]``, on the device that does the work.
        config: the recipe, for ``data.normalisation`` and ``data.modality``.

    Returns:
        float32 ``[B, 3, T, H, W]``, normalised. For modality ``rgb_difference`` (TSN, arXiv:1608.00859, section 3.2)
        each frame minus the one before; the first difference is repeated to keep T frames.
    """
    mean, std = (filled(values, clips.device) for values in NORMALISATIONS[config.data.normalisation])
    return normalise(channels_first(clips).float().div_(255), mean, std, config)


def filled(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers as a float32 tensor that the device itself fills: ``torch.tensor`` makes the host wait for a copy."""
    return torch.cat([torch.full((1,), value, device=device) for value in values])


class Erasure(NamedTuple):
    """A box of a clip that is filled with noise; ``key`` is that of the noise."""

    clip: int
    box: Box
    key: int


class Parameters(NamedTuple):
    """The random parameters of a batch, on the host.

    Attributes:
        arrays: what the device reads, by name. ``mirrored``: int64 ``[m]``, the clips to flip. ``factors``: float32
            ``[B, 3]``, of brightness, contrast and saturation. ``boxes``: int64 ``[B, 4]``, top, bottom, left and right
            of the box that a clip takes from its partner. ``kept``: float32 ``[B, 2]``, a clip's share of itself
            outside the box, and in the target.
        passes: of RandAugment.
        erasures: in the order of the clips.
    """

    arrays: dict[str, Array]
    passes: list[Pass[Array]]
    erasures: list[Erasure]


class AugmentedClips(NamedTuple):
    """Clips after all augmentations but mixing.

    Attributes:
        x: float32 ``[B, 3, T, H, W]`` as from ``to_input``.
        mirrored: int64 ``[m]``, the clips that are flipped.
        mixing: ``boxes`` and ``kept`` of ``Parameters``, on the device; None without mixing.
    """

    x: Tensor
    mirrored: Tensor
    mixing: tuple[Tensor, Tensor] | None


def to_train_input(batch: Batch, config: Config, flipped: Tensor) -> tuple[Tensor, Tensor]:
    """Model input and targets for training of recognition: ``augment_clips``, then mixing.

    Mixing acts on the model's input, for any modality.

    Args:
        batch: the clips. The ``data.repeats`` clips of a video are adjacent, and so are the two videos of a pair.
        flipped: int64 ``[num_classes]``, the label of each class after a flip (``flip_labels``).

    Returns:
        float32 ``[B, 3, T, H, W]`` as from ``to_input``, and float32 ``[B, num_classes]``: the share of each class.
        The loss does the label smoothing. Smoothing is linear, so its order relative to mixing makes no difference.
    """
    (x, mirrored, mixing), labels = augment_clips(batch, config), batch.labels
    if len(mirrored):
        labels = labels.index_copy(0, mirrored, flipped[labels[mirrored]])
    targets = torch.zeros(len(labels), len(flipped), device=x.device).scatter_(1, labels.unsqueeze(1), 1.0)
    if mixing:
        weights = batch.weights.to(x.device, non_blocking=True)
        x, targets = mix_pairs(x, targets, weights, *mixing, config.data.repeats)
    return x, targets


def augment_clips(batch: Batch, config: Config) -> AugmentedClips:
    """Augment and normalise the clips of a batch: flip, RandAugment, jitter, normalise, difference, erase.

    Colours change before frames are differenced. Erasing acts on the model's input, for any modality.
    """
    settings, device = config.augment, batch.clips.device
    height, width = batch.clips.shape[2:4]
    host = draw_parameters(batch.seeds, settings, height, width, config.data.repeats)
    constants = [np.array(v, np.float32) for v in NORMALISATIONS[config.data.normalisation]]
    sent = iter(send([*constants, *host.arrays.values(), *(a for p in host.passes for a in p[1:])], device))
    mean, std = next(sent), next(sent)
    on_device = {name: next(sent) for name in host.arrays}
    passes = [Pass(p.function, next(sent), next(sent)) for p in host.passes]

    x = channels_first(batch.clips)
    if len(mirrored := on_device["mirrored"]):
        x.index_copy_(0, mirrored, x.index_select(0, mirrored).flip(-1))
    randaugment(x, passes)
    x = normalise(color_jitter(x, on_device.get("factors"), settings), mean, std, config)
    random_erasing(x, host.erasures)
    mixing = (on_device["boxes"], on_device["kept"]) if "kept" in on_device else None
    return AugmentedClips(x, mirrored, mixing)


def draw_parameters(seeds: Tensor, settings: AugmentSection, height: int, width: int, repeats: int) -> Parameters:
    """Draw the random parameters of all clips.

    Args:
        seeds: int64 ``[B]``, on the CPU.
        height, width: of the frames, in pixels.
        repeats: how many adjacent clips one video has.
    """
    layers = settings.randaug_layers
    keys = random_bits(seeds, 7)  # of each augmentation, and of the box and the noise of an erasure
    numbers = uniforms(keys[:, :5], max(5, NUMBERS_PER_LAYER * layers))  # [B, 5, count]
    flip, randaug, color, erase, mix = numbers.unbind(1)
    arrays: dict[str, Array] = {"mirrored": np.flatnonzero(flip[:, 0].numpy() < settings.flip)}
    passes: list[Pass[Array]] = []
    if layers:
        of_layers = randaug[:, : NUMBERS_PER_LAYER * layers].unflatten(1, (layers, NUMBERS_PER_LAYER))
        passes = plan_passes(draw_operations(of_layers, settings.randaug_magnitude), height, width)
    strengths = np.array([settings.brightness, settings.contrast, settings.saturation])
    if strengths.any():
        arrays["factors"] = (1 + strengths * (2 * color[:, :3].numpy() - 1)).astype(np.float32)
    erased = (erase[:, 0] < settings.erasing).tolist()
    erasures = [
        Erasure(clip, erased_box(height, width, of_box), of_noise)
        for clip, (of_box, of_noise) in enumerate(keys[:, 5:].tolist())
        if erased[clip]
    ]
    if settings.mixup or settings.cutmix:
        arrays["boxes"], arrays["kept"] = draw_mixing(mix, settings, height, width, repeats)
    return Parameters(arrays, passes, erasures)


def send(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device in one transfer, for which the host does not wait."""
    sizes = [-(-array.nbytes // 8) * 8 for array in arrays]  # each begins where any type may
    starts = np.cumsum([0, *sizes]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for array, start in zip(arrays, starts, strict=False):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


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


def normalise(x: Tensor, mean: Tensor, std: Tensor, config: Config) -> Tensor:
    """Model input from values in 0..1, ``[B, 3, T, H, W]``. Overwrites ``x``; ``mean`` and ``std`` are ``[3]``."""
    x = x.sub_(mean.view(3, 1, 1, 1)).div_(std.view(3, 1, 1, 1))
    if config.data.modality == "rgb_difference":
        change = x.diff(dim=2)
        x = torch.cat([change[:, :, :1], change], dim=2)
    return x


def color_jitter(x: Tensor, factors: Tensor | None, config: AugmentSection) -> Tensor:
    """Change the colours: uint8 ``[B, 3, T, H, W]`` to float32 in 0..1 of the same shape.

    Brightness scales the values, contrast their distance from the clip's mean, saturation their distance from grey.

    Args:
        factors: float32 ``[B, 3]``, of brightness, contrast and saturation; None changes nothing.
    """
    values = x.float().div_(255)
    if factors is None:
        return values
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1, 1).unbind(1)
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


def erased_box(height: int, width: int, key: int) -> Box:
    """The box of an erasure; ``key`` is an int64."""
    rng = np.random.default_rng(key % 2**64)
    return random_resized_crop(height, width, ERASED_AREA, ERASED_RATIO, rng)


def random_erasing(x: Tensor, erasures: Sequence[Erasure]) -> None:
    """Random erasing (arXiv:1708.04896) in place, as in MViT.

    One box, the same in all frames, is filled with noise from N(0, 1), drawn for each pixel of each frame.
    """
    if not erasures:
        return
    views = [crop(x[erasure.clip], erasure.box) for erasure in erasures]
    counts = [view.numel() for view in views]
    noise = normals([erasure.key for erasure in erasures], counts, x.device)
    for view, values in zip(views, noise.split(counts), strict=True):
        view.copy_(values.view_as(view))


def draw_mixing(
    numbers: Tensor, config: AugmentSection, height: int, width: int, repeats: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw the ``boxes`` and ``kept`` of ``Parameters``.

    Both clips of a pair take the same share of each other, drawn from the numbers of the first. If both methods are on,
    each is used for half of the pairs.

    Args:
        numbers: float64 ``[B, at least 5]``, uniform in [0, 1).
    """
    boxes, kept = np.zeros((len(numbers), 4), np.int64), np.ones((len(numbers), 2), np.float32)
    for i, (choice, y, x, *two) in enumerate(numbers[:, :5].tolist()):
        if i // repeats % 2:  # the second of a pair
            boxes[i], kept[i] = boxes[i - repeats], kept[i - repeats]
            continue
        if config.cutmix and (not config.mixup or choice < 0.5):
            box = cut_box(height, width, 1 - symmetric_beta(config.cutmix, *two), y, x)
            boxes[i] = box.top, box.top + box.height, box.left, box.left + box.width
            kept[i, 1] = 1 - box.height * box.width / (height * width)
        else:
            kept[i] = symmetric_beta(config.mixup, *two)
    return boxes, kept


def symmetric_beta(alpha: float, u: float, v: float) -> float:
    """A number from Beta(alpha, alpha), from two that are uniform in [0, 1).

    From Student's t by the polar method (Bailey, https://doi.org/10.1090/S0025-5718-1994-1219702-8): with 2 alpha
    degrees of freedom, t / sqrt(2 alpha + t^2) is 2 Beta(alpha, alpha) - 1.
    """
    p, cosine = u ** (1 / alpha), math.cos(math.tau * v)
    scaled = (1 - p) * cosine**2  # t^2 / (2 alpha), times p
    return (1 + math.copysign(math.sqrt(scaled / (p + scaled)), cosine)) / 2


def mix_pairs(
    x: Tensor, y: Tensor, weights: Tensor, boxes: Tensor, kept: Tensor, repeats: int
) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899) of neighbouring videos.

    Videos 2k and 2k + 1 are a pair, and their clips are matched in order. A pair with a clip that is padding stays
    unchanged.

    Args:
        x: ``[B, 3, T, H, W]``, B a multiple of ``2 * repeats``.
        y: ``[B, num_classes]``, the shares of the classes.
        weights: ``[B]``, 0 for padding.
        boxes, kept: as in ``Parameters``.
        repeats: how many adjacent clips one video has.
    """

    def partner(of: Tensor) -> Tensor:
        return of.unflatten(0, (-1, 2, repeats)).flip(1).flatten(0, 2)

    height, width = x.shape[-2:]
    down, across = torch.arange(height, device=x.device).unsqueeze(1), torch.arange(width, device=x.device)
    top, bottom, left, right = boxes.view(-1, 4, 1, 1).unbind(1)  # each [B, 1, 1]
    outside = (down < top) | (down >= bottom) | (across < left) | (across >= right)  # [B, H, W]
    whole = ((weights == 0) | (partner(weights) == 0)).unsqueeze(1)  # [B, 1]
    pixels, labels = kept.masked_fill(whole, 1.0).split(1, 1)  # [B, 1] each
    own = pixels.unsqueeze(2) * (outside | whole.unsqueeze(2))
    return torch.lerp(partner(x), x, own[:, None, None]), torch.lerp(partner(y), y, labels)


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
