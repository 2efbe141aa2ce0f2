"""The optimizer, and the learning-rate schedule (LR scheduler)."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.optim import AdamW

from posmlp.learn.finetune import rate_scales
from posmlp.model.backbone import PosMLPVideo

if TYPE_CHECKING:  # it needs pydantic
    from posmlp.config import OptimSection, TrainSection

RATE_SCALE = "rate_scale"  # of a parameter group with layer decay: its share of the learning rate


def build_optimizer(model: nn.Module, config: OptimSection) -> AdamW:
    """Create AdamW without weight decay on 1-D parameters: biases, norms and token biases.

    The published code decays the token biases, which start at 0 there. Here they start at 1, a gate that lets its input
    through, and a decay would pull them away from it.

    It is the fused one, which skips a step on the device where ``found_inf`` is 1 (``posmlp.learn.learner``).

    Frozen parameters are left out. With ``layer_decay`` each layer has groups of its own, the last layer first, whose
    ``RATE_SCALE`` is the layer's share of the learning rate.
    """
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales: dict[str, float] = {}
    if config.layer_decay is not None:
        scales = rate_scales(cast(PosMLPVideo, model), config.layer_decay)
    groups: list[dict[str, Any]] = []
    for scale in sorted({scales.get(name, 1.0) for name, _ in learning}, reverse=True):
        parameters = [p for name, p in learning if scales.get(name, 1.0) == scale]
        extra = {RATE_SCALE: scale} if scales else {}
        groups += [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay, **extra},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, **extra},
        ]
    return AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(epoch: float, train: TrainSection, config: OptimSection) -> float:
    """The learning-rate schedule: linear warm-up from 0, then half a cosine down to ``min_lr``, or steps.

    With ``schedule: steps``, the rate is multiplied by ``step_factor`` at each of ``step_epochs``, and never falls
    below ``min_lr``.

    Args:
        epoch: position in training, in epochs with a fraction; 2.5 is half-way through the third epoch.
        train: gives the number of epochs, and the global batch. With ``lr_batch``, both rates are scaled in proportion
            to the global batch (arXiv:1706.02677).
        config: the rates.
    """
    scale = train.global_batch / config.lr_batch if config.lr_batch else 1.0
    peak, floor = config.lr * scale, config.min_lr * scale
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    if config.schedule == "steps":
        return max(floor, peak * config.step_factor ** bisect.bisect_right(config.step_epochs, epoch))
    progress = min(1.0, (epoch - config.warmup_epochs) / max(1e-9, train.epochs - config.warmup_epochs))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
