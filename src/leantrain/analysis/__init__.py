"""Looking at a network or at a run."""

from leantrain.analysis.early_exit import EarlyExit, early_exit
from leantrain.analysis.probe import Probed, draw_probes, probe
from leantrain.analysis.weight_entropy import EntropyPoint, WeightEntropy, draw_entropy, weight_entropy

__all__ = [
    "EarlyExit", "EntropyPoint", "Probed", "WeightEntropy", "draw_entropy", "draw_probes", "early_exit", "probe",
    "weight_entropy",
]  # fmt: skip
