"""``create_model``: from a model's name and overrides to a module with fresh weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from posmlp.model.backbone import PosMLPVideo
from posmlp.model.spec import model_variant
from posmlp.model.supernet import Supernet


def create_model(name: str, **overrides: Any) -> PosMLPVideo:
    """Build a model with fresh weights.

    Args:
        name: one of ``list_models()``.
        overrides: fields of ``posmlp.model.spec.Variant`` that differ from the named model, as plain data.

    Returns:
        A module that maps clips ``[B, 3, T, H, W]`` to logits ``[B, num_classes]``, or with boxes ``[N, 4]`` and the
        clip of each to ``[N, num_classes]``; its ``features`` method returns the feature maps of the stages. With
        ``choices`` it is a ``Supernet``.

    Raises:
        UserError: a ValueError; the name or an override is unknown, or the combination cannot be built.
    """
    variant = model_variant(name, **overrides)
    keys = ("dims", "num_classes", "drop_path", "dropout", "stage4_stride", "init")
    same = {key: getattr(variant, key) for key in keys} | {"windows": variant.full_windows()}
    own = variant.architecture()
    if variant.choices:
        return Supernet(variant.choices.with_defaults(own), own, **same)
    return PosMLPVideo(**same, **asdict(own))
