"""Processes that train by themselves and meet to average: against sums done by hand, PyTorch's SGD, and themselves."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import RunError, UsageError
from leantrain.exchange.averaging import Averaging
from leantrain.exchange.channel import Echo
from leantrain.exchange.codecs.codec import Plain
from leantrain.exchange.packet import PacketError
from leantrain.recipe import Component
from leantrain.train import train
from tests.gloo import in_processes
from tests.small_runs import Processes, checkpoint_tensors, log_without_times, small_recipe

STEADY: dict[str, Any] = {"schedule": "constant", "warmup": 0.0, "log_every": 1}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def local_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    inputs = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * step + rank))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(rank: int, settings: dict[str, Any], steps: int, wrapped: bool = False) -> dict[str, Any]:
    exchange, plain = Averaging(**settings), network()
    model = exchange.attach(DistributedDataParallel(plain) if wrapped else plain)
    assert model is plain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sent, agreed = [], []
    for step in range(steps):
        local_step(model, optimizer, rank, step)
        exchange.after_step(last=step == steps - 1)
        sent.append(exchange.bytes_sent_per_step(model, exchange.channel.size))
        with exchange.consensus():
            agreed.append(weights(model))
    residual = sum(each.sum() for each in exchange.residuals.values())
    return {"weights": weights(model), "sent": sent, "agreed": agreed, "residual": torch.as_tensor(residual),
            "buffers": model[1].running_mean.clone()}  # fmt: skip


def by_hand(world: int, every: int, steps: int, outer: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """The agreed weights and averaged means, from copies of a model in one process and PyTorch's outer SGD."""
    models = [network() for _ in range(world)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    agreed = network()
    outer_step = torch.optim.SGD(agreed.parameters(), **(outer or {"lr": 1.0}))
    for step in range(steps):
        for rank in range(world):
            local_step(models[rank], optimizers[rank], rank, step)
        if (step + 1) % every == 0 or step == steps - 1:
            for params in zip(agreed.parameters(), *(model.parameters() for model in models), strict=True):
                target, *own = params
                target.grad = target.detach() - torch.stack([each.detach() for each in own]).mean(0)
            outer_step.step()
            mean = torch.stack([model[1].running_mean for model in models]).mean(0)
            for model in models:
                model.load_state_dict({**model.state_dict(), **dict(agreed.named_parameters())})
                model[1].running_mean.copy_(mean)
    return weights(models[0]), models[0][1].running_mean


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    ("settings", "outer"),
    [
        ({}, None),
        ({"send": "weights"}, None),
        ({"outer_lr": 0.7, "outer_momentum": 0.9}, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
        ({"outer_lr": 0.5, "outer_momentum": 0.8, "nesterov": False}, {"lr": 0.5, "momentum": 0.8}),
    ],
)
def test_it_is_the_outer_sgd_of_pytorch(every: int, settings: dict[str, Any], outer: dict[str, Any] | None) -> None:
    found = in_processes(2, trained, {"every": every, **settings}, 7)
    expected, mean = by_hand(2, every, 7, outer)
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    # The changes travel in float32.
    torch.testing.assert_close(found[0]["weights"], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[0]["buffers"], mean, atol=1e-6, rtol=1e-6)


def test_nothing_is_sent_between_meetings_and_the_agreed_weights_stay() -> None:
    found = in_processes(3, trained, {"every": 3}, 8, True)
    for each in found:
        assert [sent > 0 for sent in each["sent"]] == [False, False, True, False, False, True, False, True]
        assert torch.equal(each["agreed"][3], each["agreed"][2])
        assert not torch.equal(each["agreed"][5], each["agreed"][4])
        assert torch.equal(each["agreed"][7], found[0]["agreed"][7])


def test_the_bytes_of_a_meeting_are_those_of_the_packets() -> None:
    (sent, *_) = [each["sent"][0] for each in in_processes(3, trained, {"every": 1}, 1)]
    tensors = [p.numel() for p in network().parameters()]
    packets = sum(32 + 4 * numel for numel in tensors)
    buffers = 2 * 2 * 2 * 2 * 8  # a ring over 3 of 4 numbers, in pieces of 2, of float64; two buffers
    assert sent == 2 * (8 + packets) + buffers


def test_what_a_codec_loses_is_sent_later() -> None:
    class Coarse(Plain):
        """Keeps multiples of a hundredth."""

        def __init__(self) -> None:
            super().__init__(torch.float32)

        def encode(self, values: Tensor, reference: float = 1.0) -> Tensor:
            return super().encode((values * 100).round() / 100, reference)

    exact = in_processes(2, trained, {"every": 1}, 30)[0]
    coarse = in_processes(2, trained, {"every": 1, "codec": Coarse()}, 30)
    forgetful = in_processes(2, trained, {"every": 1, "codec": Coarse(), "residual": False}, 30)[0]
    with_residual = (coarse[0]["weights"] - exact["weights"]).abs().max()
    without = (forgetful["weights"] - exact["weights"]).abs().max()
    assert with_residual < 0.02
    assert without > 3 * with_residual


def test_a_mean_of_residuals_is_what_is_still_owed() -> None:
    exchange, model = Averaging(codec="bfloat16", every=1), network()
    exchange.attach(model)
    start = weights(model)
    for step in range(5):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(step)))
        before = weights(model) - torch.cat([each.flatten() for each in exchange.agreed.values()])
        owed = torch.cat([each.flatten() for each in exchange.residuals.values()]) if step else torch.zeros_like(start)
        agreed = torch.cat([each.flatten() for each in exchange.agreed.values()])
        exchange.after_step()
        moved = torch.cat([each.flatten() for each in exchange.agreed.values()]) - agreed
        left = torch.cat([each.flatten() for each in exchange.residuals.values()])
        torch.testing.assert_close(moved + left, before + owed, atol=1e-12, rtol=1e-12)
        assert left.abs().max() > 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    recipes = {name: small_recipe(**STEADY, exchange=exchange, keep=3) for name, exchange in EXCHANGES.items()}
    Processes(2, [(recipe, folder / name) for name, recipe in recipes.items()], folder).must_succeed()
    for name in EXCHANGES:
        for copied in (f"{name}, stopped", f"{name}, then one"):
            shutil.copytree(folder / name, folder / copied)
            for step in (8, 12):  # as if it had been stopped after step 4, between two meetings
                shutil.rmtree(folder / copied / "checkpoints" / f"step-{step:07d}")
    Processes(2, [(recipe, folder / f"{name}, stopped") for name, recipe in recipes.items()], folder).must_succeed()
    return folder


EXCHANGES = {
    "local": Component("leantrain.exchange.LocalSGD", {"every": 3}),
    "diloco": Component("leantrain.exchange.DiLoCo", {"every": 5, "codec": "bfloat16"}),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_run_that_was_stopped_between_meetings_goes_on_to_the_last_bit(runs: Path, name: str) -> None:
    whole, stopped = checkpoint_tensors(runs / name, 12), checkpoint_tensors(runs / f"{name}, stopped", 12)
    assert whole.keys() == stopped.keys()
    assert any(key.startswith("rank-1/model:") for key in whole)
    assert [key for key in whole if not torch.equal(whole[key], stopped[key])] == []
    assert log_without_times(runs / f"{name}, stopped") == log_without_times(runs / name)
    own = checkpoint_tensors(runs / name, 4)
    agreed = {key.removeprefix("model/"): tensor for key, tensor in own.items() if key.startswith("model/")}
    assert any(not torch.equal(tensor, own[f"rank-1/model:{key}"]) for key, tensor in agreed.items())


@pytest.mark.parametrize("name", EXCHANGES)
def test_one_process_goes_on_from_what_two_agreed_on(runs: Path, name: str) -> None:
    recipe = small_recipe(**STEADY, exchange=EXCHANGES[name])
    train(recipe, runs / f"{name}, then one")
    losses = [line["loss"] for line in log_without_times(runs / f"{name}, then one") if "loss" in line]
    assert losses[-1] < losses[0]
    assert not (runs / f"{name}, then one" / "checkpoints" / "step-0000012" / "rank-1.safetensors").exists()


def test_weights_that_are_not_finite_are_refused_by_all_and_named() -> None:
    def work(rank: int) -> str:
        exchange, model = Averaging(every=1), network()
        exchange.attach(model)
        if rank == 1:
            with torch.no_grad():
                model[0].weight[0, 0] = torch.nan
        try:
            exchange.after_step()
        except RunError as error:
            return str(error)
        return "no error"

    assert in_processes(2, work) == ["rank 1's weights are not finite at step 1"] * 2


@pytest.mark.parametrize("damage", ["cut", "bit", "codec", "other model"])
def test_a_message_that_cannot_be_used_is_refused_with_its_rank(damage: str) -> None:
    class Damaged(Echo):
        def all_gather_packets(self, packet: Tensor) -> list[Tensor]:
            other = packet.clone()
            if damage == "cut":
                other = other[:-3]
            elif damage == "bit":
                other[40] ^= 1
            elif damage == "codec":
                other = torch.cat([Plain(torch.float16).encode(torch.zeros(20))])
            else:
                other = torch.cat([Plain(torch.float32).encode(torch.zeros(7))])
            return [packet, other]

    exchange, model = Averaging(every=1), network()
    exchange.attach(model)
    exchange.channel = Damaged(2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PacketError, match="rank 1 sent what cannot be used at step 1"):
        exchange.after_step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"every": 0}, "every must be"),
        ({"outer_lr": 0.0}, "outer_lr must be above 0"),
        ({"outer_momentum": 1.0}, r"outer_momentum must be in \[0, 1\)"),
        ({"send": "gradients"}, "send must be"),
        ({"codec": "float31"}, "codec 'float31' is unknown; did you mean 'float32'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Averaging(**settings)
