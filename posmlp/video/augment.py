"""From decoded clips to the model's input, on the training device: augment, normalise, lay out.

Every random number is drawn where the clip is decoded, from (seed, epoch, sample_id, view) (``draw``), and travels with
it; what happens on the device is then a pure function, the same on any worker.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from posmlp.config import AugmentSection, Config

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in 0..1, as in the published recipes
STD = (0.229, 0.224, 0.225)
DRAWS = 4  # flip, brightness, contrast, saturation


def draw(rng: np.random.Generator) -> np.ndarray:
    """The random numbers of one clip: float32 ``[DRAWS]``, uniform in [0, 1)."""
    return rng.random(DRAWS, dtype=np.float32)


def to_input(clips: Tensor, draws: Tensor | None, config: Config) -> Tensor:
    """Model input from decoded clips.

    Args:
        clips: uint8 ``[B, T, H, W, 3]``, on the device that shall do the work.
        draws: float32 ``[B, DRAWS]``, or None for no augmentation.
        config: the recipe, for ``augment`` and ``data.modality``.

    Returns:
        float32 ``[B, 3, T, H, W]``, normalised; of the modality ``rgb_difference`` (TSN, arXiv:1608.00859, section 3.2)
        every frame minus the one before, the first as the second.
    """
    x = clips.permute(0, 4, 1, 2, 3).float().div_(255)
    if draws is not None:
        x = augment(x, draws, config.augment)
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1, 1) for v in (MEAN, STD))
    x = (x - mean).div_(std).contiguous()
    if config.data.modality == "rgb_difference":
        change = x.diff(dim=2)
        x = torch.cat([change[:, :, :1], change], dim=2)
    return x


def augment(x: Tensor, draws: Tensor, config: AugmentSection) -> Tensor:
    """Flip and jitter colours, one change for all frames of a clip; x is ``[B, 3, T, H, W]`` in 0..1, and so is the
    result. Brightness scales the values, contrast their distance from the clip's mean, saturation that from grey."""
    flip, *jitter = draws.view(*draws.shape, 1, 1, 1, 1).unbind(1)
    if config.flip:
        x = torch.where(flip < config.flip, x.flip(-1), x)
    strengths = (config.brightness, config.contrast, config.saturation)
    brightness, contrast, saturation = (1 + s * (2 * d - 1) for s, d in zip(strengths, jitter, strict=True))
    if config.brightness:
        x = x * brightness
    if config.contrast:
        mean = x.mean((1, 2, 3, 4), keepdim=True)
        x = mean + (x - mean) * contrast
    if config.saturation:
        grey = luma(x)
        x = grey + (x - grey) * saturation
    return x.clamp(0, 1)


def luma(x: Tensor) -> Tensor:
    """Brightness of RGB ``[B, 3, ...]`` as ``[B, 1, ...]`` (ITU-R BT.601)."""
    weights = torch.tensor((0.299, 0.587, 0.114), device=x.device, dtype=x.dtype)
    return torch.einsum("bc...,c->b...", x, weights).unsqueeze(1)
