"""Weights that come with the package. ``model.weights: posmlp:NAME`` starts a run from one of them.

``motion``: the model of the recipe ``small_data``, trained on drawn clips, first of single motions, then of strokes.
``benchmarks/packaged_weights.py`` makes the file.
"""

from __future__ import annotations

from pathlib import Path

from posmlp.errors import UserError

PREFIX = "posmlp:"
FOLDER = Path(__file__).parent
NORMALISATION = "imagenet"  # ``data.normalisation`` of their training


def is_packaged(weights: str) -> bool:
    """Return whether a value of ``model.weights`` names weights of the package."""
    return weights.startswith(PREFIX)


def packaged_file(weights: str) -> str:
    """Return the path of weights of the package.

    Args:
        weights: ``posmlp:NAME``.

    Raises:
        UserError: there are no weights of that name.
    """
    name, names = weights.removeprefix(PREFIX), sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    if name not in names:
        raise UserError(f"model.weights {weights}: the package has only the weights {', '.join(names)}")
    return str(FOLDER / f"{name}.safetensors")
