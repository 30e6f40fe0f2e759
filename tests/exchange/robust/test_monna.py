"""MoNNA in real processes, with liars among them, against a simulation of all workers in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import RunError, UsageError
from leantrain.exchange.robust import vectors
from leantrain.exchange.robust.aggregators import AGGREGATORS
from leantrain.exchange.robust.monna import MoNNA
from leantrain.testing.attacks import ATTACKS, lie, lie_about_labels
from tests.gloo import in_processes

WORLD, STEPS, RATE, BETA = 5, 6, 0.2, 0.6


class Net(nn.Module):
    """Three tensors that DDP puts in several buckets, one of which some batches do not use."""

    def __init__(self, normalised: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 40), nn.BatchNorm1d(40) if normalised else nn.Identity()
        self.last = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


def examples(rank: int, step: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=draws), torch.randint(3, (8,), generator=draws)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    inputs, labels = examples(rank, step)
    return nn.functional.cross_entropy(model(inputs.to(next(model.parameters()).dtype)), labels)


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def train(
    exchange: MoNNA, rank: int, steps: int = STEPS, start: int = 0, model: nn.Module | None = None
) -> dict[str, Any]:
    """What a user's loop does; what this process ends with."""
    inner = net(seed=rank) if model is None else model  # every rank begins elsewhere, until attached
    attached = exchange.attach(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=RATE)
    exchange.connect([optimizer])
    return {**go_on(exchange, attached, optimizer, rank, range(start, start + steps)), "model": weights(inner)}


def go_on(exchange: MoNNA, attached: nn.Module, optimizer: Any, rank: int, steps: range) -> dict[str, Any]:
    sent = []
    for step in steps:
        optimizer.zero_grad()
        loss_of(attached, rank, step).backward()
        exchange.finish_gradients()
        optimizer.step()
        exchange.after_step()
        sent.append(exchange.bytes_sent_per_step(attached, WORLD))
    return {"sent": sent, "metrics": exchange.metrics()}


# The reference: all workers in one process, in float64, sharing nothing with the package but torch's derivative.


def simulated(
    f: int, beta: float, liars: tuple[int, ...] = (), attack: Callable[[np.ndarray], np.ndarray] | None = None,
    combine: Callable[[np.ndarray, int, int], np.ndarray] | None = None, momenta: bool = False,
) -> np.ndarray:  # fmt: skip
    """[n, d], every worker's weights after all steps; `combine(stack, f, own)` is the rule."""
    model = net(seed=0).double()
    shapes = [param.shape for param in model.parameters()]
    w = weights(model).numpy()[None].repeat(WORLD, 0)
    m = np.zeros_like(w)
    honest = [rank for rank in range(WORLD) if rank not in liars]

    def gradient(rank: int, step: int) -> np.ndarray:
        parts = torch.from_numpy(w[rank]).split([shape.numel() for shape in shapes])
        with torch.no_grad():
            for param, part, shape in zip(model.parameters(), parts, shapes, strict=True):
                param.copy_(part.view(shape))
        grads = torch.autograd.grad(loss_of(model, rank, step), list(model.parameters()))
        return torch.cat([grad.flatten() for grad in grads]).numpy()

    def nearest(stack: np.ndarray, f: int, own: int) -> np.ndarray:
        distances = np.linalg.norm(np.nan_to_num(stack - stack[own], nan=1e300, posinf=1e300, neginf=1e300), axis=1)
        return stack[np.argsort(distances)[: WORLD - f]].mean(0)

    rule = nearest if combine is None else combine
    for step in range(STEPS):
        m = beta * m + (1 - beta) * np.stack([gradient(rank, step) for rank in range(WORLD)])
        vectors = m if momenta else w - RATE * m
        sent = vectors.copy()
        for liar in liars:
            sent[liar] = attack(vectors[honest]) if attack else vectors[liar]
        if momenta:
            w = w - RATE * rule(sent, f, 0)
            continue
        seen = [np.where((np.arange(WORLD) == own)[:, None], vectors, sent) for own in range(WORLD)]
        w = np.stack([rule(seen[own], f, own) for own in range(WORLD)])
    return w


def middle(stack: np.ndarray, f: int, own: int) -> np.ndarray:
    """Nearest neighbours of the vector in the middle."""
    distances = ((stack[:, None] - stack[None]) ** 2).sum(2)
    centre = int(np.argmin(np.sort(distances, 1)[:, : WORLD - f].sum(1)))
    return stack[np.argsort(distances[centre])[: WORLD - f]].mean(0)


def median(stack: np.ndarray, f: int, own: int) -> np.ndarray:
    return np.median(stack, axis=0)


CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], str | None, dict[str, Any]]] = {
    "f = 0": ({"byzantine": 0}, (), None, {}),
    "f = 1, all honest": ({"byzantine": 1}, (), None, {}),
    "f = 2, all honest": ({"byzantine": 2}, (), None, {}),
    "sign flip": ({"byzantine": 1}, (2,), "sign_flip", {"attack": lambda v: -v.mean(0)}),
    "two scaled": ({"byzantine": 2}, (0, 4), "scaled", {"attack": lambda v: -10 * v.mean(0)}),
    "ALIE": ({"byzantine": 1}, (3,), "alie", {"attack": lambda v: v.mean(0) + 1.5 * v.std(0)}),
    "median": ({"byzantine": 1, "rule": "coordinate_median"}, (1,), "silence",
               {"attack": lambda v: 0 * v[0], "combine": median}),
    "momenta": ({"byzantine": 1, "mix": "momenta"}, (1,), "scaled",
                {"attack": lambda v: -10 * v.mean(0), "combine": middle, "momenta": True}),
    "momenta by median": ({"byzantine": 2, "mix": "momenta", "rule": "coordinate_median"}, (), None,
                          {"combine": median, "momenta": True}),
}  # fmt: skip
NO_NUMBERS = {"nan": "nan", "infinite": "infinite", "damaged": None}


def damaged(*args: Any) -> Tensor:
    packet = vectors_seal(*args)
    packet[len(packet) // 2] ^= 1
    return packet


vectors_seal = vectors.seal


@pytest.fixture(scope="module")
def five() -> list[dict[str, Any]]:
    """What each of five processes ends with, for every case."""

    def work(rank: int) -> dict[str, Any]:
        found = {}
        for name, (options, liars, attack, _) in CASES.items():
            exchange = MoNNA(momentum=BETA, **options)
            found[name] = train(exchange if attack is None else lie(exchange, attack, liars), rank)
        for name, attack in NO_NUMBERS.items():
            exchange = MoNNA(1, momentum=BETA)
            with mock.patch.object(vectors, "seal", damaged if attack is None and rank == 2 else vectors.seal):
                found[name] = train(exchange if attack is None else lie(exchange, attack, (2,)), rank)
        return found

    return in_processes(WORLD, work)


@pytest.mark.parametrize("name", CASES)
def test_every_worker_ends_where_the_simulation_of_all_says(five: list[dict[str, Any]], name: str) -> None:
    options, liars, _, reference = CASES[name]
    expected = simulated(options["byzantine"], BETA, liars, **reference)
    assert np.abs(expected - weights(net(seed=0)).numpy()).max() > 0.02  # it went somewhere
    for rank in range(WORLD):
        np.testing.assert_allclose(five[rank][name]["model"], expected[rank], rtol=0, atol=2e-6, err_msg=str(rank))


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_worker_that_sends_no_numbers_is_left_out_by_everybody(five: list[dict[str, Any]], name: str) -> None:
    """As in a run in which it sends what is far away."""
    expected = simulated(1, BETA, (2,), attack=lambda v: 1e6 + 0 * v[0])
    for rank in (0, 1, 3, 4):
        np.testing.assert_allclose(five[rank][name]["model"], expected[rank], rtol=0, atol=2e-6)
        assert five[rank][name]["metrics"]["left_out_2"] == 1.0


@pytest.mark.parametrize("name", ["f = 0", "momenta", "momenta by median", "median"])
def test_models_are_the_same_bits_where_nobody_has_a_neighbourhood_of_its_own(
    five: list[dict[str, Any]], name: str
) -> None:
    liars = CASES[name][1] if name == "median" else ()
    first, *others = [five[rank][name]["model"] for rank in range(WORLD) if rank not in liars]
    assert all(torch.equal(each, first) for each in others)


def test_with_f_above_0_honest_models_differ_a_little(five: list[dict[str, Any]]) -> None:
    found = torch.stack([each["f = 1, all honest"]["model"] for each in five])
    spread = (found - found.mean(0)).norm(dim=1).max() / found.mean(0).norm()
    assert 0 < spread < 0.1
    assert 0 < five[0]["f = 1, all honest"]["metrics"]["spread"] < 0.2


@pytest.mark.parametrize("name", CASES)
def test_each_worker_sends_its_vector_to_each_other_once(five: list[dict[str, Any]], name: str) -> None:
    model = net()
    numbers = weights(model).numel()
    predicted = MoNNA(1).predicted_bytes(list(model.parameters()), WORLD)
    assert predicted == (WORLD - 1) * (4 * numbers + 32)
    for each in five:
        assert set(each[name]["sent"]) == {predicted}
    assert predicted <= 1.06 * (WORLD - 1) * 4 * numbers


def test_long_vectors_travel_in_several_packets() -> None:
    def work(rank: int) -> dict[str, Any]:
        whole = train(MoNNA(1, momentum=BETA), rank)
        with mock.patch.object(vectors, "CHUNK", 100):
            return {"whole": whole["model"], "cut": train(MoNNA(1, momentum=BETA), rank)}

    numbers = weights(net()).numel()
    for found in in_processes(3, work):
        assert torch.equal(found["whole"], found["cut"]["model"])
        assert set(found["cut"]["sent"]) == {2 * (4 * numbers + 32 * -(-numbers // 100))}


# DDP models, and everything else that is not a plain module.


def test_a_ddp_model_works_in_both_forms() -> None:
    """Small buckets, accumulation under no_sync, a parameter that some steps leave out, and views for gradients."""

    def momenta(rank: int, wrapped: bool) -> Tensor:
        model, exchange = net(seed=rank), MoNNA(1, momentum=BETA, mix="momenta")
        options = {"bucket_cap_mb": 0.0005, "gradient_as_bucket_view": True}
        attached = exchange.attach(DistributedDataParallel(model, **options) if wrapped else model)
        assert isinstance(attached, DistributedDataParallel)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for step in range(STEPS):
            optimizer.zero_grad()
            with exchange.gradient_sync(attached, enabled=False):
                loss_of(attached, rank, 2 * step).backward()
            loss_of(attached, rank, 2 * step + 1).backward()  # and nothing more: the hook has done it
            optimizer.step()
        return weights(model)

    def models(rank: int) -> list[Tensor]:
        wrapped = DistributedDataParallel(net(seed=rank))
        exchange = MoNNA(1, momentum=BETA)
        attached = exchange.attach(wrapped)
        assert attached is wrapped.module
        optimizer = torch.optim.SGD(attached.parameters(), lr=RATE)
        go_on(exchange, wrapped, optimizer, rank, range(STEPS))  # somebody goes on with the DDP model: no harm
        return [weights(attached), train(MoNNA(1, momentum=BETA), rank)["model"]]

    def work(rank: int) -> list[Any]:
        return [momenta(rank, wrapped=True), momenta(rank, wrapped=False), *models(rank)]

    found = in_processes(3, work)
    for in_ddp, in_plain, unwrapped, plain in found:
        assert torch.equal(in_ddp, found[0][0])
        torch.testing.assert_close(in_ddp, in_plain, atol=1e-7, rtol=0)
        assert torch.equal(unwrapped, plain)


def test_unused_parameters_keep_their_momentum() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.repeat(1, 7)[:, :40]) if x[0, 0] > 0 else super().forward(x)

    def work(rank: int, mix: str) -> Tensor:
        torch.manual_seed(0)
        model, exchange = Branching(), MoNNA(1, momentum=BETA, mix=mix)
        attached = exchange.attach(DistributedDataParallel(model, find_unused_parameters=True))
        return go_on(exchange, attached, torch.optim.SGD(model.parameters(), lr=RATE), rank, range(8)) and weights(
            model
        )

    for mix in ("models", "momenta"):
        found = in_processes(3, work, mix)
        assert all(each.isfinite().all() for each in found)
        assert (found[0] - found[1]).norm() < (0.2 if mix == "models" else 1e-12) * found[0].norm()


def test_statistics_of_batch_norm_are_mixed_and_the_consensus_is_everybodys() -> None:
    def work(rank: int) -> dict[str, Tensor]:
        model = net(seed=rank, normalised=True)
        exchange = MoNNA(1, momentum=BETA)
        train(exchange, rank, model=model)
        own = weights(model)
        with exchange.consensus():
            agreed, mean = weights(model), model.norm.running_mean.clone()
        restored = torch.equal(weights(model), own)
        return {"own": own, "agreed": agreed, "mean": mean, "restored": torch.tensor(restored)}

    found = in_processes(4, work)
    assert all(each["restored"] for each in found)
    assert all(torch.equal(each["agreed"], found[0]["agreed"]) for each in found)
    assert all(torch.equal(each["mean"], found[0]["mean"]) for each in found)
    assert found[0]["mean"].abs().max() > 0.01
    expected = middle_of(np.stack([each["own"].numpy() for each in found]))
    assert (
        np.abs(found[0]["agreed"].numpy() - expected).max() < 0.02
    )  # chosen with the statistics, which expected lacks


def middle_of(stack: np.ndarray) -> np.ndarray:
    return stack.mean(0)


def test_a_consensus_of_too_few_finite_models_says_so() -> None:
    def work(rank: int) -> str:
        model, exchange = net(), MoNNA(1)
        exchange.attach(model)
        with torch.no_grad():
            if rank < 2:
                model.last.bias.fill_(torch.nan)
        try:
            with exchange.consensus():
                return ""
        except RunError as error:
            return str(error)

    assert set(in_processes(4, work)) == {"more than byzantine=1 of 4 models are not finite"}


# State.


@pytest.mark.parametrize("mix", ["models", "momenta"])
def test_a_run_that_goes_on_is_bit_for_bit_the_run_that_did_not_stop(mix: str) -> None:
    def work(rank: int) -> list[Tensor]:
        whole = train(MoNNA(1, momentum=BETA, mix=mix), rank)["model"]
        first, model = MoNNA(1, momentum=BETA, mix=mix), net(seed=rank)
        train(first, rank, steps=3, model=model)
        saved = {"exchange": first.state_dict(), "model": {k: v.clone() for k, v in model.state_dict().items()}}
        second, again = MoNNA(1, momentum=BETA, mix=mix), net(seed=rank)
        attached = second.attach(again)
        second.load_state_dict(saved["exchange"])
        again.load_state_dict(saved["model"])
        go_on(second, attached, torch.optim.SGD(again.parameters(), lr=RATE), rank, range(3, STEPS))
        return [whole, weights(again)]

    for whole, resumed in in_processes(3, work):
        assert torch.equal(whole, resumed)


def test_state_of_another_number_of_workers_is_handed_round() -> None:
    states = [{"beta": 0.9, "momenta": {"w": torch.tensor([float(rank)])}} for rank in range(3)]
    assert MoNNA(1).resized(states, 2, 5) is states[2] and MoNNA(1).resized(states, 4, 5) is states[1]


def test_state_of_other_settings_or_another_model_is_refused() -> None:
    saved = MoNNA(0, momentum=0.9)
    saved.attach(net())
    other = MoNNA(0, momentum=0.5)
    other.attach(net())
    with pytest.raises(UsageError, match=r"momenta were saved with momentum=0.9, and this exchange has 0.5"):
        other.load_state_dict(saved.state_dict())
    smaller = MoNNA(0, momentum=0.9)
    smaller.attach(nn.Linear(3, 2))
    with pytest.raises(UsageError, match="momenta were saved for another model: 'bias' is in one of the two only"):
        smaller.load_state_dict(saved.state_dict())
    shape = MoNNA(0, momentum=0.9)
    shape.attach(net(normalised=False).first)
    wider = MoNNA(0, momentum=0.9)
    wider.attach(nn.Linear(6, 41))
    with pytest.raises(UsageError, match=r"another model: 'weight' was \[40, 6\], and is \[41, 6\]"):
        wider.load_state_dict(shape.state_dict())


# One process, and what is refused.


def test_a_single_process_is_plain_sgd_with_an_averaging_momentum() -> None:
    exchange = MoNNA(2, momentum=BETA)
    found = train(exchange, 0)
    model = net(seed=0)
    theirs = torch.optim.SGD(model.parameters(), lr=RATE, momentum=BETA, dampening=BETA)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(STEPS):
        theirs.zero_grad()
        loss_of(model, 0, step).backward()
        with torch.no_grad():
            for param, m in zip(model.parameters(), momentum, strict=True):
                m.mul_(BETA).add_(param.grad, alpha=1 - BETA)
                param.sub_(RATE * m)
    torch.testing.assert_close(found["model"], weights(model), atol=1e-6, rtol=0)
    assert found["sent"] == [0] * STEPS and found["metrics"] == {}


def test_a_gradient_that_is_not_finite_stays_to_be_seen_and_leaves_no_trace() -> None:
    exchange, model = MoNNA(0, momentum=BETA), net()
    exchange.attach(model)
    loss_of(model, 0, 0).backward()
    exchange.finish_gradients()
    before = {name: m.clone() for name, m in exchange.state_dict()["momenta"].items()}
    model.last.bias.grad = torch.full_like(model.last.bias, torch.inf)
    exchange.finish_gradients()
    assert model.last.bias.grad.isinf().all()
    assert all(torch.equal(m, before[name]) for name, m in exchange.state_dict()["momenta"].items())


def test_clipping_the_gradient_leaves_the_momentum_alone() -> None:
    exchange, model = MoNNA(0, momentum=BETA), net()
    exchange.attach(model)
    loss_of(model, 0, 0).backward()
    exchange.finish_gradients()
    expected = model.last.bias.grad.clone()
    model.last.bias.grad.zero_()
    torch.testing.assert_close(exchange.state_dict()["momenta"]["last.bias"], expected)


def test_the_factor_of_a_grad_scaler_is_not_in_the_momentum() -> None:
    class Scaler:
        factor = 4.0

        def get_scale(self) -> float:
            return self.factor

    def run(scaler: Any) -> list[Tensor]:
        exchange, model = MoNNA(0, momentum=BETA), net()
        exchange.attach(model, grad_scaler=scaler)
        seen = []
        for step, factor in enumerate((4.0, 16.0)):
            model.zero_grad()
            if scaler is not None:
                scaler.factor = factor
            (loss_of(model, 0, step) * (factor if scaler else 1.0)).backward()
            exchange.finish_gradients()
            seen.append(model.last.weight.grad / (factor if scaler else 1.0))
        return seen

    for scaled, plain in zip(run(Scaler()), run(None), strict=True):
        torch.testing.assert_close(scaled, plain)


def test_half_precision_weights_have_momenta_in_float32() -> None:
    exchange, model = MoNNA(0), net().to(torch.bfloat16)
    exchange.attach(model)
    loss_of(model, 0, 0).backward()
    exchange.finish_gradients()
    assert model.last.weight.grad.dtype == torch.bfloat16
    assert exchange.state_dict()["momenta"]["last.weight"].dtype == torch.float32


def test_frozen_parameters_are_neither_sent_nor_touched() -> None:
    def work(rank: int) -> dict[str, Any]:
        model = net(seed=rank)
        model.first.requires_grad_(False)
        found = train(MoNNA(1), rank, model=model)
        return {"sent": found["sent"][-1], "first": model.first.weight.detach()}

    found = in_processes(3, work)
    assert {each["sent"] for each in found} == {2 * (4 * (40 * 3 + 3) + 32)}
    assert all(torch.equal(each["first"], net(seed=0).first.weight) for each in found)


def test_arguments_are_checked() -> None:
    for options, message in [
        ({"byzantine": -1}, "byzantine must be an integer >= 0, got -1"),
        ({"byzantine": 0.5}, "byzantine must be an integer >= 0, got 0.5"),
        ({"byzantine": 1, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"byzantine": 1, "rule": "krumm"}, r"rule 'krumm' is unknown; did you mean 'krum'\?"),
        ({"byzantine": 1, "mix": "gradients"}, "mix must be 'models' or 'momenta', got 'gradients'"),
        ({"byzantine": 1, "timeout_s": 0}, "timeout_s must be a number of seconds above 0, got 0"),
    ]:
        with pytest.raises(UsageError, match=message):
            MoNNA(**options)


def test_too_few_workers_are_refused_when_attached() -> None:
    def work(rank: int) -> list[str]:
        said = []
        for options in ({"byzantine": 2}, {"byzantine": 1, "rule": "krum"}):
            try:
                MoNNA(**options).attach(net())
            except UsageError as error:
                said.append(str(error))
        return said

    for said in in_processes(4, work):
        assert said == [
            "nearest_neighbor_average with f=2 needs at least 5 vectors, got n=4, which allows f <= 1",
            "krum with f=1 needs at least 5 vectors, got n=4, which allows f <= 0",
        ]


def test_other_optimizers_and_a_second_momentum_are_refused() -> None:
    with pytest.raises(UsageError, match="MoNNA cannot be combined with optimizer AdamW: momentum is the exchange's"):
        MoNNA(1).check_optimizer(torch.optim.AdamW)
    with pytest.raises(UsageError, match="AdamW"):
        MoNNA(1, mix="momenta").check_optimizer(torch.optim.AdamW)
    with pytest.raises(UsageError, match=r"the optimizer's must be 0, got momentum=0\.9"):
        MoNNA(1).connect([torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)])
    MoNNA(1, mix="momenta", momentum=0).connect([torch.optim.AdamW(net().parameters())])


def test_it_is_attached_once_and_told_when_gradients_are_ready() -> None:
    exchange = MoNNA(0)
    exchange.attach(net())
    with pytest.raises(UsageError, match="attached to a model already"):
        exchange.attach(net())
    with pytest.raises(UsageError, match=r"needs finish_gradients\(\) between backward\(\) and the optimizer's step"):
        exchange.after_step()


@pytest.mark.parametrize(("mix", "premix"), [("models", True), ("models", False), ("momenta", False)])
def test_every_rule_but_the_mean_survives_a_liar(mix: str, premix: bool) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        found = {}
        for rule in AGGREGATORS:
            exchange = MoNNA(1, momentum=BETA, rule=rule, mix=mix, premix=premix)
            found[rule] = train(lie(exchange, "scaled", (4,)), rank, steps=4)["model"]
        return found

    found, start = in_processes(WORLD, work)[0], weights(net(seed=0))
    moves = {rule: found[rule] - start for rule in AGGREGATORS}
    mean, robust = moves.pop("mean"), list(moves.values())
    assert max(move.norm() for move in robust) < 0.2 * start.norm()
    assert min(torch.cosine_similarity(a, b, dim=0) for a in robust for b in robust) > 0.1
    if mix == "momenta":  # -10 of five outvotes four, so the mean steps backwards
        assert max(torch.cosine_similarity(mean, move, dim=0) for move in robust) < 0
    elif not premix:  # -10 times the weights
        assert mean.norm() > start.norm()


def test_a_liar_about_labels_computes_honest_gradients_of_wrong_ones() -> None:
    from leantrain.data import Batch

    exchange = lie_about_labels(MoNNA(1), classes=3, liars=(1,))
    batch = Batch(torch.zeros(4, 6), torch.tensor([0, 1, 2, 0]), torch.arange(4))
    assert [share.batch.targets.tolist() for share in exchange.shares(batch, 0, 2, 1)] == [[0, 1]]
    assert [share.batch.targets.tolist() for share in exchange.shares(batch, 1, 2, 2)] == [[0], [2]]


def test_every_attack_is_survived_by_nearest_neighbours() -> None:
    def work(rank: int) -> dict[str, Tensor]:
        found = {}
        for name in ATTACKS:
            exchange = lie(
                MoNNA(1, momentum=BETA), name, (0,)
            )  # also rank 0, whose weights all begin with, may lie later
            found[name] = train(exchange, rank, steps=4)["model"]
        return found

    found = in_processes(4, work)
    for name in ATTACKS:
        honest = torch.stack([each[name] for each in found[1:]])
        assert honest.isfinite().all()
        assert (honest - weights(net(seed=0))).norm(dim=1).max() < 1.0, name
