"""With coded gradients, workers that are late, frozen or killed change neither what is trained nor how fast."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import struct
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.data import Batch
from leantrain.errors import UsageError
from leantrain.exchange.packet import PacketError
from leantrain.exchange.stragglers.gradient_codes import circulant
from leantrain.exchange.stragglers.gradient_coding import GradientCoding, mean_step_seconds
from leantrain.exchange.stragglers.messages import Inbox, Message, Topic, message_bytes
from leantrain.recipe import Component
from tests.gloo import in_processes
from tests.small_runs import Processes, checkpoint_tensors, log_without_times, small_recipe

STEPS, BATCH, FEATURES, CLASSES = 12, 24, 6, 4
Model = Callable[[], nn.Module]


class PartlyUsed(nn.Module):
    """One layer is frozen, one is never used, and one only where an input's first feature is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.frozen, self.unused, self.seldom = nn.Linear(8, 8), nn.Linear(3, 3), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(torch.tanh(self.first(x)))
        return self.last(self.seldom(hidden) if x[:, 0].max() > 2 else hidden)  # type: ignore[no-any-return]


def mlp(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, CLASSES)
    ).to(dtype)


def batch_of(step: int, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, FEATURES, generator=generator).to(dtype)
    return Batch(inputs, torch.randint(CLASSES, (BATCH,), generator=generator), torch.arange(BATCH))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)


def coded(
    rank: int, exchange: GradientCoding, make: Model = mlp, *, accumulate: int = 1, steps: int = STEPS,
    before_step: Callable[[int], object] = lambda step: None, work: Callable[[int], object] = lambda step: None,
) -> dict[str, Any]:  # fmt: skip
    """Train in this process of several; `work` is called before every forward pass, as a part of it."""
    torch.manual_seed(rank)  # attaching must make them the same
    model = exchange.attach(make())
    optimizer = optimizer_of(model)
    dtype, world = next(model.parameters()).dtype, dist.get_world_size()
    found: dict[str, Any] = {key: [] for key in ("seconds", "losses", "sent", "highest", "behind", "gone", "waited")}
    for step in range(steps):
        started = time.perf_counter()
        before_step(step)
        mine = torch.zeros((), dtype=dtype)
        place = None
        for share in exchange.shares(batch_of(step, dtype), rank, world, accumulate):
            if share.place != place:
                place = share.place
                torch.manual_seed(1000 * step + place)
            work(step)
            loss = nn.functional.cross_entropy(model(share.batch.inputs), share.batch.targets)
            (share.weight * loss).backward()
            mine += share.weight * loss.detach()
        exchange.tell_loss(mine)
        exchange.finish_gradients()
        found["losses"].append(float(exchange.known_loss()))
        found["sent"].append(exchange.bytes_sent_per_step(model, world))
        found["highest"].append(exchange.agree([float(step), float(rank)]))
        for key in ("behind", "gone", "waited"):
            found[key].append(exchange.metrics()[key])
        optimizer.step()
        optimizer.zero_grad()
        found["seconds"].append(time.perf_counter() - started)
    found["weights"] = [param.detach() for param in model.parameters()]
    found["skipped"] = exchange.skipped
    return found


def uncoded(make: Model = mlp, chunks: int = 1, steps: int = STEPS) -> dict[str, Any]:
    """Train in one process on the whole batches, cut into `chunks` that draw their own random numbers."""
    torch.manual_seed(0)
    model = make()
    optimizer = optimizer_of(model)
    dtype, losses = next(model.parameters()).dtype, []
    for step in range(steps):
        whole = batch_of(step, dtype)
        total = 0.0
        for place, chunk in enumerate(whole.split(chunks)):
            torch.manual_seed(1000 * step + place)
            loss = nn.functional.cross_entropy(model(chunk.inputs), chunk.targets) / chunks
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "weights": [param.detach() for param in model.parameters()]}


def joined(message: Message) -> bytearray:
    return bytearray().join(message.pieces())


def assert_same_bits(found: list[dict[str, Any]]) -> None:
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other["weights"], found[0]["weights"], strict=True))
        assert other["losses"] == found[0]["losses"]
        assert other["highest"] == found[0]["highest"]


def assert_trains_the_same(found: dict[str, Any], reference: dict[str, Any], atol: float = 1e-5) -> None:
    for mine, others in zip(found["weights"], reference["weights"], strict=True):
        torch.testing.assert_close(mine, others, rtol=0, atol=atol)
    assert found["losses"] == pytest.approx(reference["losses"], abs=atol)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition": ({"stragglers": 1}, {}),
    "circulant": ({"stragglers": 1, "code": "circulant"}, {}),
    "random": ({"stragglers": 2}, {}),
    "all but one": ({"stragglers": 3}, {}),
    "none": ({"stragglers": 0}, {}),
    "accumulated": ({"stragglers": 1, "code": "circulant"}, {"accumulate": 3}),
    "float64": ({"stragglers": 2}, {"make": lambda: mlp(dtype=torch.float64)}),
    "dropout": ({"stragglers": 2, "code": "random"}, {"make": lambda: mlp(dropout=0.5)}),
    "dropout, repeated": ({"stragglers": 1}, {"make": lambda: mlp(dropout=0.5)}),
    "partly used": ({"stragglers": 1}, {"make": PartlyUsed}),
}


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    """What each of four processes ends with, for every case. In every step another one is late."""

    def run(rank: int) -> dict[str, Any]:
        def late(step: int) -> None:
            time.sleep(0.02 * (step % 4 == rank))

        return {name: coded(rank, GradientCoding(**s), **k, work=late) for name, (s, k) in CASES.items()}

    uncoded(steps=1)  # imports what a first step imports, once and not in every process
    return in_processes(4, run)


@pytest.mark.parametrize("name", CASES)
def test_all_processes_hold_the_same_bits(four: list[dict[str, Any]], name: str) -> None:
    assert_same_bits([each[name] for each in four])


@pytest.mark.parametrize("name", CASES)
def test_four_processes_train_what_one_trains_on_the_whole_batch(four: list[dict[str, Any]], name: str) -> None:
    make = CASES[name][1].get("make", mlp)
    reference = uncoded(make, chunks=4 if "dropout" in name or name == "partly used" else 1)
    assert_trains_the_same(four[0][name], reference, atol=1e-10 if name == "float64" else 1e-5)


def test_a_parameter_that_nobody_used_is_left_alone(four: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = PartlyUsed()
    start = dict(zip((name for name, _ in model.named_parameters()), model.parameters(), strict=True))
    ended = dict(zip(start, four[0]["partly used"]["weights"], strict=True))
    changed = {name.partition(".")[0] for name in start if not torch.equal(start[name], ended[name])}
    assert changed == {"first", "last", "seldom"}  # weight decay would have moved `unused`


def test_bytes_are_one_gradient_up_and_one_down_to_everybody(four: list[dict[str, Any]]) -> None:
    params = list(mlp().parameters())
    numbers, agreed = sum(param.numel() for param in params) + 1, 2
    answer = message_bytes(agreed, numbers, 4, len(params))
    for worker in four[1:]:
        assert set(worker["repetition"]["sent"][1:]) <= {answer, message_bytes(agreed, 0, 0, 0)}
    down = GradientCoding().predicted_bytes(params, 4)
    assert four[0]["repetition"]["sent"][0] == down  # before anything was agreed
    assert set(four[0]["repetition"]["sent"][1:]) == {down + 3 * 8 * agreed}
    assert answer / (4 * numbers) < 1.5


def test_what_is_agreed_comes_one_step_later_and_is_a_maximum_over_those_heard(four: list[dict[str, Any]]) -> None:
    highest = four[0]["none"]["highest"]  # with nobody missing, it is over all
    assert highest[0] is None
    assert highest[1:] == [[step - 1.0, 3.0] for step in range(1, STEPS)]


# Late, frozen and dead.


def asleep(worker: int, seconds: float, rank: int) -> Callable[[int], None]:
    return lambda step: time.sleep(seconds * (10 if rank == worker else 1))


@pytest.mark.parametrize("late", [0, 3])
def test_a_worker_ten_times_slower_does_not_slow_down_the_others(late: int) -> None:
    compute = 0.03
    found = in_processes(4, lambda rank: coded(rank, GradientCoding(1), steps=30, work=asleep(late, compute, rank)))
    assert_same_bits(found)
    assert_trains_the_same(found[0], uncoded(steps=30))
    others = [each for rank, each in enumerate(found) if rank != late]
    assert max(sorted(each["seconds"])[15] for each in others) < 2 * 2 * compute  # not 20; 1.3 on a quiet machine
    assert sum(others[0]["seconds"]) < 30 * 10 * compute
    assert found[late]["skipped"] > 15
    assert max(found[1]["behind"]) > 3


def test_a_worker_too_far_behind_is_waited_for() -> None:
    def run(rank: int) -> dict[str, Any]:
        return coded(rank, GradientCoding(1, max_behind=2), steps=8, work=asleep(2, 0.01, rank))

    found = in_processes(4, run)
    assert_same_bits(found)
    assert_trains_the_same(found[0], uncoded(steps=8))
    assert max(found[0]["behind"]) == 2
    assert found[0]["waited"][-1] >= 1


def test_the_meeting_waits_for_everybody_and_a_gradient_that_is_not_finite_is_a_meeting() -> None:
    def run(rank: int) -> dict[str, Any]:
        exchange = GradientCoding(1)
        found: list[Any] = []

        def poisoned() -> nn.Module:
            model = mlp()
            model[0].weight.register_hook(lambda grad: grad * torch.nan)  # type: ignore[index, operator]
            return model

        with_nan = coded(rank, exchange, poisoned, steps=1, work=asleep(1, 0.05, rank))
        found.append(with_nan["highest"])
        found.append(exchange.agree([-float(rank)], always=True))
        return {"found": found, "weights": with_nan["weights"]}

    for each in in_processes(4, run):
        assert each["found"] == [[[0.0, 3.0]], [0.0]]
        assert each["weights"][0].isnan().all()


def in_mortal_processes(
    size: int, work: Callable[[int], dict[str, Any]], stop: float = 60, survivors: int = 3
) -> list[dict[str, Any]]:
    """What the processes left behind that were not killed; {"error": ...} of those that raised."""

    def body(rank: int, folder: Path) -> None:
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                "gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=size,
                timeout=timedelta(seconds=stop),
            )  # fmt: skip
            result = work(rank)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        torch.save(result, folder / f"{rank}.pt")
        while len(list(folder.glob("*.pt"))) < survivors:  # rank 0 must not end before the others have heard
            time.sleep(0.01)
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        workers = [fork.Process(target=body, args=(rank, Path(name))) for rank in range(size)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + stop
        while sum(not worker.is_alive() for worker in workers) < survivors and time.monotonic() < deadline:
            time.sleep(0.01)
        for worker in workers:
            worker.join(0.5)  # a frozen one is still there
            worker.kill()
            worker.join()
        files = [Path(name) / f"{rank}.pt" for rank in range(size)]
        return [torch.load(file, weights_only=True) if file.exists() else {} for file in files]


@pytest.mark.parametrize("when", ["while it computes", "while it sends"])
def test_training_goes_on_without_a_worker_that_is_killed(when: str) -> None:
    def run(rank: int) -> dict[str, Any]:
        exchange = GradientCoding(1)

        def die(step: int) -> None:
            if rank != 3 or step < 4:
                return
            if when == "while it computes":
                os.kill(os.getpid(), signal.SIGKILL)
            assert exchange._link is not None
            exchange._link.socket.sendall(joined(Message(Topic.ANSWER, step, (), torch.ones(100)))[:200])
            os.kill(os.getpid(), signal.SIGKILL)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = coded(rank, exchange, before_step=die)
        return {**found, "said": [str(each.message) for each in said]}

    *left, dead = in_mortal_processes(4, run)
    assert dead == {}
    assert not any("error" in each for each in left), left
    assert_same_bits(left)
    assert_trains_the_same(left[0], uncoded())
    assert left[1]["gone"][0] == 0
    assert left[1]["gone"][-1] == 1
    assert left[2]["said"] == ["gradient coding goes on without rank 3 of 4"]


def test_a_frozen_worker_is_given_up_once_it_has_been_waited_for() -> None:
    def run(rank: int) -> dict[str, Any]:
        def freeze(step: int) -> None:
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGSTOP)

        return coded(rank, GradientCoding(1, max_behind=3, timeout_s=4.0), before_step=freeze)

    found = in_mortal_processes(4, run)
    left = [each for each in found if each]
    assert len(left) == 3
    assert not any("error" in each for each in left), left
    assert_same_bits(left)
    assert_trains_the_same(left[0], uncoded())
    assert left[0]["gone"][-1] == 1
    assert max(left[0]["behind"]) == 3


def test_when_too_many_are_gone_everybody_is_told_who() -> None:
    def run(rank: int) -> dict[str, Any]:
        def die(step: int) -> None:
            if rank in (2, 3) and step == rank:
                os._exit(0)

        return coded(rank, GradientCoding(1), before_step=die)

    first, second, *_ = in_mortal_processes(4, run, survivors=2)
    for each in (first, second):
        assert "RunError: too many processes are gone to decode step" in each["error"]
        assert "rank 2 (" in each["error"]
        assert "rank 3 (" in each["error"]


def test_when_rank_0_is_gone_everybody_is_told() -> None:
    def run(rank: int) -> dict[str, Any]:
        return coded(rank, GradientCoding(1), before_step=lambda step: rank == 0 and step == 3 and os._exit(0))

    _, *others = in_mortal_processes(4, run)
    for each in others:
        assert "RunError: " in each["error"]
        assert "rank 0, which decodes" in each["error"]


def test_a_worker_whose_packet_is_damaged_is_done_without() -> None:
    def run(rank: int) -> dict[str, Any]:
        exchange = GradientCoding(1)

        def damage(step: int) -> None:
            if rank == 2 and step == 2:
                assert exchange._link is not None
                data = joined(Message(Topic.ANSWER, step, (), torch.ones(1000)))
                data[500] ^= 1
                exchange._link.socket.sendall(data)

        return coded(rank, exchange, before_step=damage)

    found = in_mortal_processes(4, run)
    assert "RunError: " in found[2]["error"]
    assert "rank 0, which decodes," in found[2]["error"]  # whether it notices by reading or by writing
    left = [found[rank] for rank in (0, 1, 3)]
    assert not any("error" in each for each in left), left
    assert_same_bits(left)
    assert_trains_the_same(left[0], uncoded())


# Messages.


@settings(deadline=None)
@given(
    st.sampled_from(Topic), st.integers(0, 2**32 - 1), st.lists(st.floats(allow_nan=False), max_size=5),
    st.integers(0, 30), st.sampled_from([torch.float32, torch.float64, None]), st.binary(max_size=20),
    st.data(),
)  # fmt: skip
def test_messages_arrive_as_they_were_sent_or_not_at_all(
    topic: Topic, step: int, values: list[float], numel: int, dtype: torch.dtype | None, rest: bytes, data: Any
) -> None:
    numbers = None if dtype is None else torch.arange(numel, dtype=dtype)
    tail = torch.tensor(list(rest), dtype=torch.uint8)
    sent = joined(Message(topic, step, tuple(values), numbers, tail))
    size = 0 if numbers is None else numbers.element_size()
    assert len(sent) == message_bytes(len(values), 0 if numbers is None else numel, size, len(rest))
    assert struct.unpack_from("<Q", sent) == (len(sent) - 8,)

    packet = torch.frombuffer(sent, dtype=torch.uint8)[8:]
    found = Message.from_packet(packet)
    assert (found.topic, found.step, found.values, bytes(found.rest.tolist())) == (topic, step, tuple(values), rest)
    assert (found.numbers is None) == (numbers is None)
    assert numbers is None or torch.equal(found.numbers, numbers)  # type: ignore[arg-type]

    place, bit = data.draw(st.integers(0, packet.numel() - 1)), data.draw(st.integers(0, 7))
    damaged = packet.clone()
    damaged[place] ^= 1 << bit
    with pytest.raises(PacketError):
        Message.from_packet(damaged)
    with pytest.raises(PacketError):
        Message.from_packet(packet[: data.draw(st.integers(0, packet.numel() - 1))])


def test_a_message_whose_sizes_contradict_one_another_is_refused() -> None:
    from leantrain.exchange.packet import Kind, seal

    for topic, size, count, rest in [(1, 4, 1, 0), (1, 4, 0, 9), (1, 3, 0, 0), (77, 4, 0, 0), (1, 8, 0, 0)]:
        contents = torch.frombuffer(bytearray(struct.pack("<BBHI", topic, size, count, rest)), dtype=torch.uint8)
        packet = seal(Kind.CODED, torch.cat([contents, torch.zeros(8, dtype=torch.uint8)]), numel=2)
        with pytest.raises(PacketError, match="a message"):
            Message.from_packet(packet)
    with pytest.raises(PacketError, match="a message has 3 bytes"):
        Message.from_packet(seal(Kind.CODED, torch.zeros(3, dtype=torch.uint8), numel=0))


def test_an_inbox_puts_pieces_together_and_refuses_lengths_that_cannot_be() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        inbox = Inbox(here, most=1000)
        data = joined(Message(Topic.MEET, 7, (1.0, 2.0))) * 2
        packets = []
        for start in range(0, len(data), 5):
            there.sendall(data[start : start + 5])
            while (packet := inbox.read()) is not None:
                packets.append(Message.from_packet(packet))
        assert [packet.step for packet in packets] == [7, 7]
        for length in (0, 31, 1001, 2**63):
            there.sendall(struct.pack("<Q", length))
            with pytest.raises(PacketError, match="is announced, allowed are 32 to 1000"):
                inbox.read()
            inbox = Inbox(here, most=1000)
        there.close()
        with pytest.raises(ConnectionError, match="closed"):
            inbox.read()


# What is refused, and what one process does.


def test_strangers_are_turned_away() -> None:
    from leantrain.exchange.stragglers import link

    token, found = b"x" * 16, {}
    with link._listener() as listener:
        port = listener.getsockname()[1]
        accepting = threading.Thread(target=lambda: found.update(link._accept(listener, token, {1}, 20.0)))
        accepting.start()
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"y" * 20)
            assert stranger.recv(1) == b""
        where = {"hosts": ["127.0.0.1"], "port": port, "token": token.hex()}
        with link._connect(where, 1, 20.0):
            accepting.join(20.0)
            assert list(found) == [1]
        found[1].close()


def refused(rank: int, exchange: GradientCoding, model: nn.Module) -> str:
    try:
        exchange.attach(model)
    except UsageError as error:
        return str(error)
    return ""


def test_what_the_code_cannot_serve_is_refused_in_every_process() -> None:
    def run(rank: int) -> dict[str, Any]:
        exchange = GradientCoding(1)
        exchange.attach(nn.Linear(2, 2))
        odd = Batch(torch.zeros(6, 2), torch.zeros(6, 2), torch.arange(6))
        with pytest.raises(UsageError, match="6 examples cannot be cut into world=4 workers"):
            exchange.shares(odd, rank, 4)
        wrapped = DistributedDataParallel(nn.Linear(2, 2))
        assert GradientCoding(1).attach(wrapped) is wrapped.module
        return {
            "again": refused(rank, exchange, nn.Linear(2, 2)),
            "all late": refused(rank, GradientCoding(4), nn.Linear(2, 2)),
            "norm": refused(rank, GradientCoding(1), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))),
            "frozen norm": refused(rank, GradientCoding(1), nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1).eval())),
            "bfloat16": refused(rank, GradientCoding(2), nn.Linear(2, 2).bfloat16()),
            "bfloat16, repeated": refused(rank, GradientCoding(1), nn.Linear(2, 2).bfloat16()),
            "no such code": refused(rank, GradientCoding(2, code="repetition"), nn.Linear(2, 2)),
        }

    for said in in_processes(4, run):
        assert said["again"] == "exchange GradientCoding is attached to a model already; make another one for another"
        assert "stragglers=4 must be below the number of processes, which is 4" in said["all late"]
        assert "cannot train BatchNorm2d '1'" in said["norm"]
        assert said["frozen norm"] == said["bfloat16, repeated"] == ""
        assert "with stragglers=1 or 3 the code is repetition" in said["bfloat16"]
        assert "s + 1 to divide n, got n=4, s=2" in said["no such code"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stragglers": -1}, "stragglers must be a whole number from 0, got -1"),
        ({"code": "turbo"}, "code must be one of best, repetition, circulant, random, got 'turbo'"),
        ({"max_behind": 0}, "max_behind must be a whole number of steps from 1, got 0"),
        ({"timeout_s": 0}, "timeout_s must be a number of seconds above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GradientCoding(**settings)


def test_one_process_trains_plainly() -> None:
    torch.manual_seed(0)
    exchange = GradientCoding(stragglers=2)
    plain = mlp()
    model = exchange.attach(plain)
    assert model is plain
    shares = exchange.shares(batch_of(0, torch.float32), 0, 1, accumulate=3)
    assert [share.weight for share in shares] == [1 / 3] * 3
    for share in shares:
        (share.weight * nn.functional.cross_entropy(model(share.batch.inputs), share.batch.targets)).backward()
    exchange.tell_loss(torch.tensor(2.5))
    before = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    exchange.finish_gradients()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)
    assert exchange.known_loss() == 2.5
    assert exchange.agree([1.0, 2.0]) == [1.0, 2.0]
    assert exchange.bytes_sent_per_step(model, 1) == exchange.predicted_bytes(list(model.parameters()), 1) == 0
    assert exchange.metrics() == exchange.state_dict() == {}
    exchange.close()


def test_when_it_pays_is_a_formula() -> None:
    def both(compute_s: float) -> tuple[float, float]:
        return mean_step_seconds(4, 0, 0.1, compute_s, 0.45), mean_step_seconds(4, 1, 0.1, compute_s, 0.45)

    assert both(0.05) == pytest.approx((0.205, 0.124), abs=1e-3)
    assert both(0.2) == pytest.approx((0.355, 0.424), abs=1e-3)


def test_chunks_are_weighted_by_the_code() -> None:
    def run(rank: int) -> dict[str, Any]:
        exchange = GradientCoding(2)
        exchange.attach(nn.Linear(2, 2))
        shares = exchange.shares(Batch(torch.arange(5.0), torch.zeros(5), torch.arange(5)), rank, 5)
        return {
            "at": [int(share.batch.inputs) for share in shares],
            "places": [share.place for share in shares],
            "weights": [share.weight for share in shares],
        }

    for rank, found in enumerate(in_processes(5, run)):
        row = circulant(5, 2)[rank]
        assert found["places"] == found["at"] == row.nonzero().flatten().tolist()
        assert found["weights"] == [value / 5 for value in row.tolist() if value]


# In the loop.


class LastIsLate(nn.Module):
    """A small language model whose forward pass takes 20 ms, and in the process of rank 3 ten times as long."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed, self.head, self.dropout = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size), nn.Dropout(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            time.sleep(0.2 if os.environ.get("RANK") == "3" else 0.02)
        return self.head(self.dropout(self.embed(tokens)))  # type: ignore[no-any-return]


def test_the_loop_trains_what_ddp_trains_and_does_not_wait_for_the_late(tmp_path: Path) -> None:
    coded_ = Component("leantrain.exchange.stragglers.gradient_coding.GradientCoding", {"stragglers": 1})
    recipe = small_recipe(
        model=Component("tests.exchange.stragglers.test_gradient_coding.LastIsLate"),
        exchange=coded_, steps=20, clip=0.5, eval_every=0, checkpoint_every=20, log_every=1,
    )  # fmt: skip
    dense = replace(recipe, exchange=Component("leantrain.exchange.Dense"))
    Processes(4, [(recipe, tmp_path / "coded"), (dense, tmp_path / "dense")], tmp_path).must_succeed()
    lines, expected = (
        [line for line in log_without_times(tmp_path / name) if "loss" in line and "lr" in line]
        for name in ("coded", "dense")
    )
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert max(line["exchange/behind"] for line in lines) > 3
    for mine, other in zip(lines, expected, strict=True):  # the same random numbers in each part of the batch
        assert mine["examples"] == other["examples"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
    weights = checkpoint_tensors(tmp_path / "dense", 20)
    for name, tensor in checkpoint_tensors(tmp_path / "coded", 20).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5, msg=name)
