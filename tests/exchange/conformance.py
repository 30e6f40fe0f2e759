"""What every exchange promises, as functions to run in each of several processes; the table of who is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from leantrain.data import Batch
from leantrain.exchange import (
    DeepGradientCompression,
    Dense,
    DiLoCo,
    EntropyCoded,
    Exchange,
    GradientCoding,
    HalfPrecision,
    LocalSGD,
    MajorityVote,
    MoNNA,
    PowerSGD,
    Projected,
)
from leantrain.optim import GaLoreAdamW

FEATURES, CLASSES, BATCH = 12, 5, 24


@dataclass(frozen=True)
class Case:
    """An exchange with an optimizer that it works with."""

    make: Callable[[int], Exchange]
    """Called with the number of processes."""
    optimizer: Callable[[nn.Module], Optimizer] = field(default=lambda model: SGD(model.parameters(), lr=0.5))
    sends: bool = True
    """Whether it sends something in every step."""
    accumulation: float = 1e-6
    """How far gradients of a batch in two parts may be from those of the whole."""
    prediction: float | None = 0.02
    """How far the predicted bytes may be from those sent, as a part; None: they depend on the numbers."""
    rings: bool = False
    """Whether its bytes are PyTorch's, which sends buckets where our formula goes by parameters."""
    rounds: tuple[int, ...] = ()
    """Numbers of processes among which a run that was stopped differs from one that was not, by rounding: DDP lays out
    its buckets anew after a process's first step, and where in a bucket a number is decides in which order a ring of
    three or more adds up its parts, and how matrix kernels find a matrix aligned; or answers come in another order."""
    abstains: bool = False
    """Whether the others may go on without a process whose gradients are not finite."""
    sockets: bool = False
    """Whether it has its own, so that the calls of torch.distributed do not tell what it sends."""
    worlds: tuple[int, ...] = (2, 3, 4)


def galore(model: nn.Module) -> Optimizer:
    return GaLoreAdamW(model.parameters(), lr=0.1, rank=4, refresh=3, basis="dct")


def sgd(lr: float) -> Callable[[nn.Module], Optimizer]:
    return lambda model: SGD(model.parameters(), lr=lr)


RINGS: dict[str, Any] = {"rings": True, "rounds": (3, 4)}
CASES: dict[str, Case] = {
    "Dense": Case(lambda world: Dense(), **RINGS),
    "HalfPrecision, bfloat16": Case(lambda world: HalfPrecision(), accumulation=2e-3, **RINGS),
    "HalfPrecision, float16": Case(lambda world: HalfPrecision("float16"), accumulation=2e-3, **RINGS),
    "MajorityVote": Case(lambda world: MajorityVote(), sgd(0.01), abstains=True),
    "MajorityVote, gathered": Case(lambda world: MajorityVote(route="gather", ties="random"), sgd(0.01), abstains=True),
    "DeepGradientCompression": Case(lambda world: DeepGradientCompression(keep=0.05), sgd(0.3)),
    "DeepGradientCompression, gaps": Case(
        lambda world: DeepGradientCompression(keep=0.05, indices="gaps"), sgd(0.3), prediction=0.1
    ),
    "EntropyCoded": Case(lambda world: EntropyCoded(every=2), sends=False, prediction=None),
    "GradientCoding": Case(
        lambda world: GradientCoding(stragglers=1 if world > 1 else 0), prediction=None, abstains=True, sockets=True,
        rounds=(3,),
    ),
    # With liars to be expected honest models differ a little: see test_monna.py.
    "MoNNA": Case(lambda world: MoNNA(byzantine=0, momentum=0.5), sgd(1.0)),
    "MoNNA, momenta": Case(
        lambda world: MoNNA(byzantine=(world - 1) // 2, momentum=0.5, mix="momenta"), sgd(1.0), abstains=True
    ),
    "Projected": Case(lambda world: Projected(), galore, rings=True, rounds=(2, 3, 4), prediction=None),
    "PowerSGD": Case(lambda world: PowerSGD(rank=2, start=2), prediction=None),
    "LocalSGD": Case(lambda world: LocalSGD(every=2), sends=False, prediction=None),
    "DiLoCo": Case(
        lambda world: DiLoCo(every=3, codec="bfloat16"), lambda model: AdamW(model.parameters(), lr=0.02), sends=False,
        prediction=None,
    ),
}  # fmt: skip


class Classifier(nn.Module):
    """With an odd number of numbers, a frozen weight and a tied one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 33)
        self.frozen = nn.Linear(33, 33).requires_grad_(False)
        self.last = nn.Linear(33, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.frozen(self.first(inputs).relu()).relu())


def examples(step: int, size: int = BATCH) -> Batch:
    """A batch of a task that a linear map nearly solves."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(size, FEATURES, generator=generator)
    map_ = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    return Batch(inputs, (inputs @ map_).argmax(1), torch.arange(size))


class Run:
    """The loop's stations around one exchange, without the rest of the loop."""

    def __init__(self, case: Case, world: int) -> None:
        self.world = world
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.exchange = case.make(world)
        self.plain = Classifier()
        self.model = self.exchange.attach(self.plain)
        self.optimizer = case.optimizer(self.plain)
        self.exchange.check_optimizer(type(self.optimizer))
        self.exchange.connect([self.optimizer])
        self.sent: list[int] = []

    def step(self, number: int, accumulate: int = 1, last: bool = False, spoil: bool = False) -> None:
        self.find_gradients(number, accumulate, spoil)
        self.exchange.agree([0.0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.exchange.after_step(last=last)
        self.sent.append(self.exchange.bytes_sent_per_step(self.model, self.world, accumulate))

    def find_gradients(self, number: int, accumulate: int = 1, spoil: bool = False) -> None:
        shares = self.exchange.shares(examples(number), self.rank, self.world, accumulate)
        total = torch.zeros(())
        for index, share in enumerate(shares):
            with self.exchange.gradient_sync(self.model, enabled=index == len(shares) - 1):
                loss = nn.functional.cross_entropy(self.model(share.batch.inputs), share.batch.targets)
                (loss * share.weight * (torch.nan if spoil else 1.0)).backward()
            total = total + share.weight * loss.detach()
        self.exchange.tell_loss(total)
        self.exchange.finish_gradients()

    @torch.no_grad()
    def loss(self) -> float:
        """On examples that it does not train on."""
        unseen = examples(1000, 500)
        return nn.functional.cross_entropy(self.plain(unseen.inputs), unseen.targets).item()

    def weights(self) -> Tensor:
        return torch.cat([param.detach().flatten() for param in self.plain.parameters()])

    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.plain.parameters() if p.grad is not None])

    def saved(self) -> dict[str, Any]:
        """What a checkpoint would hold of this process."""
        return copy.deepcopy({
            "model": self.plain.state_dict(), "optimizer": self.optimizer.state_dict(),
            "exchange": self.exchange.state_dict(),
        })  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        self.plain.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.exchange.load_state_dict(saved["exchange"])


@contextmanager
def counted() -> Iterator[list[int]]:
    """In the block: a list that holds the bytes that this process's collectives have sent, by the formulas of rings,
    counted where PyTorch is called and not where an exchange counts. DDP's own calls in C++ are not among them."""
    sent = [0]

    def counting(name: str, bytes_of: Callable[..., float]) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            world = dist.get_world_size(kwargs.get("group"))
            if kwargs.get("group") is not None or name in ("send", "isend"):
                sent[0] += int(bytes_of(world, *args))
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def ring(world: int, tensor: Tensor, *_: Any) -> float:
        return 2 * (world - 1) * -(-tensor.numel() // world) * tensor.element_size()

    with (
        counting("all_reduce", ring),
        counting("all_gather", lambda world, _, tensor: (world - 1) * size(tensor)),
        counting("all_to_all_single", lambda world, _, tensor: (world - 1) * size(tensor) // world),
        counting("send", lambda world, tensor, *_: size(tensor)),
        counting("isend", lambda world, tensor, *_: size(tensor)),
    ):
        yield sent
