"""PosMLP-Video: an MLP-like video backbone that mixes tokens by learned relative position biases."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posmlp.model.checkpoint import load_published
    from posmlp.model.create import create_model
    from posmlp.model.spec import list_models

    __version__: str

__all__ = ["__version__", "create_model", "list_models", "load_published"]

_MODULES = {"create_model": "create", "list_models": "spec", "load_published": "checkpoint"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that a process that only decodes videos does not import PyTorch."""
    if name == "__version__":
        return _version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"posmlp.model.{_MODULES[name]}"), name)


def _version() -> str:
    """The installed distribution's version, as in ``pyproject.toml``; ``0+unknown`` where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("posmlp-video")
    except PackageNotFoundError:
        return "0+unknown"
