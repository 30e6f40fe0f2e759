"""One process per block: the weights of one process with all blocks, the bytes that are counted, and who is named."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leantrain.data import Batch
from leantrain.errors import UsageError
from leantrain.exchange.relay import HEADER_BYTES, Relay
from leantrain.learn import Backprop, LocalUpdates
from leantrain.nn import Llama
from leantrain.recipe import Component
from leantrain.train import train
from tests.gloo import in_processes
from tests.small_runs import Processes, checkpoint_tensors, log_without_times, small_recipe

STEPS = 5
SHAPES = [(3, 4), (1, 1), (2, 0, 5), (2, 3, 4, 5)]


def network() -> nn.Sequential:
    """Batch normalisation without weights stands at a cut, where nothing but the pass tells whose buffers they are."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def learner(**options: Any) -> LocalUpdates:
    model = network()
    torch.manual_seed(1)  # the heads'
    return LocalUpdates(model, "classification", sample=torch.zeros(2, 8), **{"cut": ["4", "7"], **options})


def batch(step: int, size: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(
        torch.randn(size, 8, generator=generator), torch.randint(4, (size,), generator=generator), torch.arange(size)
    )


def steps(learner: LocalUpdates, exchange: Relay | None, accumulate: int = 1, number: int = STEPS) -> list[int]:
    """Train by a loop of one's own. The bytes that the exchange says each step sent."""
    optimizer = torch.optim.AdamW(learner.module.parameters(), lr=0.05)
    sent = []
    for step in range(number):
        shares = (exchange or Relay()).shares(batch(step), 0, 1, accumulate)
        for share in shares:
            learner.step(share.batch, share.weight)
        if exchange:
            exchange.agree([0.0])
        optimizer.step()
        optimizer.zero_grad()
        if exchange:
            exchange.after_step(last=step == number - 1)
            sent.append(exchange.bytes_sent_per_step(learner.module, 3, accumulate))
    return sent


def joined(**options: Any) -> tuple[LocalUpdates, Relay]:
    found, exchange = learner(**options), Relay(meet_every=2)
    found.attach(exchange.attach(found.module))
    exchange.join(found)
    return found, exchange


def state(learner: LocalUpdates) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.module.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_three_processes_make_the_weights_of_one_bit_for_bit(accumulate: int) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        found, exchange = joined()
        steps(found, exchange, accumulate)
        with exchange.consensus():
            return state(found)

    alone = learner()
    steps(alone, None, accumulate)
    expected, before = state(alone), state(learner())
    for found in in_processes(3, work):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    assert all(not torch.equal(expected[name], before[name]) for name in expected if "num_batches" not in name)


def test_a_process_has_gradients_and_optimizer_state_of_its_block_alone() -> None:
    def work(rank: int) -> list[list[int]]:
        found, exchange = joined()
        found.step(batch(0))
        exchange.pause()
        blocks = [[*params, *found.head_parameters(b)] for b, params in enumerate(found.cut.parameters)]
        return [[b for b, params in enumerate(blocks) for param in params if param.grad is not None]]

    for rank, (found,) in enumerate(in_processes(3, work)):
        assert found
        assert set(found) == {rank}


def test_bytes_are_counted_as_they_are_sent() -> None:
    def work(rank: int) -> list[list[int]]:
        found, exchange = joined()
        real, sizes = dist.send, []

        def send(tensor: Tensor, *args: Any, **how: Any) -> None:
            sizes.append(tensor.numel() * tensor.element_size())
            real(tensor, *args, **how)

        with mock.patch.object(dist, "send", send):
            said = steps(found, exchange, accumulate=3, number=4)
        return [said, [sum(sizes)]]

    features = 12 * 8 * 4 + 3 * HEADER_BYTES
    *senders, last = in_processes(3, work)
    for said, (really,) in senders:
        # Everybody meets after the second and the fourth step, and the row is told so.
        assert said == [features, features + HEADER_BYTES] * 2
        assert sum(said) == really
    assert last == [[0] * 4, [0]]


def test_features_are_on_their_way_before_the_backward_pass_begins(tmp_path: Path) -> None:
    """The backward pass of the first process waits until the second, which gets nothing else, has taken its step."""

    def work(rank: int) -> bool:
        found, exchange = joined(cut=["4"])
        if rank == 0:
            found.local_loss(0).register_full_backward_pre_hook(lambda *_: until((tmp_path / "done").exists))
        found.step(batch(0))
        (tmp_path / "done").touch()
        exchange.pause()
        return True

    assert in_processes(2, work) == [True, True]


def test_what_waits_at_a_boundary_is_bounded(tmp_path: Path) -> None:
    def work(rank: int) -> int:
        exchange = Relay(queue=2)
        exchange.attach(nn.Linear(2, 2))
        assert exchange.link is not None
        sent = 0
        for number in range(30):
            if rank == 0:
                exchange.link.send(torch.tensor([float(number)]))
                (tmp_path / f"sent-{number}").touch()
                continue
            if number == 1:  # the first starts the thread
                until((tmp_path / "sent-3").exists)
                time.sleep(0.3)
                sent = len(list(tmp_path.glob("sent-*")))
            assert exchange.link.receive().item() == number
        exchange.pause()
        return sent

    _, sent = in_processes(2, work)
    assert 4 <= sent <= 9  # two on either side, one in each thread, the one that was taken, and what the system holds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_features_of_any_type_and_shape_arrive_as_they_were(dtype: torch.dtype) -> None:
    def made() -> list[Tensor]:
        return [torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) for shape in SHAPES]

    def work(rank: int) -> list[Tensor]:
        exchange = Relay()
        exchange.attach(nn.Linear(2, 2))
        assert exchange.link is not None
        for each in made() if rank == 0 else []:
            exchange.link.send(each.mT)
            each.zero_()  # it was copied
        found = [exchange.link.receive() for _ in SHAPES] if rank else []
        exchange.pause()
        return found

    _, found = in_processes(2, work)
    for each, expected in zip(found, made(), strict=True):
        assert torch.equal(each, expected.mT)
        assert each.dtype == dtype


# --- in the loop ---


GREEDY = Component("leantrain.learn.LocalUpdates", {"blocks": 3, "head": "linear"})
RELAY = Component("leantrain.exchange.relay.Relay", {"meet_every": 3})
LLAMA = Component("leantrain.nn.Llama", {"hidden": 16, "mlp_hidden": 24, "layers": 3, "heads": 2})


def test_a_run_is_that_of_one_process_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    recipe = small_recipe(
        learn=GREEDY, exchange=RELAY, model=LLAMA, batch_size=12, accumulate=2, clip=0.5, keep=3, ledger=True
    )
    train(recipe, tmp_path / "alone")
    out = tmp_path / "run"
    Processes(3, [(recipe, out)], tmp_path).must_succeed()
    alone, first = checkpoint_tensors(tmp_path / "alone", 12), checkpoint_tensors(out, 12)
    shared = [name for name in alone if name.startswith(("model/", "learner/"))]
    assert len(shared) > 20
    assert all(torch.equal(alone[name], first[name]) for name in shared)
    losses = [
        [line["loss"] for line in log_without_times(each) if "loss" in line] for each in (tmp_path / "alone", out)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # a mean over three processes
    evaluations = [
        [line["block1/val_loss"] for line in log_without_times(each) if "val_loss" in line]
        for each in (tmp_path / "alone", out)
    ]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)  # sums in another order

    for step in (8, 12):
        shutil.rmtree(out / "checkpoints" / f"step-{step:07d}")
    lines = log_without_times(out)
    Processes(3, [(recipe, out)], tmp_path).must_succeed()
    again = checkpoint_tensors(out, 12)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert log_without_times(out) == lines


def test_a_dead_process_ends_the_others_with_one_line_that_names_it(tmp_path: Path) -> None:
    recipe = small_recipe(
        learn=GREEDY, exchange=RELAY, model=LLAMA, steps=100_000, batch_size=12, eval_every=0, checkpoint_every=0
    )
    processes = Processes(3, [(recipe, tmp_path / "run")], tmp_path)
    processes.until(lambda events: len(events) > 3)
    processes.signal(signal.SIGKILL, rank=1)
    assert processes.wait() == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        message = processes.events(rank)[-1]["message"]
        assert message.startswith(f"rank 1 of 3 stopped answering rank {rank}: ")


class Asleep(Llama):
    """In process 1 it goes well for a few steps, and then forward never ends."""

    passes = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.passes += self.training
        if self.passes > 5 and os.environ.get("RANK") == "1":
            time.sleep(1000)
        return super().forward(tokens)


FULL = pytest.mark.xfail(reason="on a busy machine the verdict is now and then that nobody hangs", strict=False)


@pytest.mark.parametrize("queue", [pytest.param(4, marks=FULL), 1000])
def test_a_process_that_hangs_is_named(queue: int, tmp_path: Path) -> None:
    """With room for more than there will be, its thread goes on taking what comes while the process hangs."""
    asleep = Component("tests.exchange.test_relay.Asleep", LLAMA.init_args)
    exchange = Component(RELAY.class_path, {"meet_every": 1000, "queue": queue})
    recipe = small_recipe(
        learn=GREEDY, exchange=exchange, model=asleep, steps=100_000, batch_size=12, eval_every=0, checkpoint_every=0,
        log_every=1000,
    )  # fmt: skip
    processes = Processes(3, [(recipe, tmp_path / "run")], tmp_path, LEANTRAIN_TIMEOUT_S="3")
    until(lambda: any(event["kind"] == "error" for event in processes.events(2)), 60)
    if queue < 1000:  # else nothing stops it before the next one is gone
        processes.workers[0].join(20)
    processes.signal(signal.SIGKILL, rank=1)
    assert processes.wait() == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        message = processes.events(rank)[-1]["message"]
        assert message.startswith("rank 1 of 3 hangs (in forward, test_relay.py line ")


def test_a_loss_that_is_not_finite_ends_all_of_them_at_the_next_meeting(tmp_path: Path) -> None:
    optim = Component("torch.optim.SGD", {"lr": 1e30})
    recipe = small_recipe(
        learn=GREEDY, exchange=RELAY, model=LLAMA, batch_size=12, optim=optim, eval_every=0, checkpoint_every=0
    )
    processes = Processes(3, [(recipe, tmp_path / "run")], tmp_path)
    assert processes.wait() == [1, 1, 1]
    assert any("the loss is" in processes.events(rank)[-1]["message"] for rank in range(3))


# --- what is refused ---


def test_one_process_alone_trains_all_blocks() -> None:
    found, exchange = joined()
    sent = steps(found, exchange)
    expected = learner()
    steps(expected, None)
    with exchange.consensus():
        assert all(torch.equal(state(found)[name], tensor) for name, tensor in state(expected).items())
    assert exchange.agree([2.0, 1.0]) == [2.0, 1.0]
    assert sent == [0] * STEPS


def test_what_has_no_blocks_to_share_out_is_refused() -> None:
    def work(rank: int) -> list[str]:
        exchange = Relay()
        exchange.attach(nn.Linear(2, 2))
        reasons = []
        for each in (Backprop(network(), "classification"), learner(), learner(cut=["4"], scheme="overlapping")):
            with pytest.raises(UsageError) as caught:
                exchange.join(each)
            reasons.append(str(caught.value))
        return reasons

    for found in in_processes(2, work):
        assert "learn=Backprop cannot" in found[0]
        assert found[1] == "2 processes train 2 blocks, one each; the learner has 3"
        assert "'overlapping'" in found[2]


def test_a_model_that_is_wrapped_is_refused() -> None:
    def work(rank: int) -> bool:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(UsageError, match="plain model"):
            Relay().attach(wrapped)
        return True

    assert in_processes(2, work) == [True, True]


@pytest.mark.parametrize("options", [{"queue": 0}, {"meet_every": 0}, {"timeout_s": 0.0}])
def test_arguments_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Relay(**options)


def test_another_number_of_processes_is_refused() -> None:
    exchange = Relay()
    with pytest.raises(UsageError, match="2 of them cannot go on as 3"):
        exchange.resized([{"steps": 1}, {"steps": 1}], 0, 3)
    with pytest.raises(UsageError, match="where the model is cut"):
        exchange.predicted_bytes([], 2)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
