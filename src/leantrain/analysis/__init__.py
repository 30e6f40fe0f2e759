"""Looking at a network or at a run."""

from leantrain.analysis.weight_entropy import EntropyPoint, WeightEntropy, draw_entropy, weight_entropy

__all__ = ["EntropyPoint", "WeightEntropy", "draw_entropy", "weight_entropy"]
