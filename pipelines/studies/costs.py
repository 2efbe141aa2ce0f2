"""Costs of models that need no measurement, and those of the published variants that figures mark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipelines.studies.pareto import comparable_trials
from pipelines.studies.pareto_plots import variants_in_range
from pipelines.studies.study import Trial
from posmlp import create_model
from posmlp.config import Config, ModelSection
from posmlp.metrics import COST_GMACS, COST_LATENCY_MS, COST_PARAMS_M
from posmlp.model.cost import count_macs, count_params
from posmlp.model.spec import VARIANTS


def static_costs(config: Config) -> dict[str, float]:
    """The costs of a recipe's model that need no measurement, by metric name."""
    with torch.device("meta"):  # no memory, no random numbers
        params = count_params(create_model(config.model.name, **config.model.overrides()))
    return {COST_GMACS: count_macs(config.model.variant()) / 1e9, COST_PARAMS_M: params / 1e6}


def published_variant_costs(recipe: Config, latencies: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The costs of the published variants (and ``tiny``) for a recipe's clips and classes, by name and metric.

    Args:
        latencies: milliseconds, by name, of the variants that were measured.
    """
    measured = {name: {COST_LATENCY_MS: latencies[name]} if name in latencies else {} for name in VARIANTS}
    return {name: static_costs(published_variant_recipe(recipe, name)) | measured[name] for name in VARIANTS}


def published_variant_recipe(recipe: Config, name: str) -> Config:
    """A recipe with a published variant as its model, for the same clips and classes."""
    own = recipe.model.variant()
    same = {key: getattr(own, key) for key in ("frames", "image_size", "num_classes", "stage4_stride")}
    model = ModelSection(name=name, **same)
    return recipe.model_copy(update={"model": model})


def variants_to_mark(trials: Sequence[Trial], recipe: Config) -> list[str]:
    """The published variants whose GMACs are near those of the trials, so that figures mark them."""
    values = [trial.metrics[COST_GMACS] for trial in comparable_trials(trials, "gmacs")]
    return [name for name, _ in variants_in_range(published_variant_costs(recipe, {}), "gmacs", values)]
