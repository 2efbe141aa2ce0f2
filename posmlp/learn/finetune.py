"""Fine-tuning: which parts of a model learn, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from torch import nn

from posmlp.model.backbone import PosMLPVideo, Stage

Freeze = int | Literal["all"] | None  # optim.freeze


def frozen_parts(model: PosMLPVideo, freeze: Freeze) -> list[nn.Module]:
    """The modules that do not learn.

    Args:
        freeze: a number n: the stem and the first n stages. ``all``: everything but the classifier (linear probe).
            None: nothing.
    """
    if freeze is None:
        return []
    if freeze == "all":
        return [model.stem, *model.stages, model.norm]
    return [model.stem, *list(model.stages)[:freeze]]


def freeze_parts(model: PosMLPVideo, freeze: Freeze) -> list[nn.Module]:
    """Take the parameters of the frozen parts out of training; returns the parts.

    A part without trainable parameters, and nothing trainable before it, runs without building a graph. Call it before
    the model is wrapped for distributed training, which then leaves these parameters out of its communication.
    """
    parts = frozen_parts(model, freeze)
    for part in parts:
        part.requires_grad_(False)
    return parts


def describe_frozen(model: nn.Module, freeze: Freeze) -> str:
    """How many of a model's parameters learn, as text; empty if nothing is frozen.

    Args:
        model: after ``freeze_parts``.
    """
    if freeze is None:
        return ""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    learn, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    return f"optim.freeze {freeze}: {learn:,} of {total:,} parameters learn"


def layer_of(name: str, depths: Sequence[int]) -> int:
    """The layer of a parameter, as in BEiT (arXiv:2106.08254) and timm.

    The stem is layer 0. The blocks of all stages are layers 1, 2, ...; the downsampling of a stage belongs to its first
    block. The last norm and the classifier are the layer after the last block.

    Args:
        name: of the parameter in ``PosMLPVideo``.
        depths: number of blocks of each stage.
    """
    part, *rest = name.split(".")
    if part == "stem":
        return 0
    if part == "stages":
        stage, kind, *inner = rest
        return 1 + sum(depths[: int(stage)]) + (int(inner[0]) if kind == "blocks" else 0)
    return sum(depths) + 1


def rate_scales(model: PosMLPVideo, decay: float) -> dict[str, float]:
    """The share of the learning rate of each parameter, by name: ``decay`` to the power of its layers to the last one.

    Args:
        decay: ``optim.layer_decay``.
    """
    depths = [len(cast(Stage, stage).blocks) for stage in model.stages]
    last = sum(depths) + 1
    return {name: decay ** (last - layer_of(name, depths)) for name, _ in model.named_parameters()}
