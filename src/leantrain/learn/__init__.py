"""How the gradient is found: learners, which turn a batch into `.grad`."""

from __future__ import annotations

from leantrain.learn.activation_checkpointing import checkpoint_activations
from leantrain.learn.backprop import Backprop
from leantrain.learn.protocol import Batch, Learner, StepResult

__all__ = ["Backprop", "Batch", "Learner", "StepResult", "checkpoint_activations"]
