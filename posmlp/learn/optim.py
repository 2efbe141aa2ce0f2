"""The optimizer, and the learning-rate schedule (LR scheduler)."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW

from posmlp.config import OptimSection, TrainSection


def build_optimizer(model: nn.Module, config: OptimSection) -> AdamW:
    """Create AdamW without weight decay on 1-D parameters: biases, norms and token biases (the published recipe)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(epoch: float, train: TrainSection, config: OptimSection) -> float:
    """The learning-rate schedule: linear warm-up from 0, then half a cosine down to ``min_lr``.

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
    progress = min(1.0, (epoch - config.warmup_epochs) / max(1e-9, train.epochs - config.warmup_epochs))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
