"""Layer-wise training: one block of layers after the other, each on a loss of its own, all before it frozen.

    h_{k-1} = f_{k-1}(... f_1(x))      frozen, in evaluation mode, without a graph
    h_k = f_k(h_{k-1})                 trained on loss(g_k(h_k), y); g_k: an auxiliary head; of the last block, none

A run of S steps is shared out among K blocks: each has S / K steps, a learning-rate schedule and an optimizer state of
its own. With R laps it goes over the blocks R times, each having S / (K R) steps at a time.

Saves the activations of all blocks but one, the gradients and the optimizer state of all blocks but one. Costs the
heads, a forward pass through the frozen blocks for every batch - or, with a cache, for every example, and the room for
one block's inputs of all examples - and, as no block knows what comes behind it, often accuracy.

Sources: Bengio et al. 2006 (NIPS), greedy layer-wise training; Belilovsky, Eickenberg & Oyallon 2019 (ICML, arXiv
1812.11446), auxiliary heads; Karkar et al. 2023 (NeurIPS, arXiv 2309.17357), laps ("multi-lap sequential").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leantrain.cutting import Survey, sensible, survey
from leantrain.errors import UsageError, nearest
from leantrain.learn.blocks import Blocks
from leantrain.learn.feature_cache import FeatureCache, fingerprint
from leantrain.learn.losses import Loss
from leantrain.learn.protocol import Batch, Part, StepResult
from leantrain.ledger import record
from leantrain.modes import evaluation_mode
from leantrain.processes import rank

Cache = Literal["recompute", "memory", "disk"]
CacheDtype = Literal["float32", "float16", "bfloat16"]


class LayerWise(Blocks):
    """Fills `.grad` of one block at a time; `enter` says which. One block is backpropagation, bit for bit.

    Args:
        model, loss, sample, cut, blocks, balance, head, local, precision: see `Blocks`. Without `cut` and `blocks`,
            every layer of the model is a block, see `between_layers`.
        laps: how many times to go over the blocks, >= 1.
        cache: where a block's inputs come from. "recompute": from the frozen blocks, for every batch. "memory" and
            "disk": computed once per example and kept, see `FeatureCache`. Batches then need `ids`, and examples must
            not be augmented; it pays from the second epoch of a block on.
        cache_folder: for "disk": a folder of the run's own; what is in it of an earlier block is thrown away. A run
            that goes on finds there what it had. "memory" begins anew then.
        cache_dtype: "float32", "float16" or "bfloat16", to keep features rounded; None: as they are.

    The block in front is never trained again within a lap, so batch normalisation in it keeps its statistics, and
    parameters and buffers of frozen blocks stay as they are bit for bit. Heads stay, too: `evaluate` tells what each
    block has learned.

    Raises:
        UsageError: as for `Blocks`; `laps` below 1; an unknown cache or dtype, or a folder not together with "disk";
            in use, a batch without ids, or examples that differ from those that were kept.
        RunError: in use, the disk is full.

    Examples:
        learner = LayerWise(model, "classification", sample=images[:2], cache="memory")
        learner.fit(loader, partial(torch.optim.AdamW, lr=1e-3), epochs=30)
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, sample: Tensor, cut: Sequence[str] | None = None,
        blocks: int | None = None, laps: int = 1, cache: Cache = "recompute", cache_folder: str | None = None,
        cache_dtype: CacheDtype | None = None, **how: Any,
    ) -> None:  # fmt: skip
        if laps < 1:
            raise UsageError(f"laps must be >= 1, got laps={laps}")
        for name, value, allowed in (("cache", cache, Cache), ("cache_dtype", cache_dtype, CacheDtype)):
            if value is not None and value not in get_args(allowed):
                raise UsageError(f"{name} {value!r} is unknown{nearest(str(value), get_args(allowed))}")
        if (cache == "disk") != (cache_folder is not None):
            raise UsageError(f'cache="disk" and cache_folder belong together, got {cache=}, {cache_folder=}')
        found = survey(model, sample)
        if cut is None and blocks is None:
            cut = between_layers(model, found)
        super().__init__(model, loss, sample=sample, cut=cut, blocks=blocks, **how)
        self.stages = laps * len(self.cut) if len(self.cut) > 1 else 1
        self._trained = [tuple(part.params) for part in super().parts]
        self._finished = [_finished(model, found, name) for name in self.cut.names]
        """The modules whose last call in a pass is over when blocks 1, 2, ... begin."""
        self._make_cache = partial(
            FeatureCache,
            folder=None if cache_folder is None else Path(cache_folder) / f"process-{rank()}",
            dtype=None if cache_dtype is None else getattr(torch, cache_dtype),
            replace=True,
        )
        self._keeps = cache != "recompute"
        self._cache: FeatureCache | None = None

    @property
    def block(self) -> int:
        """Which block is trained now, from 0."""
        return self.stage % len(self.cut)

    @property
    def kept_bytes(self) -> int:
        """What the cache of the present block's inputs takes; 0 without one."""
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def parts(self) -> Sequence[Part]:
        """The present block with its head."""
        return [Part(self._trained[self.block])]

    def enter(self, spent: float) -> float:
        """Freeze all but the block whose turn it is, which is all that requires gradients from now on.

        Returns:
            Which part of the block's own share is spent.
        """
        # A step's part of the run may be rounded down to just below the border at which it begins.
        self.stage = min(int(spent * self.stages + 1e-9), self.stages - 1)
        if len(self.cut) == 1:
            return spent
        if self._cache is not None and self._cached_stage != self.stage:
            self._forget()
        self._freeze()
        return max(0.0, spent * self.stages - self.stage)

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add `weight` * d(the present block's mean loss) to the `.grad` of its parameters and its head's."""
        self._guard(batch)
        if len(self.cut) == 1:
            return self._backprop(batch, weight)
        block = self.block
        with record.phase("forward", block + 1), self._frozen_modules_at_rest():
            before = self._inputs_of_block(batch) if block else None
            with self._autocast():
                features = self.cut.run(block, batch.inputs, before)
                if block < len(self.auxiliaries):
                    loss = self.local_loss(block)(features, batch.targets, batch.inputs, before)
                else:
                    loss = self.objective.mean(features, batch.targets)
            del features, before  # whatever the backward pass does not need is gone
        with record.phase("backward", block + 1):
            (loss if weight == 1.0 else loss * weight).backward()
        told = loss.detach()
        return StepResult(loss=told, examples_used=len(batch), metrics={f"block{block + 1}/loss": told})

    def hand_over(self) -> None:
        """As in `Blocks`; an exchange that waits for every parameter is given zeros for those at rest."""
        if len(self.cut) == 1 or self._attached is self._module:
            super().hand_over()
            return
        at_rest = [param for params in self._trained for param in params if not param.requires_grad]
        for param in at_rest:
            param.requires_grad_(True)
        super().hand_over()
        for param in at_rest:
            param.requires_grad_(False)
            param.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the heads back. The model's weights may be others now, too: the cache is opened anew."""
        super().load_state_dict(state_dict)
        self._forget()

    def _freeze(self) -> None:
        trained = set(map(id, self._trained[self.block]))
        for params in self._trained:
            for param in params:
                param.requires_grad_(id(param) in trained)

    @contextmanager
    def _frozen_modules_at_rest(self) -> Iterator[None]:
        """In the block, modules of the frozen blocks are in evaluation mode."""
        training = [module for module in (self._finished[self.block - 1] if self.block else []) if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _inputs_of_block(self, batch: Batch) -> Tensor:
        if not self._keeps:
            return self._through_frozen(batch.inputs)
        ids = getattr(batch, "ids", None)
        if ids is None:
            raise UsageError('batches have no ids, without which features cannot be cached; use cache="recompute"')
        if self._cache is None:
            self._cache = self._make_cache(self._key())
            self._cached_stage = self.stage
        return self._cache.features(ids, batch.inputs, self._through_frozen)

    @torch.no_grad()
    def _through_frozen(self, inputs: Tensor) -> Tensor:
        """The output of all blocks before the present one, in one pass that ends there."""
        last = self.block - 1

        def at(number: int, features: Tensor) -> Tensor:
            if number == last:
                raise _There(features)
            return features

        # An autocast of its own: copies of weights that it makes here have no history.
        with evaluation_mode(self.model), self._autocast(), self.cut.stops(at):
            try:
                self.model(inputs)
            except _There as there:
                return there.features
        raise AssertionError("the pass did not come by")

    def _key(self) -> str:
        """What the inputs of the present block depend on."""
        behind = {id(param) for params in self.cut.parameters[self.block :] for param in params}
        tensors: list[tuple[str, Tensor]] = []
        tensors += [(name, param) for name, param in self.model.named_parameters() if id(param) not in behind]
        for number, module in enumerate(self._finished[self.block - 1]):
            tensors += [(f"{number}/{name}", buffer) for name, buffer in module.named_buffers(recurse=False)]
        return fingerprint(tensors, self.cut.names[self.block - 1], self.precision, str(tensors[0][1].device.type))

    def _forget(self) -> None:
        if self._cache is not None:
            self._cache.close()
            self._cache = None


class _There(Exception):
    """The end of a pass through the frozen blocks; not an error."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def between_layers(model: nn.Module, found: Survey) -> list[str]:
    """Where to cut so that every layer of the model is a block: stem and head join the first and the last.

    The layers are what the model keeps in a ModuleList or Sequential, as far as it can be cut before them; where there
    are none, every place at which it can. One without a matrix, such as a normalisation, belongs to what is before it.

    Args:
        found: what `leantrain.cutting.survey` saw of the model.

    Returns:
        Names for `cut`; none if the model cannot be cut.
    """
    holders = {name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))}
    names = [place.name for place in sensible(model, found)]
    names = [name for name in names if any(param.dim() > 1 for param in model.get_submodule(name).parameters())]
    layers = [name for name in names if name.rpartition(".")[0] in holders]
    if layers and layers[0].rpartition(".")[2] == "0":
        return layers[1:]  # what comes before the first layer is a stem
    return layers or names


def _finished(model: nn.Module, found: Survey, name: str) -> list[nn.Module]:
    """The modules that a pass has done with when it calls `name`."""
    start = next(call.began for call in found.calls if call.name == name)
    later = {call.name for call in found.calls if call.ended > start}
    names = dict.fromkeys(call.name for call in found.calls)
    return [model.get_submodule(each) for each in names if each not in later]
