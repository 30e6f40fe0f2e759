"""The vote is the sign of the sum of signs by every route, in every process; fewer than half that lie do not matter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.exchange import Dense
from leantrain.exchange.hook import Bucket
from leantrain.exchange.majority_vote import MajorityVote
from leantrain.exchange.packet import HEADER, Kind, PacketError, seal
from leantrain.nn import Llama
from leantrain.optim import AdamW
from tests.gloo import in_processes

ROUTES = ["sharded", "gather", "auto"]
routes = pytest.mark.parametrize("route", ROUTES)


class Room:
    """Where `size` threads meet: the channels of an exchange without processes."""

    def __init__(self, size: int) -> None:
        self.table: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class Seat:
    """One thread's channel in a room. `spoil` may change what it sends."""

    def __init__(self, room: Room, rank: int, spoil: Callable[[Tensor], Tensor] = lambda sent: sent) -> None:
        self.room, self.rank, self.size, self.sent, self.spoil = room, rank, len(room.table), 0, spoil

    def reset(self) -> None:
        self.sent = 0

    def _show(self, tensor: Tensor) -> list[Tensor]:
        self.room.table[self.rank] = self.spoil(tensor.clone())
        self.room.barrier.wait()
        shown = list(self.room.table)
        self.room.barrier.wait()
        return shown

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        return torch.stack(self._show(tensor))

    def all_to_all(self, tensor: Tensor) -> Tensor:
        self.sent += (self.size - 1) * tensor[0].numel() * tensor.element_size()
        return torch.stack([shown[self.rank] for shown in self._show(tensor)])


class Crew:
    """`size` exchanges in threads of one process, each with its own gradients."""

    def __init__(self, size: int, spoil: dict[int, Callable[[Tensor], Tensor]] | None = None, **options: Any) -> None:
        self.members = [MajorityVote(**options) for _ in range(size)]
        room = Room(size)
        for rank, member in enumerate(self.members):
            member.channel = Seat(room, rank, **({"spoil": spoil[rank]} if spoil and rank in spoil else {}))  # type: ignore[assignment]

    def step(self, grads: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What every member makes of its gradients {name: tensor}, state committed as after a backward pass."""
        results: list[Any] = [None] * len(self.members)

        def work(rank: int) -> None:
            member, mine = self.members[rank], grads[rank]
            member._begin()
            finite = all(bool(grad.isfinite().all()) for grad in mine.values())
            bucket = Bucket(list(mine), list(mine.values()), list(mine.values()), 7, finite)
            try:
                with torch.no_grad():
                    results[rank] = dict(zip(mine, member.reduce(bucket), strict=True))
                if any(grad.isnan().any() for grad in results[rank].values()):
                    member._poisoned = True
                member._alone = nn.Identity()  # so that it does not wait for DDP's thread
                member._end()
            except threading.BrokenBarrierError:
                pass  # the error of somebody else will be raised
            except BaseException as error:
                results[rank] = error
                member.channel.room.barrier.abort()  # type: ignore[attr-defined]

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.members))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def sign(values: Tensor) -> Tensor:
    return torch.where(values >= 0, 1.0, -1.0)


def naive(momenta: list[Tensor]) -> Tensor:
    """sign(sum(sign)) in float64, with 0 -> +1."""
    return sign(sum(sign(m).double() for m in momenta)).float()  # type: ignore[arg-type]


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


SHAPES = {"w": (7, 5), "b": (7,), "scale": (), "conv": (3, 2, 3), "one": (1, 70)}


@routes
@pytest.mark.parametrize("size", range(1, 10))
def test_every_route_gives_the_sign_of_the_sum_of_signs_of_momenta(route: str, size: int) -> None:
    crew = Crew(size, route=route)
    momenta = [{name: torch.zeros(shape) for name, shape in SHAPES.items()} for _ in range(size)]
    for step in range(3):
        grads = [drawn(SHAPES, 100 * step + rank) for rank in range(size)]
        for mine, new in zip(momenta, grads, strict=True):
            for name in SHAPES:
                mine[name] = 0.9 * mine[name] + (1 - 0.9) * new[name]
        results = crew.step(grads)
        for name in SHAPES:
            expected = naive([mine[name] for mine in momenta])
            for result in results:
                assert torch.equal(result[name], expected), (name, step)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 5),
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    route=st.sampled_from(ROUTES),
    seed=st.integers(0, 1000),
)
def test_tensors_of_any_shape_are_voted_on(size: int, shapes: list[tuple[int, ...]], route: str, seed: int) -> None:
    named = {f"p{place}": shape for place, shape in enumerate(shapes)}
    grads = [drawn(named, 10 * seed + rank) for rank in range(size)]
    crew = Crew(size, momentum=0, route=route)
    for result in crew.step(grads):
        for name in named:
            assert torch.equal(result[name], naive([mine[name] for mine in grads]))
    sent = {member.channel.sent for member in crew.members}
    meta = [torch.empty(shape, device="meta") for shape in shapes]
    assert sent == {crew.members[0].predicted_bytes(meta, size)}


@routes
def test_no_process_counts_for_more_by_the_size_of_its_gradient(route: str) -> None:
    grads = [drawn(SHAPES, rank) for rank in range(4)]
    louder = [{name: grad * 10.0 ** (3 * rank - 4) for name, grad in mine.items()} for rank, mine in enumerate(grads)]
    for name, vote in Crew(4, route=route).step(grads)[0].items():
        assert torch.equal(Crew(4, route=route).step(louder)[0][name], vote)


@routes
@pytest.mark.parametrize(("size", "liars"), [(3, 1), (4, 1), (5, 2), (8, 3), (9, 4)])
def test_fewer_than_half_that_lie_change_nothing_where_the_others_agree(route: str, size: int, liars: int) -> None:
    honest = drawn(SHAPES, 0)
    lie = {name: -1000 * grad for name, grad in honest.items()}
    for result in Crew(size, route=route).step([lie] * liars + [honest] * (size - liars)):
        for name in SHAPES:
            assert torch.equal(result[name], sign(honest[name]))


@routes
def test_rows_without_a_gradient_anywhere_do_not_drift(route: str) -> None:
    grads = [drawn(SHAPES, rank) for rank in range(3)]
    for rank, mine in enumerate(grads):
        mine["w"][2] = mine["w"][4] = mine["b"][5] = 0
        mine["conv"][1] = mine["scale"][...] = 0
        if rank == 1:
            mine["w"][4, 3] = -2.0
    for momentum in (0.0, 0.9):
        for result in Crew(3, route=route, momentum=momentum).step(grads):
            assert not result["w"][2].any() and not result["b"][5] and not result["conv"][1].any()
            assert not result["scale"]
            assert torch.equal(result["w"][4], torch.ones(5))  # in one process it is other than 0: zeros vote for +1
            for name, rest in {"w": [0, 1, 3, 5, 6], "b": [0, 1, 2, 3, 4, 6], "conv": [0, 2]}.items():
                assert torch.equal(result[name][rest], naive([mine[name][rest] for mine in grads]))


@routes
def test_one_whose_gradient_is_not_finite_abstains(route: str) -> None:
    first, second = [drawn(SHAPES, rank) for rank in range(5)], [drawn(SHAPES, 10 + rank) for rank in range(5)]
    crew, without = Crew(5, route=route), Crew(4, route=route)
    crew.step(first)
    without.step([mine for rank, mine in enumerate(first) if rank != 2])
    before = crew.members[2].state["w"]["momentum"].clone()
    second[2]["b"][3] = torch.inf
    results = crew.step(second)
    expected = without.step([mine for rank, mine in enumerate(second) if rank != 2])[0]
    for result in results:
        for name in SHAPES:
            assert torch.equal(result[name], expected[name])
    assert torch.equal(crew.members[2].state["w"]["momentum"], before)
    assert [member.metrics()["abstained"] for member in crew.members] == [1.0] * 5


@routes
@pytest.mark.parametrize(("size", "broken"), [(1, 1), (2, 1), (4, 2), (5, 3)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unless_most_are_finite_no_step_is_taken(route: str, size: int, broken: int, momentum: float) -> None:
    crew = Crew(size, route=route, momentum=momentum)
    crew.step([drawn(SHAPES, rank) for rank in range(size)])
    before = [member.state_dict() for member in crew.members]
    kept = [{name: dict(entry) for name, entry in each["state"].items()} for each in before]
    grads = [drawn(SHAPES, rank) for rank in range(size)]
    for mine in grads[:broken]:
        mine["w"][0, 0] = torch.nan
    for result in crew.step(grads):
        assert all(grad.isnan().all() for grad in result.values())
    for member, state in zip(crew.members, kept, strict=True):
        assert member.steps == 1
        for name, entry in state.items():
            assert torch.equal(member.state[name]["momentum"], entry["momentum"])


def test_with_a_grad_scaler_one_overflow_is_everybodys() -> None:
    grads = [drawn(SHAPES, rank) for rank in range(3)]
    grads[1]["b"][0] = torch.inf
    for scaled in (False, True):
        crew = Crew(3)
        for member in crew.members:
            member._grad_scaler = torch.amp.GradScaler("cpu") if scaled else None
        for result in crew.step(grads):
            assert all(bool(grad.isnan().all()) == scaled for grad in result.values())


def divided(size: int, seed: int) -> list[dict[str, Tensor]]:
    """Gradients on which an even number of processes is divided everywhere."""
    grad = torch.randn(400, 3, generator=torch.Generator().manual_seed(seed))
    return [{"a": grad * (-1) ** rank, "b": grad[:100] * (-1) ** rank} for rank in range(size)]


@routes
def test_ties_are_plus_one_by_default(route: str) -> None:
    for result in Crew(4, route=route).step(divided(4, 0)):
        assert torch.equal(result["a"], torch.ones(400, 3))


@routes
def test_ties_may_stay_as_they_were_decided_last(route: str) -> None:
    crew = Crew(4, route=route, ties="previous", momentum=0)
    assert torch.equal(crew.step(divided(4, 0))[0]["a"], torch.ones(400, 3))  # nothing has been decided yet
    agreed = divided(4, 1)[0]
    crew.step([agreed] * 4)
    for seed in (2, 3):
        for result in crew.step(divided(4, seed)):
            for name in ("a", "b"):
                assert torch.equal(result[name], sign(agreed[name]))


@routes
def test_ties_may_be_drawn_alike_in_all_processes(route: str) -> None:
    crew = Crew(4, route=route, ties="random", momentum=0)
    rounds = [crew.step(divided(4, 0)) for _ in range(3)]
    for results in rounds:
        for name in ("a", "b"):
            assert all(torch.equal(result[name], results[0][name]) for result in results)
            assert abs(results[0][name].mean()) < 0.2
    assert not torch.equal(rounds[0][0]["a"], rounds[1][0]["a"])
    assert not torch.equal(rounds[0][0]["a"][:100], rounds[0][0]["b"])
    alone = Crew(4, route=route, ties="random", momentum=0)  # however parameters are arranged in buckets
    assert torch.equal(alone.step([{"b": mine["b"]} for mine in divided(4, 0)])[0]["b"], rounds[0][0]["b"])
    other = Crew(4, route="gather" if route == "sharded" else "sharded", ties="random", momentum=0)
    assert torch.equal(other.step(divided(4, 0))[0]["a"], rounds[0][0]["a"])


@pytest.mark.parametrize("ties", ["plus", "previous", "random"])
def test_saved_and_loaded_it_goes_on_bit_by_bit(ties: str) -> None:
    whole, second = Crew(4, ties=ties), Crew(4, ties=ties)
    for seed in range(3):
        whole.step([drawn(SHAPES, 10 * seed + rank) for rank in range(4)])
    for old, new in zip(whole.members, second.members, strict=True):
        new._names = dict(enumerate(SHAPES))
        new.load_state_dict(old.state_dict())
    grads = [drawn(SHAPES, 99 + rank // 2 * 2) for rank in range(4)]
    for mine in grads[2:]:
        for grad in mine.values():
            grad.neg_()
    left, right = whole.step(grads), second.step(grads)
    for name in SHAPES:
        assert torch.equal(left[0][name], right[0][name])


def test_other_processes_start_from_the_mean_of_the_momenta() -> None:
    crew = Crew(3, ties="previous")
    crew.step([drawn(SHAPES, rank) for rank in range(3)])
    states = [member.state_dict() for member in crew.members]
    for rank in range(5):
        new = MajorityVote(ties="previous").resized(states, rank, 5)["state"]
        mean = sum(state["state"]["w"]["momentum"] for state in states) / 3
        torch.testing.assert_close(new["w"]["momentum"], mean)
        assert torch.equal(new["w"]["vote"], states[0]["state"]["w"]["vote"])


def test_agreement_is_the_share_of_signs_that_were_the_majoritys() -> None:
    grads = [drawn({"w": (40, 40)}, rank) for rank in range(3)]
    crew = Crew(3, momentum=0)
    vote = crew.step(grads)[0]["w"]
    for member, mine in zip(crew.members, grads, strict=True):
        assert member.metrics()["agreement"] == pytest.approx((sign(mine["w"]) == vote).double().mean().item())
    crew.step([grads[0]] * 3)
    assert [member.metrics()["agreement"] for member in crew.members] == [1.0] * 3


@routes
def test_a_damaged_or_foreign_ballot_is_refused_by_name(route: str) -> None:
    def damaged(sent: Tensor) -> Tensor:
        sent[..., -1] ^= 4
        return sent

    def longer(sent: Tensor) -> Tensor:  # of the right kind, for as many numbers, intact, and of another size
        payload = torch.zeros(sent.shape[-1] - HEADER + 1, dtype=torch.uint8)
        packet = seal(Kind.SIGNS, payload, sum(torch.Size(shape).numel() for shape in SHAPES.values()), 7)
        return packet if sent.dim() == 1 else packet.expand(len(sent), -1)

    def from_another_bucket(sent: Tensor) -> Tensor:
        numel = sum(torch.Size(shape).numel() for shape in SHAPES.values())
        packet = seal(Kind.SIGNS, torch.zeros(sent.shape[-1] - HEADER, dtype=torch.uint8), numel, 8)
        return packet if sent.dim() == 1 else packet.expand(len(sent), -1)

    grads = [drawn(SHAPES, rank) for rank in range(2)]
    with pytest.raises(PacketError, match="damaged"):
        Crew(2, {0: damaged, 1: damaged}, route=route).step(grads)
    with pytest.raises(PacketError, match=r"a ballot has \d+ bytes, and \d+ are expected"):
        Crew(2, {0: longer, 1: longer}, route=route).step(grads)
    with pytest.raises(PacketError, match="tag 0x8"):
        Crew(2, {0: from_another_bucket, 1: from_another_bucket}, route=route).step(grads)


def test_auto_gathers_what_is_small_and_shares_out_what_is_large() -> None:
    small, large = torch.empty(100, 100, device="meta"), torch.empty(2000, 2000, device="meta")
    for params, world, route in [([small], 4, "gather"), ([large], 4, "sharded"), ([large], 2, "gather")]:
        expected = MajorityVote(route=route).predicted_bytes(params, world)  # type: ignore[arg-type]
        assert MajorityVote(route="auto").predicted_bytes(params, world) == expected


def test_bytes_are_a_thirtieth_of_dense_ones_or_fewer() -> None:
    params = [param.to("meta") for param in Llama(256, hidden=64, mlp_hidden=172, layers=2, heads=4).parameters()]
    weights = sum(param.numel() for param in params)
    for world in (2, 4, 8):
        voted = MajorityVote().predicted_bytes(params, world)
        assert Dense().predicted_bytes(params, world) > 30 * voted
        assert voted > 2 * (world - 1) / world * weights / 8
        everywhere = MajorityVote(route="gather").predicted_bytes(params, world)
        assert everywhere == pytest.approx((world - 1) * weights / 8, rel=0.05)
    assert MajorityVote().predicted_bytes(params, 1) == 0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, AdamW])
def test_only_plain_sgd_steps_by_votes(optimizer: type[torch.optim.Optimizer]) -> None:
    message = f"MajorityVote cannot be combined with optimizer {optimizer.__name__}: .* use torch.optim.SGD with mom"
    with pytest.raises(UsageError, match=message):
        MajorityVote().check_optimizer(optimizer)
    with pytest.raises(UsageError, match=message):
        MajorityVote().connect([optimizer([nn.Parameter(torch.ones(2))])])  # type: ignore[call-arg]


def test_sgd_with_a_momentum_of_its_own_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    MajorityVote().check_optimizer(torch.optim.SGD)
    MajorityVote().connect([torch.optim.SGD([weight], lr=0.1, weight_decay=0.1)])
    with pytest.raises(UsageError, match=r"optimizer SGD with momentum=0.9: .* use torch.optim.SGD with momentum=0"):
        MajorityVote().connect([torch.optim.SGD([weight], lr=0.1, momentum=0.9)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got momentum=1.0"),
        ({"momentum": -0.1}, "got momentum=-0.1"),
        ({"ties": "minus"}, "ties must be one of plus, previous, random, got ties='minus'"),
        ({"route": "tree"}, "route must be one of sharded, gather, auto, got route='tree'"),
    ],
)
def test_settings_that_are_not_allowed_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MajorityVote(**options)


def test_weight_decay_is_decoupled() -> None:
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    exchange = MajorityVote()
    model = exchange.attach(layer)
    assert model is layer
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, weight_decay=0.1)
    exchange.connect([optimizer])
    model(torch.randn(3, 6, generator=torch.Generator().manual_seed(0))).pow(2).sum().backward()
    assert layer.weight.grad is not None
    direction = sign(layer.weight.grad)
    exchange.finish_gradients()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.01 * (direction + 0.1 * before))


# Whole trainings, on the digits of scikit-learn: a network of two layers, 16 examples for each worker in every step.


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return train_x.float(), train_y, test_x.float(), test_y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def batches(examples: int, world: int, epochs: int) -> Iterator[Tensor]:
    """Of every step, the places of everybody's examples, [world, 16]."""
    order = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for places in torch.randperm(examples, generator=order).split(16 * world)[:-1]:
            yield places.view(world, 16)


def trained(rank: int, world: int, epochs: int, lr: float, factor: float, data: Any) -> dict[str, Any]:
    """Train in real processes with votes; the loss of this one is multiplied by `factor`."""
    train_x, train_y, test_x, test_y = data
    exchange, plain, sent = MajorityVote(), network(), []
    model = exchange.attach(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=lr)
    exchange.connect([optimizer])
    for places in batches(len(train_x), world, epochs):
        optimizer.zero_grad()
        mine = places[rank]
        (factor * nn.functional.cross_entropy(model(train_x[mine]), train_y[mine])).backward()
        exchange.finish_gradients()
        sent.append(exchange.bytes_sent_per_step(model, world))
        optimizer.step()
    return {
        "accuracy": (plain(test_x).argmax(1) == test_y).float().mean().item(),
        "weights": torch.cat([param.detach().flatten() for param in plain.parameters()]),
        "sent": sent,
    }


def trained_in_threads(factors: list[float], epochs: int, lr: float, vote: bool = True) -> float:
    """The accuracy where worker k multiplies its loss by factors[k], and gradients are voted on or averaged."""
    train_x, train_y, test_x, test_y = digits()
    model, crew = network(), Crew(len(factors))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for places in batches(len(train_x), len(factors), epochs):
        grads = []
        for factor, mine in zip(factors, places, strict=True):
            optimizer.zero_grad()
            (factor * nn.functional.cross_entropy(model(train_x[mine]), train_y[mine])).backward()
            grads.append({name: param.grad for name, param in model.named_parameters() if param.grad is not None})
        result = crew.step(grads)[0] if vote else {}
        for name, param in model.named_parameters():
            param.grad = result[name] if vote else torch.stack([mine[name] for mine in grads]).mean(0)
        optimizer.step()
    return (model(test_x).argmax(1) == test_y).float().mean().item()


def test_four_processes_learn_the_digits_with_one_bit_each_way_and_stay_the_same_bit_by_bit() -> None:
    data = digits()
    four = in_processes(4, lambda rank: trained(rank, 4, 10, 2e-3, 1.0, data))
    assert four[0]["accuracy"] >= 0.95
    params = list(network().parameters())
    predicted = MajorityVote().predicted_bytes(params, 4)
    for each in four:
        assert torch.equal(each["weights"], four[0]["weights"])
        assert set(each["sent"]) == {predicted}
    weights = sum(param.numel() for param in params)
    rows, headers, padding = 2 * (128 + 10), 2 * 3 * HEADER, 2 * 3 * 2
    assert predicted <= 2 * 3 / 4 * (weights + rows) / 8 + headers + padding
    assert Dense().predicted_bytes(params, 4) >= 25 * predicted


def test_three_of_seven_processes_that_invert_their_gradients_do_not_stop_it_and_four_do() -> None:
    data = digits()

    def work(rank: int) -> dict[str, float]:
        three = trained(rank, 7, 30, 1e-3, -1.0 if rank < 3 else 1.0, data)
        four = trained(rank, 7, 5, 1e-3, -1.0 if rank < 4 else 1.0, data)
        return {"three": three["accuracy"], "four": four["accuracy"]}

    found = in_processes(7, work)[0]
    assert found["three"] >= 0.92 and found["four"] <= 0.3, found
    assert trained_in_threads([1.0] * 7, 15, 2e-3) - found["three"] < 0.06


def test_one_loud_liar_ruins_the_mean_and_not_the_vote() -> None:
    loud = [-1000.0] + [1.0] * 6
    assert trained_in_threads(loud, 15, 2e-3) >= 0.95
    assert trained_in_threads([1.0] * 7, 10, 0.5, vote=False) >= 0.94
    assert trained_in_threads(loud, 3, 0.5, vote=False) <= 0.3
