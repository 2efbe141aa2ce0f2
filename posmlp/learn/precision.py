"""The precision of activations in training and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # it needs pydantic
    from posmlp.config import Config

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by train.precision; fp32 has no autocast


def autocast(device: torch.device, config: Config) -> AbstractContextManager[Any]:
    """Autocast context for the recipe's ``train.precision``, in training and evaluation."""
    dtype = AUTOCAST_DTYPES.get(config.train.precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
