"""How a gradient becomes a step: optimizers built from composable rules, their bases, groups and schedules."""

from leantrain.optim.adafactor import Adafactor
from leantrain.optim.adam import Adam
from leantrain.optim.adamw import AdamW
from leantrain.optim.adamw_low_bit import AdamW4bit, AdamW8bit
from leantrain.optim.apollo import APOLLO, APOLLOMini
from leantrain.optim.bases import (
    DCT,
    SVD,
    Basis,
    Coordinate,
    Identity,
    Random,
    RandomizedSVD,
    SubspaceIteration,
)
from leantrain.optim.chain import Chain
from leantrain.optim.dct_adamw import DCTAdamW
from leantrain.optim.galore import GaLoreAdamW
from leantrain.optim.galore_adafactor import GaLoreAdafactor
from leantrain.optim.groups import all_linear, hidden_matrices, parameter_groups
from leantrain.optim.in_backward import InBackward, step_in_backward
from leantrain.optim.lion import Lion
from leantrain.optim.low_bit import LowBit, LowBitBasis
from leantrain.optim.low_rank import LowRank
from leantrain.optim.low_rank_chain import LowRankChain
from leantrain.optim.momentum import Momentum
from leantrain.optim.q_galore import QGaLoreAdamW
from leantrain.optim.rules import Factored, Rule, State
from leantrain.optim.schedules import schedule
from leantrain.optim.state_size import predicted_state_bytes, state_bytes
from leantrain.optim.summary import summary, touched

__all__ = [
    "APOLLO",
    "DCT",
    "SVD",
    "APOLLOMini",
    "Adafactor",
    "Adam",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "Basis",
    "Chain",
    "Coordinate",
    "DCTAdamW",
    "Factored",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "Identity",
    "InBackward",
    "Lion",
    "LowBit",
    "LowBitBasis",
    "LowRank",
    "LowRankChain",
    "Momentum",
    "QGaLoreAdamW",
    "Random",
    "RandomizedSVD",
    "Rule",
    "State",
    "SubspaceIteration",
    "all_linear",
    "hidden_matrices",
    "parameter_groups",
    "predicted_state_bytes",
    "schedule",
    "state_bytes",
    "step_in_backward",
    "summary",
    "touched",
]
