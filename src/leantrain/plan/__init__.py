"""What will fit a memory, told before anything is allocated, and held to what two real steps then measure."""

from leantrain.plan.check import Measured, measure
from leantrain.plan.memory_size import memory_size
from leantrain.plan.plan import Combination, Plan, Prediction, make_plan, predict
from leantrain.plan.subject import Subject, from_recipe, language_model, named

__all__ = [
    "Combination",
    "Measured",
    "Plan",
    "Prediction",
    "Subject",
    "from_recipe",
    "language_model",
    "make_plan",
    "measure",
    "memory_size",
    "named",
    "predict",
]
