"""How a gradient becomes a step: optimizers built from composable rules, their bases, groups and schedules."""

from leantrain.optim.adam import Adam
from leantrain.optim.adamw import AdamW
from leantrain.optim.bases import SVD, Basis, SubspaceIteration
from leantrain.optim.chain import Chain
from leantrain.optim.galore import GaLoreAdamW
from leantrain.optim.groups import hidden_matrices, parameter_groups
from leantrain.optim.low_rank import LowRank
from leantrain.optim.rules import Factored, Rule, State, state_bytes
from leantrain.optim.schedules import schedule

__all__ = [
    "SVD",
    "Adam",
    "AdamW",
    "Basis",
    "Chain",
    "Factored",
    "GaLoreAdamW",
    "LowRank",
    "Rule",
    "State",
    "SubspaceIteration",
    "hidden_matrices",
    "parameter_groups",
    "schedule",
    "state_bytes",
]
