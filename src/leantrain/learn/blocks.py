"""A model cut into blocks that are trained by losses of their own: what the local learners have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leantrain.cutting import Balance, Cut
from leantrain.errors import UsageError
from leantrain.learn.heads import Head
from leantrain.learn.interlayer import Interlayer
from leantrain.learn.local_losses import Kind, LocalLoss, make_local_loss
from leantrain.learn.losses import Loss
from leantrain.learn.protocol import Batch, Part
from leantrain.learn.whole import Precision, Whole
from leantrain.modes import evaluation_mode
from leantrain.outputs import logits_of


class WithAuxiliaries(nn.Module):
    """A model's own parts under their own names, and beside them `auxiliary`: for those who ask for what is trained.

    It is not run as a network. Called after a backward pass, it hands over the gradients that are in `.grad`: it
    returns a number whose backward pass gives each parameter its gradient once more, which is what an exchange that
    listens to backward passes (DDP) waits for.
    """

    def __init__(self, model: nn.Module, auxiliary: nn.Module) -> None:
        super().__init__()
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        self._non_persistent_buffers_set |= model._non_persistent_buffers_set
        self.auxiliary = auxiliary
        if hasattr(model, "get_output_embeddings"):
            self.get_output_embeddings = model.get_output_embeddings

    def forward(self) -> Tensor:
        params = [param for param in self.parameters() if param.requires_grad]
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
        for param in params:
            param.grad = None
        given: Tensor = _Given.apply(grads, *params)
        return given


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.grads)


class Blocks(Whole):
    """A learner of a model in blocks, each but the last with an auxiliary head and a local loss.

    Args:
        model, loss, precision: see `Whole`. The model is cut by hooks and keeps its class and its names.
        sample: [n, ...] inputs with which the model is looked at, n >= 2; one forward pass in evaluation mode.
        cut: names of modules before whose inputs to cut, such as ["layers.4", "layers.8"].
        blocks: instead of `cut`: how many blocks to make, as equal as can be.
        balance: what is to be equal then: "parameters" or forward "time" on `sample`.
        head: what makes logits of a block's output; see `leantrain.learn.heads`.
        local: what a block is trained on; see `leantrain.learn.local_losses`.
        share: what part of a local loss is not prediction; None: 0.99 for "both", 0.5 for "reconstruction".
        look_ahead, factors, depth, transport: what the blocks are to be reminded of; see
            `leantrain.learn.interlayer.Interlayer`. `factors` changes the model's layers until they are collapsed.

    Raises:
        UsageError: as for `Whole` and `leantrain.cutting.Cut`; a head or local loss that does not fit.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, *, sample: Tensor, cut: Sequence[str] | None = None,
        blocks: int | None = None, balance: Balance = "parameters", head: Head = "linear", local: Kind = "prediction",
        share: float | None = None, look_ahead: int = 0, factors: int = 1, depth: int = 1,
        transport: float | None = None, precision: Precision = "fp32",
    ) -> None:  # fmt: skip
        super().__init__(model, loss, precision)
        interlayer = Interlayer(look_ahead=look_ahead, factors=factors, depth=depth, transport=transport)
        interlayer.prepare(model)
        self.cut = Cut(model, sample, cut=cut, blocks=blocks, balance=balance)
        self.auxiliaries = nn.ModuleList(
            make_local_loss(local, head, features, self.cut.output, model, self.objective, sample, share).to(features)
            for features in self.cut.features
        )
        for block, features in enumerate(self.cut.features):
            before = self.cut.features[block - 1] if block else None
            self.auxiliaries[block] = interlayer.local_loss(self.local_loss(block), features, before)
        self.preconditioner = interlayer.preconditioner(model)
        self.completes_late = self.preconditioner is not None
        if len(self.auxiliaries):
            self._module = WithAuxiliaries(model, self.auxiliaries)
        self._attached: nn.Module = self._module

    @property
    def parts(self) -> Sequence[Part]:
        """Every block with its head."""
        return [Part((*params, *self.head_parameters(block))) for block, params in enumerate(self.cut.parameters)]

    def head_parameters(self, block: int) -> list[nn.Parameter]:
        """What is trained with a block and is not of the model; nothing of the last block."""
        if block == len(self.auxiliaries):
            return []
        return [param for param in self.local_loss(block).parameters() if param.requires_grad]

    def local_loss(self, block: int) -> LocalLoss:
        """That of a block that is not the last."""
        found = self.auxiliaries[block]
        assert isinstance(found, LocalLoss)
        return found

    def attach(self, attached: nn.Module) -> None:
        """A model that is cut is run as it is, and its gradients are handed over afterwards."""
        if len(self.auxiliaries):
            self._attached = attached
        else:
            super().attach(attached)

    def hand_over(self) -> None:
        """One more backward pass, which computes nothing, where an exchange has wrapped the module."""
        if self.preconditioner is not None:
            self.preconditioner.apply()
        if self._attached is not self._module:
            self._attached().backward()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The sums for the model's output, and for each auxiliary head's those behind `block1/`, `block2/`, ..."""
        found: dict[str, Tensor] = {}

        def read(block: int, features: Tensor) -> Tensor:
            sums = self.local_loss(block).sums(features, batch.targets)
            found.update({f"block{block + 1}/{name}": value for name, value in sums.items()})
            return features

        with evaluation_mode(self.model), evaluation_mode(self.auxiliaries), self._autocast(), self.cut.stops(read):
            outputs = logits_of(self.model(batch.inputs))
        return {**self.objective.sums(outputs, batch.targets), **found}

    def state_dict(self) -> dict[str, Any]:
        """The auxiliary heads, and what the depth's preconditioner remembers."""
        heads = {"auxiliaries": dict(self.auxiliaries.state_dict())}
        return heads if self.preconditioner is None else {**heads, "depth": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the heads back.

        Raises:
            UsageError: they are those of another cut.
        """
        try:
            self.auxiliaries.load_state_dict(state_dict["auxiliaries"])
            if self.preconditioner is not None:
                self.preconditioner.load_state_dict(state_dict["depth"])
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"the state is of other blocks than {', '.join(self.cut.described())}") from error

    def _guard(self, batch: Batch) -> None:
        """Refuse what batch normalisation cannot take the mean of."""
        normalises = (module for module in self.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
        if len(batch) == 1 and any(module.training for module in normalises):
            raise UsageError(
                "batch normalisation needs batches of at least 2 examples to train on, got 1; use a larger batch or "
                "another normalisation"
            )
