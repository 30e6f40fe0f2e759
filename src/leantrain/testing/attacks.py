"""Lies for tests of robust aggregation: what a worker sends that wants the others to fail.

An attack is a pure function of the honest vectors [h, d], all of which it may see, and gives the one vector [d] that
every liar sends. mu and sigma are their mean and standard deviation in each coordinate.

    sign_flip      -s mu                       silence        0
    scaled         -10 mu                      constant       c in every coordinate
    alie           mu + z sigma                gaussian       noise of a given size around mu
    foe            (1 - epsilon) mu            random_sign    mu with every sign drawn anew
    mimic          a copy of one honest vector infinite, nan  what they say

`alie` hides in the noise of honest workers, `foe` behind the length of a vector; `searched` finds the z or epsilon that
does most harm. Vectors are models in some uses and updates in others: `around` applies an attack to the differences
from a point.
Label flipping is no function of vectors: `flip_labels` makes the labels of which a liar computes an honest gradient.

`lie` makes some ranks of a real run liars.

Sources: ALIE Baruch et al. 2019 (NeurIPS); FOE, also called IPM, Xie et al. 2020 (UAI); mimic Karimireddy et al. 2022
(ICLR); label flipping as in Farhadkhani et al. 2022 (MoNNA, ICML 2023), and the search for a strength.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from leantrain.errors import UsageError, nearest

Attack = Callable[[Tensor], Tensor]
"""[h, d] honest vectors -> [d], what liars send."""
E = TypeVar("E", bound="Sending")


def sign_flip(honest: Tensor, strength: float = 1.0) -> Tensor:
    """The opposite of the honest mean."""
    return -strength * honest.mean(0)


def scaled(honest: Tensor, factor: float = -10.0) -> Tensor:
    """A multiple of the honest mean."""
    return factor * honest.mean(0)


def alie(honest: Tensor, z: float = 1.5) -> Tensor:
    """A little is enough: the mean, `z` standard deviations off in every coordinate."""
    return honest.mean(0) + z * honest.std(0, unbiased=False)


def foe(honest: Tensor, epsilon: float = 1.1) -> Tensor:
    """Fall of empires: (1 - epsilon) times the honest mean; above 1 the mean's opposite, not longer than the honest."""
    return (1 - epsilon) * honest.mean(0)


def mimic(honest: Tensor, which: int = 0) -> Tensor:
    """A copy of one honest vector, so that its worker counts for more than the others."""
    return honest[which].clone()


def gaussian(honest: Tensor, scale: float = 1.0, seed: int = 0) -> Tensor:
    """The mean and noise whose standard deviation is `scale`."""
    return honest.mean(0) + scale * _draws(honest, seed, torch.randn)


def random_sign(honest: Tensor, seed: int = 0) -> Tensor:
    """The mean with every coordinate's sign drawn anew."""
    return honest.mean(0).abs() * torch.where(_draws(honest, seed, torch.rand) < 0.5, -1.0, 1.0)


def constant(honest: Tensor, value: float = 1.0) -> Tensor:
    """One number everywhere."""
    return torch.full_like(honest[0], value)


def silence(honest: Tensor) -> Tensor:
    """Zeros, as from a worker that does nothing."""
    return torch.zeros_like(honest[0])


def infinite(honest: Tensor) -> Tensor:
    """Infinity everywhere."""
    return torch.full_like(honest[0], torch.inf)


def nan(honest: Tensor) -> Tensor:
    """NaN everywhere."""
    return torch.full_like(honest[0], torch.nan)


ATTACKS: dict[str, Attack] = {
    "sign_flip": sign_flip,
    "scaled": scaled,
    "alie": alie,
    "foe": foe,
    "mimic": mimic,
    "gaussian": gaussian,
    "random_sign": random_sign,
    "constant": constant,
    "silence": silence,
    "infinite": infinite,
    "nan": nan,
}
"""Every attack by its name, at its usual strength."""


def flip_labels(labels: Tensor, classes: int) -> Tensor:
    """The last class for the first, the last but one for the second: C - 1 - y."""
    return classes - 1 - labels


def around(point: Tensor, attack: Attack) -> Attack:
    """The attack on differences from `point`: on updates where the vectors are models that started there."""
    return lambda honest: point + attack(honest - point)


def searched(
    attack: Callable[[Tensor, float], Tensor],
    honest: Tensor,
    harm: Callable[[Tensor], float],
    strengths: Sequence[float],
) -> Tensor:
    """What `attack` sends at the strength that does most harm.

    Args:
        attack: called with the honest vectors and a strength.
        harm: how bad it is when liars send this; for instance how far `displacement` says honest workers are moved.
        strengths: the ones that are tried.
    """
    return max((attack(honest, strength) for strength in strengths), key=harm)


def displacement(honest: Tensor, liars: int, rule: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor], float]:
    """Harm as the distance from the honest mean of what `rule` makes of honest vectors and `liars` copies of a lie."""
    mean = honest.mean(0)

    def harm(lie: Tensor) -> float:
        found = rule(torch.cat([honest, lie.expand(liars, -1)]), liars)
        distance = float((found - mean).norm())
        return distance if distance == distance else float("inf")  # nothing is worse than NaN

    return harm


class Sending(Protocol):
    """An exchange whose messages can be replaced: `MoNNA`."""

    outgoing: Callable[[Tensor], Tensor]


def lie(exchange: E, attack: Attack | str, liars: Collection[int]) -> E:
    """Make the ranks `liars` of a real run send what `attack` says. Called in all processes, before the first step.

    Every process shows the liars its true vector first, by an all-gather that no meter of the exchange counts: the
    literature's attackers know all honest vectors of the step in which they lie.

    Args:
        exchange: its attribute `outgoing` turns this worker's vector into what is sent.
        attack: a function of the honest vectors, or the name of one in ATTACKS.
        liars: their ranks. At least one rank is honest.

    Returns:
        The exchange.
    """
    if isinstance(attack, str) and attack not in ATTACKS:
        raise UsageError(f"attack {attack!r} is unknown{nearest(attack, ATTACKS)}")
    chosen = ATTACKS[attack] if isinstance(attack, str) else attack
    rank, size = dist.get_rank(), dist.get_world_size()
    honest_ranks = [each for each in range(size) if each not in liars]
    if not honest_ranks:
        raise UsageError(f"at least one of {size} ranks must be honest, got liars={sorted(liars)}")
    group = dist.new_group(backend="gloo")

    def outgoing(vector: Tensor) -> Tensor:
        shown = [torch.empty_like(vector) for _ in range(size)]
        dist.all_gather(shown, vector, group=group)
        return chosen(torch.stack([shown[each] for each in honest_ranks])) if rank in liars else vector

    exchange.outgoing = outgoing
    return exchange


def lie_about_labels(exchange: Any, classes: int, liars: Collection[int]) -> Any:
    """Make the ranks `liars` of a real run compute honest gradients of wrong labels, in any exchange.

    Returns:
        The exchange.
    """
    honest_shares = exchange.shares

    def shares(batch: Any, rank: int, world: int, accumulate: int) -> list[Any]:
        found = honest_shares(batch, rank, world, accumulate)
        return [_relabelled(share, classes) for share in found] if rank in liars else found

    exchange.shares = shares
    return exchange


class LyingCodec:
    """A codec whose packets carry what an attack makes of the numbers: for exchanges that are given a codec.

    Args:
        codec: the one whose packets are sent.
        attack: called with this worker's own numbers as the only honest vector, [1, d].
    """

    def __init__(self, codec: Any, attack: Attack) -> None:
        self.codec, self.attack, self.name = codec, attack, codec.name

    def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
        """The packet of the lie."""
        return self.codec.encode(self.attack(values.reshape(1, -1)).reshape(values.shape), reference)

    def decode(self, packet: Tensor | bytes) -> Tensor:
        """What an honest packet stands for."""
        return self.codec.decode(packet)


def _relabelled(share: Any, classes: int) -> Any:
    targets = flip_labels(share.batch.targets, classes)
    return replace(share, batch=replace(share.batch, targets=targets))


def _draws(honest: Tensor, seed: int, draw: Callable[..., Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return draw(honest.shape[1], generator=generator).to(honest)
