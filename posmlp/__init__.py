"""PosMLP-Video: an MLP-like video backbone that mixes tokens by learned relative position biases."""

from posmlp.model.checkpoint import load_published
from posmlp.model.variants import create_model, list_models

__all__ = ["create_model", "list_models", "load_published"]
