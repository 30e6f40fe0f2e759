"""Partition-wise training: contiguous groups of layers, each trained by a loss of its own on a batch of its own size.

    h_k = f_k(stop(h_{k-1}))         L_k = loss(g_k(h_k), y)         as with local updates; partition k follows L_k

    serial    batches wait before partition k until there are m_k: it is trained on all of them at once, and what it
              makes of them waits before partition k + 1
    replay    before every partition but the first lie the last M batches of features; in every step it is trained on
              one of them, drawn at random, each at most R times

The plan divides the layers so that the largest partition keeps as few bytes as can be; with K partitions backward needs
a K-th of the memory or a little more, or a batch that is larger by the factors m_k in the memory of backpropagation.
Costs the heads, what waits in the queues, and features that are older than the weights they are used with. Partition k
takes an m_k-th of the steps, at a learning rate that is larger for it. One partition is backpropagation, bit for bit.

Sources: Øland 2024 (Efficient Deep Learning, PhD thesis, CMU-CS-24-147) for the idea, of which only the abstract is
known here: plan, queues and rates are a reconstruction. Belilovsky, Eickenberg & Oyallon 2020 (ICML, arXiv 1901.08164)
for training from a buffer of past features.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest
from leantrain.learn.blocks import Blocks
from leantrain.learn.losses import Loss
from leantrain.learn.partition_plan import Aim, plan_partitions
from leantrain.learn.protocol import Batch, Part, StepResult
from leantrain.ledger import record
from leantrain.modes import evaluation_mode
from leantrain.processes import world_size

Schedule = Literal["serial", "replay"]
Rates = Literal["linear", "sqrt", "same"]
_LINEAR_UP_TO = 8
"""Times by which a batch may grow before the learning rate grows with its square root only."""


class PartitionWise(Blocks):
    """Fills `.grad` of those partitions that have their batch together; of the others it stays None.

    `hand_over` ends a batch that was given in several calls of `step`; the training loop and `fit` call it.

    Args:
        model, loss, sample, cut, head, local, precision: see `Blocks`.
        blocks: instead of `cut`: how many partitions to make; without either, 2.
        plan: what is to be small then of the dearest partition: "memory", "time" or "parameters"; see
            `leantrain.learn.partition_plan`.
        floor: fewest layers in a partition, >= 1.
        batch_factors: how many batches each partition gathers before it is trained, >= 1: a list; "auto": as many as
            `budget` allows; None: 1 for all.
        budget: "auto": what partitions may take, as a part of what backpropagation keeps of the loop's batch, above 0.
        rates: how the learning rate of a partition grows with its factor: "linear" up to 8 times and with the square
            root beyond, "sqrt", or "same" for not at all.
        schedule: "serial" or "replay".
        replay: how many past batches of features lie before a partition, >= 1.
        reuse: how often one of them may be used, >= 1.

    Raises:
        UsageError: as for `Blocks`; an argument is out of its range; `balance`, which is `plan` here; factors other
            than 1 for one partition or with "replay"; batches that would wait, in a run of several processes.

    Examples:
        learner = PartitionWise(model, "classification", blocks=4, batch_factors="auto", sample=images[:2])
        optimizer = torch.optim.AdamW([{"params": part.params, "lr": 1e-3 * part.rate} for part in learner.parts])
        learner.step(batch)
        optimizer.step()
        optimizer.zero_grad()
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, sample: Tensor, cut: Sequence[str] | None = None,
        blocks: int | None = None, plan: Aim = "memory", floor: int = 1,
        batch_factors: Literal["auto"] | Sequence[int] | None = None, budget: float = 1.0, rates: Rates = "linear",
        schedule: Schedule = "serial", replay: int = 4, reuse: int = 2, **how: Any,
    ) -> None:  # fmt: skip
        for name, value, allowed in (("rates", rates, Rates), ("schedule", schedule, Schedule)):
            if value not in get_args(allowed):
                raise UsageError(f"{name} {value!r} is unknown{nearest(str(value), get_args(allowed))}")
        if replay < 1 or reuse < 1:
            raise UsageError(f"replay and reuse must be >= 1, got replay={replay}, reuse={reuse}")
        if "balance" in how:
            raise UsageError(f"PartitionWise divides by plan, not by balance; got balance={how['balance']!r}")
        made = {name: how[name] for name in ("head", "local") if name in how}
        if cut is None:
            found = plan_partitions(
                model, loss, sample=sample, blocks=2 if blocks is None else blocks, plan=plan, floor=floor, **made
            )
            super().__init__(model, loss, sample=sample, cut=found.names, **how)
        else:
            super().__init__(model, loss, sample=sample, cut=cut, blocks=blocks, **how)
            found = plan_partitions(model, loss, sample=sample, cut=self.cut.names, **made)
        self._inputs_needed = how.get("local") == "reconstruction" or self._reads_inputs(sample)
        self.plan = found.with_inputs() if self._inputs_needed else found
        """What the partitions take."""
        self.batch_factors = self._factors(batch_factors, budget, schedule)
        """Of every partition, how many batches of the loop it is trained on at once."""
        self.rates: Rates = rates
        self.schedule: Schedule = schedule
        self.replay, self.reuse = replay, reuse
        self.completes_late |= self._keeps_batches
        self._queues: list[dict[int, list[_Waiting]]] = [{} for _ in range(len(self.cut))]
        """What waits before each partition, by the number of a piece within a batch that comes in several."""
        self._piece, self._batches = 0, 0
        self._loss: Tensor | None = None

    @property
    def parts(self) -> Sequence[Part]:
        """Every partition with its head, at the rate of its batch."""
        each = zip(super().parts, self.batch_factors, strict=True)
        return [replace(part, rate=_rate(self.rates, factor)) for part, factor in each]

    @property
    def queued_bytes(self) -> int:
        """Bytes of what waits now."""
        waiting = (each for queue in self._queues for entries in queue.values() for each in entries)
        tensors = (tensor for each in waiting for tensor in (each.inputs, each.targets, each.features))
        storages = (tensor.untyped_storage() for tensor in tensors if tensor is not None)
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def attach(self, attached: nn.Module) -> None:
        """Refuses several processes if batches wait from step to step: a checkpoint would hold one process's."""
        if self._keeps_batches and world_size() > 1:
            raise UsageError(
                f"PartitionWise with batch_factors={list(self.batch_factors)}, schedule={self.schedule!r} keeps "
                f"batches from step to step, which works in one process; got {world_size()}"
            )
        super().attach(attached)

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add to `.grad` of the partitions whose turn it is the gradient of their losses' means.

        Returns:
            The loss is the latest of the last partition, and before there is one, that of the untrained model. The
            metrics are those of the partitions that were trained: `block1/loss`, ... and, of all but the first,
            `block2/staleness`, ...: how many batches ago the features were made, in the mean.
        """
        self._guard(batch)
        if len(self.cut) == 1:
            return self._backprop(batch, weight)
        metrics: dict[str, Tensor] = {}
        if weight != 0.0:  # nothing is asked for, and nothing is to wait
            piece = self._piece if weight < 1.0 else 0
            self._batches += piece == 0
            self._piece = piece + 1
            arrived = _Waiting(batch.inputs, batch.targets, None, weight, self._batches)
            (self._serial if self.schedule == "serial" else self._replayed)(piece, arrived, metrics)
        loss = self._untrained_loss(batch) if self._loss is None else self._loss
        return StepResult(loss=loss, examples_used=len(batch), metrics=metrics)

    def hand_over(self) -> None:
        """The next `step` begins another batch."""
        self._piece = 0
        super().hand_over()

    def state_dict(self) -> dict[str, Any]:
        """The auxiliary heads, and what waits."""
        queues = [
            {piece: [each.to_dict() for each in entries] for piece, entries in queue.items()} for queue in self._queues
        ]
        return {**super().state_dict(), "queues": queues, "batches": self._batches, "loss": self._loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            UsageError: the state is of other partitions or another learner.
        """
        super().load_state_dict(state_dict)
        if len(state_dict.get("queues", ())) != len(self._queues):
            raise UsageError(f"the state is not of PartitionWise with {len(self._queues)} partitions")
        device = next(self.model.parameters()).device
        self._queues = [
            {piece: [_waiting(each, device) for each in entries] for piece, entries in queue.items()}
            for queue in state_dict["queues"]
        ]
        self._batches = state_dict["batches"]
        self._loss = None if state_dict["loss"] is None else state_dict["loss"].to(device)

    @property
    def _keeps_batches(self) -> bool:
        return len(self.cut) > 1 and (self.schedule == "replay" or max(self.batch_factors) > 1)

    def _factors(
        self, wanted: Literal["auto"] | Sequence[int] | None, budget: float, schedule: Schedule
    ) -> tuple[int, ...]:
        count = len(self.cut)
        if wanted is None or (wanted == "auto" and count == 1):
            return (1,) * count
        factors = tuple(self.plan.batch_factors(budget)) if wanted == "auto" else tuple(wanted)
        if len(factors) != count or not all(isinstance(factor, int) and factor >= 1 for factor in factors):
            raise UsageError(f"batch_factors must be {count} numbers >= 1, 'auto' or None; got {wanted!r}")
        if max(factors) > 1 and count == 1:
            raise UsageError(f"batch_factors={wanted!r} of one partition is a larger batch_size: ask for that")
        if max(factors) > 1 and schedule != "serial":
            raise UsageError(f"batch_factors other than None need schedule='serial', got schedule={schedule!r}")
        return factors

    def _serial(self, piece: int, arrived: _Waiting, metrics: dict[str, Tensor]) -> None:
        """Every partition that has its batch together is trained on it, and the next one gets what it makes of it."""
        coming = [arrived]
        for block, factor in enumerate(self.batch_factors):
            queue = self._queues[block].setdefault(piece, [])
            queue += coming
            coming = []  # nothing holds on to what leaves the queue
            if len(queue) >= factor:
                coming = self._trained(block, [queue.pop(0) for _ in range(factor)], metrics)

    def _replayed(self, piece: int, arrived: _Waiting, metrics: dict[str, Tensor]) -> None:
        """Every partition is trained on something that was there before this step, as if all worked at once."""
        for block in reversed(range(len(self.cut))):
            taken = arrived if block == 0 else self._drawn(block, piece)
            if taken is None:
                continue
            coming = self._trained(block, [taken], metrics)
            if block + 1 < len(self.cut):
                buffer = self._queues[block + 1].setdefault(piece, [])
                buffer += coming
                del buffer[: -self.replay]

    def _drawn(self, block: int, piece: int) -> _Waiting | None:
        """One of a buffer's entries, the same one whenever this step is repeated. (Taking the least used, and of those
        the newest, as the paper does, would always take the newest here, where all partitions are equally fast.)"""
        buffer = self._queues[block].get(piece, [])
        if not buffer:
            return None
        index = random.Random(f"{self._batches}/{block}").randrange(len(buffer))
        drawn = buffer.pop(index)
        drawn = replace(drawn, uses=drawn.uses + 1)
        if drawn.uses == self.reuse or drawn.features is None:
            return drawn
        buffer.insert(index, drawn)
        return replace(drawn, features=drawn.features.clone())  # a model may change in place what it is given

    def _trained(self, block: int, taken: list[_Waiting], metrics: dict[str, Tensor]) -> list[_Waiting]:
        """Gradients of one partition for all that was taken together; what it makes of it, divided as that was."""
        weight = sum(each.weight for each in taken) / len(taken)
        if block:
            age = sum(self._batches - each.made for each in taken) / len(taken)
            metrics[f"block{block + 1}/staleness"] = torch.tensor(age)
        with record.phase("forward", block + 1), self._autocast():
            targets = _joined([each.targets for each in taken])
            features = _joined([each.features for each in taken if each.features is not None]) if block else None
            blank = block > 0 and not self._inputs_needed
            inputs = _blank(taken[0].inputs, len(targets)) if blank else _joined([each.inputs for each in taken])
            taken[:] = [self._passed_on(each) for each in taken]  # what is joined is held once, not twice
            output = self.cut.run(block, inputs, features)
            if block + 1 < len(self.cut):
                loss = self.local_loss(block)(output, targets, inputs, features)
            else:
                loss = self.objective.mean(output, targets)
        with record.phase("backward", block + 1):
            (loss if weight == 1.0 else loss * weight).backward()
        metrics[f"block{block + 1}/loss"] = loss.detach()
        if block + 1 == len(self.cut):
            self._loss = loss.detach()
            return []
        made = [output.detach()]
        if len(taken) > 1:  # each with a storage of its own, for the next partition may not use them together
            made = [own.clone() for own in made[0].split([len(each.inputs) for each in taken])]
        return [replace(each, features=own, made=self._batches) for each, own in zip(taken, made, strict=True)]

    def _passed_on(self, waiting: _Waiting) -> _Waiting:
        """What of a batch the next partition needs beside features."""
        inputs = waiting.inputs if self._inputs_needed else _blank(waiting.inputs, len(waiting.inputs))
        return replace(waiting, inputs=inputs, features=None, uses=0)

    @torch.no_grad()
    def _reads_inputs(self, sample: Tensor) -> bool:
        """Whether partitions behind the first see the model's inputs. Whole numbers they are given in any case: these
        are few, and masks are made of them."""
        if not sample.is_floating_point():
            return True
        with evaluation_mode(self.model):
            for block, features in enumerate(self.cut.features, start=1):
                seeing, blind = (
                    self.cut.run(block, each, features.clone()) for each in (sample, _blank(sample, len(sample)))
                )
                if not torch.equal(seeing, blind):
                    return True
        return False

    @torch.no_grad()
    def _untrained_loss(self, batch: Batch) -> Tensor:
        with evaluation_mode(self.model):
            return self.objective.mean(self._logits(batch.inputs), batch.targets)


@dataclass(frozen=True)
class _Waiting:
    """A batch, or a part of one, before a partition."""

    inputs: Tensor
    targets: Tensor
    features: Tensor | None
    """What the partition before made of it; None before the first."""
    weight: float
    made: int
    """The number of the batch with which the features were made."""
    uses: int = 0

    def to_dict(self) -> dict[str, Any]:
        """With tensors of their own: several entries may be windows on one."""
        blank = not any(self.inputs.stride())
        inputs = self.inputs[(0,) * self.inputs.dim()] if blank else self.inputs
        features = None if self.features is None else self.features.clone()
        shown = {"inputs": inputs.clone(), "targets": self.targets.clone(), "features": features}
        return {**vars(self), **shown, "shape": list(self.inputs.shape)}


def _waiting(shown: dict[str, Any], device: torch.device) -> _Waiting:
    """What `_Waiting.to_dict` gave."""
    features = None if shown["features"] is None else shown["features"].to(device)
    return _Waiting(
        shown["inputs"].to(device).expand(shown["shape"]), shown["targets"].to(device), features,
        shown["weight"], shown["made"], shown["uses"],
    )  # fmt: skip


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after another; a single one as it is."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _blank(inputs: Tensor, examples: int) -> Tensor:
    """So many zeros of the same kind, which take no memory."""
    return inputs.new_zeros(()).expand(examples, *inputs.shape[1:])


def _rate(rates: Rates, factor: int) -> float:
    if rates == "same":
        return 1.0
    if rates == "sqrt":
        return math.sqrt(factor)
    return float(factor) if factor <= _LINEAR_UP_TO else math.sqrt(_LINEAR_UP_TO * factor)
