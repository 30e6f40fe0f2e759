"""Local updates: every block of layers learns from a loss of its own, and no gradient crosses from block to block.

    h_k = f_k(stop(h_{k-1}))         stop: gradients do not come back through it
    L_k = loss(g_k(h_k), y)          g_k: the auxiliary head of block k; of the last block, the model's own output

    greedy        block k follows L_k
    overlapping   block k follows L_k + L_{k+1}, or only L_{k+reach} ("farthest"), as far as there are losses
    chunked       greedy with two blocks, unless others are given

Saves the activations of all blocks but the one that is computing, as each runs its backward pass at once; with
overlapping updates, of all but `reach` + 1. Costs the heads. One block is backpropagation, bit for bit; so is
overlapping with "farthest" and a reach of all blocks, but for rounding.

Sources: Belilovsky, Eickenberg & Oyallon 2020 (ICML, arXiv 1901.08164); Laskin et al. 2020 (arXiv 2012.03837).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest
from leantrain.learn.blocks import Blocks
from leantrain.learn.losses import Loss
from leantrain.learn.protocol import Batch, Link, StepResult
from leantrain.ledger import record
from leantrain.modes import evaluation_mode
from leantrain.outputs import logits_of

Scheme = Literal["greedy", "overlapping", "chunked"]
Follows = Literal["sum", "farthest"]


class LocalUpdates(Blocks):
    """Fills `.grad` block by block, in one forward pass.

    Args:
        model, loss, sample, cut, blocks, balance, head, local, precision: see `Blocks`. Without `cut` and `blocks`,
            "chunked" makes two blocks.
        scheme: "greedy", "overlapping" or "chunked".
        reach: overlapping: through how many further blocks a loss goes back, >= 1.
        follows: overlapping: whether a block follows the "sum" of the losses that reach it, its own included, or only
            the "farthest" one, its head then following its own.

    Raises:
        UsageError: as for `Blocks`; an unknown scheme; `reach` below 1; a batch of one example with batch
            normalisation.

    Examples:
        learner = LocalUpdates(model, "classification", blocks=4, sample=images[:2])
        optimizer = torch.optim.AdamW(learner.module.parameters())
        learner.step(batch)
        optimizer.step()
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, sample: Tensor, cut: Sequence[str] | None = None,
        blocks: int | None = None, scheme: Scheme = "greedy", reach: int = 1, follows: Follows = "sum",
        **how: Any,
    ) -> None:  # fmt: skip
        for name, value, allowed in (("scheme", scheme, Scheme), ("follows", follows, Follows)):
            if value not in get_args(allowed):
                raise UsageError(f"{name} {value!r} is unknown{nearest(str(value), get_args(allowed))}")
        if reach < 1:
            raise UsageError(f"reach must be >= 1, got reach={reach}")
        if scheme == "chunked" and cut is None and blocks is None:
            blocks = 2
        super().__init__(model, loss, sample=sample, cut=cut, blocks=blocks, **how)
        self.reach = reach if scheme == "overlapping" else 0
        self.follows: Follows = follows
        self.completes_late |= self.reach > 0
        self._sample = sample
        self._link: Link | None = None

    def join(self, link: Link) -> list[list[Tensor]]:
        """Train only the block of `link` from now on: its input comes through the link, and its output goes there.

        Returns:
            [blocks] what training changes in each of them: weights, buffers and heads.

        Raises:
            UsageError: there are other than `link.blocks` blocks, or updates overlap.
        """
        if len(self.cut) != link.blocks:
            raise UsageError(
                f"{link.blocks} processes train {link.blocks} blocks, one each; the learner has {len(self.cut)}"
            )
        if self.reach:
            raise UsageError("scheme 'overlapping' sends gradients back, which a link does not; use 'greedy'")
        self._link = link
        heads = [list(each.state_dict(keep_vars=True).values()) for each in self.auxiliaries]
        return [
            [*params, *buffers, *head]
            for params, buffers, head in zip(self.cut.parameters, self._buffers(), [*heads, []], strict=True)
        ]

    def step(self, batch: Batch, weight: float = 1.0) -> StepResult:
        """Add to every parameter's `.grad` the gradient of the losses that its block follows, times `weight`."""
        self._guard(batch)
        if self._link is not None:
            return self._joined_step(self._link, batch, weight)
        if len(self.cut) == 1:
            return self._backprop(batch, weight)
        passing = _Greedy(self, batch, weight) if self.reach == 0 else _Overlapping(self, batch, weight)
        with record.phase("forward"), passing.forward, self._autocast():
            with self.cut.stops(passing.arrived):
                outputs = logits_of(self.model(batch.inputs))
            loss = self.objective.mean(outputs, batch.targets)
            passing.end(loss)
        losses = {f"block{number}/loss": each for number, each in enumerate(passing.losses, start=1)}
        return StepResult(loss=loss.detach(), examples_used=len(batch), metrics=losses)

    def _joined_step(self, link: Link, batch: Batch, weight: float) -> StepResult:
        """The same for one block alone. The next one has its input before the backward pass begins."""
        before = None
        if link.block > 0:
            with record.phase("exchange"):
                before = link.receive().to(batch.inputs.device)
        number = link.block + 1
        with record.phase("forward", number), self._autocast():
            output = self.cut.run(link.block, batch.inputs, before)
            if link.block == link.blocks - 1:
                loss = self.objective.mean(output, batch.targets)
            else:
                with record.phase("exchange"):
                    link.send(output.detach())
                loss = self.local_loss(link.block)(output, batch.targets, batch.inputs, before)
        with record.phase("backward", number):
            (loss if weight == 1.0 else loss * weight).backward()
        return StepResult(loss=loss.detach(), examples_used=len(batch))

    @torch.no_grad()
    def _buffers(self) -> list[list[Tensor]]:
        """The model's buffers, by the block that calls their module first."""
        found: list[list[Tensor]] = [[] for _ in range(len(self.cut))]
        holders = {module for module in self.model.modules() if any(True for _ in module.buffers(recurse=False))}
        block = 0

        def arrived(number: int, features: Tensor) -> Tensor:
            nonlocal block
            block = number + 1
            return features

        def called(module: nn.Module, _: object) -> None:
            if module in holders:
                holders.remove(module)
                found[block].extend(module.buffers(recurse=False))

        handles = [module.register_forward_pre_hook(called) for module in holders]
        try:
            with evaluation_mode(self.model), self.cut.stops(arrived):
                self.model(self._sample)
        finally:
            for handle in handles:
                handle.remove()
        return found


class _ForwardByBlock:
    """The forward phase of one block after the other, inside of that of the pass."""

    def __enter__(self) -> None:
        self._block = 1
        self._phase = record.phase("forward", 1)
        self._phase.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._phase.__exit__(*error)

    def next(self) -> None:
        """The next block begins."""
        self._phase.__exit__(None, None, None)
        self._block += 1
        self._phase = record.phase("forward", self._block)
        self._phase.__enter__()


class _Greedy:
    """One forward pass, in which every block's gradients are found as soon as its output is there."""

    def __init__(self, learner: LocalUpdates, batch: Batch, weight: float) -> None:
        self.learner, self.batch, self.weight = learner, batch, weight
        self.losses: list[Tensor] = []
        self.before: Tensor | None = None
        self.forward = _ForwardByBlock()

    def arrived(self, block: int, features: Tensor) -> Tensor:
        self._back(self.learner.local_loss(block)(features, self.batch.targets, self.batch.inputs, self.before))
        self.before = features.detach()
        self.forward.next()
        return self.before

    def end(self, loss: Tensor) -> None:
        self._back(loss)

    def _back(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        with record.phase("backward", len(self.losses)):
            (loss if self.weight == 1.0 else loss * self.weight).backward()


class _Overlapping:
    """One forward pass, in which every loss goes back through its block and `reach` earlier ones.

    Between two blocks stands a leaf: the earlier block's output without its history. A loss goes back from leaf to
    leaf, so that what another loss has left there is not carried on.
    """

    def __init__(self, learner: LocalUpdates, batch: Batch, weight: float) -> None:
        self.learner, self.batch, self.weight = learner, batch, weight
        self.losses: list[Tensor] = []
        self.outputs: list[Tensor | None] = []
        """Of each block, with its history while a loss may still come back through it."""
        self.leaves: list[Tensor] = []
        self.forward = _ForwardByBlock()

    def arrived(self, block: int, features: Tensor) -> Tensor:
        leaf = features.detach().requires_grad_()
        before = self.leaves[-1].detach() if self.leaves else None
        loss = self.learner.local_loss(block)(leaf, self.batch.targets, self.batch.inputs, before)
        self.losses.append(loss.detach())
        self.outputs.append(features)
        self.leaves.append(leaf)
        with record.phase("backward", block + 1):
            heads = self.learner.head_parameters(block)
            torch.autograd.backward(loss * self.weight, inputs=[leaf, *heads])
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            if self.learner.follows == "sum" or block >= self.learner.reach:  # else it trains nothing on the way
                self._back_from(block, gradient, last=False)
        self.forward.next()
        return leaf

    def end(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        self.outputs.append(loss * self.weight)
        with record.phase("backward", len(self.outputs)):
            self._back_from(len(self.outputs) - 1, None, last=True)

    def _back_from(self, block: int, gradient: Tensor | None, last: bool) -> None:
        """Carry the gradient at the output of `block` back, as far as its loss reaches."""
        lowest = max(0, block - self.learner.reach)
        for each in range(block, lowest - 1, -1):
            farthest = last or each == block - self.learner.reach
            trains = self.learner.follows == "sum" or farthest
            params = self.learner.cut.parameters[each] if trains else []
            below = [self.leaves[each - 1]] if each > lowest else []
            done = last or each == block - self.learner.reach
            output = self.outputs[each]
            assert output is not None
            if params or below:
                torch.autograd.backward(output, gradient, retain_graph=not done, inputs=[*params, *below])
            if done:
                self.outputs[each] = None
            if below:
                gradient, below[0].grad = below[0].grad, None
