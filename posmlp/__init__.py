"""PosMLP-Video: an MLP-like video backbone that mixes tokens by learned relative position biases."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posmlp.model.checkpoint import load_published
    from posmlp.model.variants import create_model, list_models

__all__ = ["create_model", "list_models", "load_published"]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: a decoding process must not pay for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "checkpoint" if name == "load_published" else "variants"
    return getattr(import_module(f"posmlp.model.{module}"), name)
