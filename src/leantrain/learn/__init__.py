"""How the gradient is found: learners, which turn a batch into `.grad`."""

from __future__ import annotations

from leantrain.learn.activation_checkpointing import checkpoint_activations
from leantrain.learn.backprop import Backprop
from leantrain.learn.interlayer import DepthPreconditioner, Interlayer, collapse, factorise
from leantrain.learn.layer_wise import LayerWise
from leantrain.learn.local_updates import LocalUpdates
from leantrain.learn.partition_wise import PartitionWise
from leantrain.learn.protocol import Batch, Learner, Part, StepResult
from leantrain.learn.whole import Whole

__all__ = [
    "Backprop", "Batch", "DepthPreconditioner", "Interlayer", "LayerWise", "Learner", "LocalUpdates", "Part",
    "PartitionWise", "StepResult", "Whole", "checkpoint_activations", "collapse", "factorise",
]  # fmt: skip
