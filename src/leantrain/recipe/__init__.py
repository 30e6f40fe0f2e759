"""A run, described: typed recipes and comparisons, read from YAML and flags, checked before anything starts."""

from leantrain.recipe.build import build_data, build_exchange, build_learner, build_model, build_optimizers
from leantrain.recipe.comparison import Comparison
from leantrain.recipe.read import (
    comparison_from_dict,
    comparison_to_dict,
    read_comparison,
    read_recipe,
    recipe_from_dict,
    recipe_to_dict,
)
from leantrain.recipe.schema import Component, Recipe

__all__ = [
    "Comparison",
    "Component",
    "Recipe",
    "build_data",
    "build_exchange",
    "build_learner",
    "build_model",
    "build_optimizers",
    "comparison_from_dict",
    "comparison_to_dict",
    "read_comparison",
    "read_recipe",
    "recipe_from_dict",
    "recipe_to_dict",
]
