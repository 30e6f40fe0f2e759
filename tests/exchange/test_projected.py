"""Processes that send projected gradients train what one process trains, and send no more than they have to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.errors import UsageError
from leantrain.exchange import Dense, Projected
from leantrain.nn import Llama
from leantrain.optim import AdamW, GaLoreAdamW, parameter_groups
from leantrain.recipe import Component
from leantrain.train import train
from tests.gloo import in_processes
from tests.small_runs import Processes, checkpoint_tensors, log_without_times, small_recipe

STEPS, BATCH, RANK, REFRESH, VOCAB = 20, 8, 4, 6, 16
SETTINGS = {"lr": 0.02, "refresh": REFRESH, "scale": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "subspace": {"basis": "subspace"},
    "svd": {"basis": "svd", "on_refresh": "rotate"},
    "rsvd": {"basis": "rsvd", "stagger": False},
    "dct": {"basis": "dct"},
    "random": {"basis": "random", "on_refresh": "reset"},
    "coordinate": {"basis": "coordinate", "weight_decay": 0.1},
    "4-bit basis": {"basis": "subspace", "basis_bits": 4},
    "longer side": {"basis": "subspace", "side": "reverse_std", "stagger": False},
    "accumulated": {"basis": "subspace", "micro_batches": 2},
    "frozen": {"basis": "subspace", "frozen": True, "stagger": False},
    "float32": {"basis": "subspace", "dtype": torch.float32, "stagger": False},
    "bfloat16": {"basis": "subspace", "dtype": torch.bfloat16},
}


def run(exchange: Dense, rank: int, world: int, case: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Train this process's share; what it ends with, and what it sent in each step: bytes as `said` by the
    exchange, numbers as `seen` in all-reduces, and how many `packets` these were."""
    case = {"micro_batches": 1, "frozen": False, "dtype": torch.float64, **case}
    micro_batches, frozen, dtype = case.pop("micro_batches"), case.pop("frozen"), case.pop("dtype")
    torch.manual_seed(0)
    plain = Llama(VOCAB, hidden=12, mlp_hidden=20, layers=2, heads=2).to(dtype)
    if frozen:
        for name, param in plain.named_parameters():
            param.requires_grad_("down" not in name and "embed" not in name)
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):  # two buckets, the first with the head alone
        model = exchange.attach(plain)
    optimizer = GaLoreAdamW(parameter_groups(plain, [{"params": "hidden", "rank": RANK}]), **SETTINGS, **case)
    exchange.connect([optimizer])
    losses, said, seen, packets = [], [], [], []
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as all_reduce:
        for step in range(steps):
            tokens = torch.randint(VOCAB, (BATCH, 6), generator=torch.Generator().manual_seed(step))
            shares = tokens.chunk(world)[rank].chunk(micro_batches)
            optimizer.zero_grad()
            loss = torch.zeros(())
            for number, share in enumerate(shares, start=1):
                with exchange.gradient_sync(model, enabled=number == len(shares)):
                    logits = model(share[:, :-1]).float() if dtype == torch.bfloat16 else model(share[:, :-1])
                    part = nn.functional.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten()) / len(shares)
                    part.backward()
                loss = loss + part.detach()
            optimizer.step()
            losses.append(loss.double())
            said.append(exchange.bytes_sent_per_step(model, world, micro_batches))
            packets.append(all_reduce.call_count)
            seen.append(sum(call.args[0].numel() for call in all_reduce.call_args_list))
            all_reduce.reset_mock()
    state = {
        f"{name}/{key}": value
        for name, param in plain.named_parameters()
        for key, value in optimizer.state[param].items()
        if isinstance(value, Tensor)
    }
    weights = {name: param.detach() for name, param in plain.named_parameters()}
    sent = {"said": said, "seen": seen, "packets": packets}
    return {"losses": torch.stack(losses), "weights": weights, "state": state, **sent}


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    """What each of four processes ends with, for every case."""
    return in_processes(4, lambda rank: {name: run(Projected(), rank, 4, case) for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_all_processes_hold_the_same_bits(four: list[dict[str, Any]], name: str) -> None:
    first = four[0][name]
    for other in four[1:]:
        for kind in ("weights", "state"):
            assert other[name][kind].keys() == first[kind].keys()
            differing = [key for key, value in first[kind].items() if not torch.equal(other[name][kind][key], value)]
            assert not differing


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "dtype" not in case])
def test_four_processes_train_what_one_trains_on_the_whole_batch(four: list[dict[str, Any]], name: str) -> None:
    one = run(Projected(), 0, 1, CASES[name])
    losses = torch.stack([each[name]["losses"] for each in four]).mean(0)
    torch.testing.assert_close(losses, one["losses"], rtol=0, atol=1e-9)
    for key, value in one["weights"].items():
        torch.testing.assert_close(four[0][name]["weights"][key], value, rtol=0, atol=1e-8, msg=key)


def test_in_float32_the_losses_are_those_of_one_process_to_1e_5(four: list[dict[str, Any]]) -> None:
    one = run(Projected(), 0, 1, CASES["float32"])
    losses = torch.stack([each["float32"]["losses"] for each in four]).mean(0)
    assert (losses - one["losses"]).abs().max() < 1e-5


def test_bfloat16_gradients_travel_in_16_bits_and_train_as_whole_ones_do(four: list[dict[str, Any]]) -> None:
    found = four[0]["bfloat16"]
    assert found["said"][1] < found["seen"][1] * 2 * 2
    exact = run(Projected(), 0, 1, CASES["subspace"])
    whole = in_processes(4, lambda rank: run(Dense(), rank, 4, CASES["bfloat16"]))
    mean = {
        "projected": torch.stack([each["bfloat16"]["losses"] for each in four]).mean(0),
        "whole": torch.stack([each["losses"] for each in whole]).mean(0),
    }
    off = {name: (losses - exact["losses"]).abs().max().item() for name, losses in mean.items()}
    assert off["projected"] < 2 * off["whole"] + 0.01, off


def numbers_to_send(side: int = 20, frozen: bool = False) -> tuple[int, int]:
    """Whole gradients, and those of which hidden matrices are projected, counted by hand for the model of `run`.

    `side` is the side of the feed-forward matrices that is left."""
    square, wide, layers, norms, outside = 12 * 12, 12 * 20, 2, 5 * 12, VOCAB * 12
    matrices = 2 if frozen else 3  # of the feed-forward layers
    rest = norms + outside * (1 if frozen else 2)
    whole = layers * (4 * square + matrices * wide) + rest
    return whole, layers * (4 * 12 * RANK + matrices * side * RANK) + rest


@pytest.mark.parametrize("name", ["rsvd", "float32", "frozen", "longer side"])
def test_what_is_sent_is_what_the_optimizer_will_use(four: list[dict[str, Any]], name: str) -> None:
    whole, projected = numbers_to_send(side=12 if name == "longer side" else 20, frozen=name == "frozen")
    seen, said = four[0][name]["seen"], four[0][name]["said"]
    assert seen == [whole if step % REFRESH == 0 else projected for step in range(STEPS)]
    each = 4 if name == "float32" else 8
    for numbers, bytes_said in zip(seen, said, strict=True):  # each packet is cut into four, its last piece filled up
        assert 0 <= bytes_said - 2 * 3 * numbers * each / 4 < 2 * (2 * 3 * each)
    assert 2 in four[0][name]["packets"]


def test_staggered_refreshes_send_few_matrices_whole_at_a_time(four: list[dict[str, Any]]) -> None:
    whole, projected = numbers_to_send()
    seen = four[0]["svd"]["seen"]
    assert seen[0] == whole
    assert all(projected <= numbers < (whole + projected) / 2 for numbers in seen[1:])


def test_it_needs_an_optimizer_that_says_what_it_projects() -> None:
    with pytest.raises(UsageError, match="Projected cannot be combined with optimizer SGD: it does not say what it"):
        Projected().check_optimizer(torch.optim.SGD)
    Projected().check_optimizer(GaLoreAdamW)
    layer = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="cannot be combined with optimizer SGD"):
        Projected().connect([GaLoreAdamW([layer.weight], rank=2), torch.optim.SGD([layer.bias])])


def test_an_optimizer_that_projects_nothing_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="nothing to project: GaLoreAdamW projects no parameter"):
        Projected().connect([GaLoreAdamW(layer.parameters())])
    with pytest.raises(UsageError, match="nothing to project: AdamW"):
        Projected().connect([AdamW(layer.parameters())])


def test_one_process_gets_its_own_model_back() -> None:
    exchange, model = Projected(), nn.Linear(4, 3)
    assert exchange.attach(model) is model
    assert exchange.bytes_sent_per_step(model, 1) == 0


def test_a_backward_pass_without_connect_says_so() -> None:
    def work(rank: int) -> list[str]:
        model = Projected().attach(nn.Linear(4, 3))
        assert isinstance(model, DistributedDataParallel)
        try:
            model(torch.ones(2, 4)).sum().backward()
        except Exception as error:
            return [type(error).__name__, str(error)]
        return []

    for kind, message in in_processes(2, work):
        assert kind == "UsageError" and "call connect([optimizer]) first" in message


RUN: dict[str, Any] = {
    "optim": Component("leantrain.optim.GaLoreAdamW", {"lr": 0.01, "rank": 4, "refresh": 5, "basis": "subspace"}),
    "exchange": Component("leantrain.exchange.Projected"),
    "schedule": "constant",
    "warmup": 0.0,
    "log_every": 1,
    "ledger": True,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe trained by one process, by two, and by two that one goes on for."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [(small_recipe(**RUN), folder / "two"), (small_recipe(**RUN, steps=6), folder / "two, then one")]
    Processes(2, jobs, folder).must_succeed()
    train(small_recipe(**RUN), folder / "one")
    train(small_recipe(**RUN), folder / "two, then one")
    return folder


@pytest.mark.parametrize("name", ["two", "two, then one"])
def test_the_loop_trains_with_two_processes_what_it_trains_with_one(runs: Path, name: str) -> None:
    left, right = checkpoint_tensors(runs / "one", 12), checkpoint_tensors(runs / name, 12)
    assert left.keys() == right.keys()
    for key in left:  # float32 sums in another order; directions that hold almost nothing of a gradient are rounding
        if key.startswith("model/"):
            torch.testing.assert_close(right[key], left[key], atol=5e-3, rtol=5e-2, msg=key)
    losses = [[line["loss"] for line in log_without_times(runs / each) if "loss" in line] for each in ("one", name)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_the_ledger_books_what_each_step_sent(runs: Path) -> None:
    one, two = (json.loads((runs / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["ledger"]["bytes_sent"] == 0
    whole = 12 * 4 * two["parameters"]  # of two processes each sends as many numbers as there are
    assert 0.3 * whole < two["ledger"]["bytes_sent"] < 0.7 * whole
