"""Activation checkpointing of a model's repeated blocks: each keeps its input and computes the rest again in backward.

Saves what the blocks' insides keep for the backward pass; costs one more forward pass through the blocks. Numbers do
not change. Source: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from leantrain.errors import UsageError

_HOLDERS = (nn.ModuleList, nn.Sequential)


def checkpoint_activations(model: nn.Module, *, random: bool = True) -> list[nn.Module]:
    """From now on, every repeated block of `model` keeps only its input for the backward pass.

    Only `forward` is wrapped: names of modules, parameters and saved states stay as they are.

    Args:
        model: changed in place.
        random: whether blocks may draw random numbers (dropout), so that generators must be set back for the second
            computation.

    Returns:
        The blocks.

    Raises:
        UsageError: the model has no repeated blocks that could be computed twice.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise UsageError(
            f"activation checkpointing finds no repeated blocks in {type(model).__name__}: modules of one class in a "
            "ModuleList or Sequential, without batch normalisation"
        )
    for block in blocks:
        again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=random)
        block.forward = again  # in front of the class's method
    return blocks


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """In the block, as after `checkpoint_activations`; a model without repeated blocks stays as it is. Only dropout
    that is a module counts as random, because tensors without numbers have no generators to set back."""
    random = any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules())
    blocks = checkpoint_activations(model, random=random) if repeated_blocks(model) else []
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost blocks of which two or more of a kind stand in one ModuleList or Sequential.

    Blocks with batch normalisation are left out: computed twice, they would take every batch into their statistics
    twice.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for holder in model.modules():
        if holder in inside or not isinstance(holder, _HOLDERS):
            continue
        kinds = [type(child) for child in holder]
        blocks = [child for child in holder if kinds.count(type(child)) > 1 and _worth_it(child)]
        found += blocks
        inside.update(module for block in blocks for module in block.modules())
    return found


def _worth_it(block: nn.Module) -> bool:
    """Whether a module is a block of layers: neither a single layer nor a holder of blocks, and safe to run twice."""
    composed = not isinstance(block, _HOLDERS) and any(True for _ in block.children())
    return composed and not any(isinstance(module, _BatchNorm) for module in block.modules())
