"""What Deep Gradient Compression withholds arrives later, and the rest is SGD with momentum."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.exchange.deep_gradient_compression import Joined
from leantrain.errors import UsageError
from leantrain.exchange.channel import Echo
from leantrain.exchange.deep_gradient_compression import DeepGradientCompression
from leantrain.exchange.packet import HEADER, Flag, Kind, PacketError, seal, unseal
from tests.gloo import in_processes

STEPS = 20


def together(exchanges: list[DeepGradientCompression], gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """One step: what the processes' exchanges make of their gradients. A model with these parameters is attached when
    an exchange has none yet."""
    table: list[Any] = [None] * len(exchanges)
    barrier = threading.Barrier(len(exchanges))
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        exchange = exchanges[rank]
        model = models(exchange, gradients[rank])
        exchange.channel = Joined(rank, table, barrier)
        for name, param in model.named_parameters():
            param.grad = gradients[rank][name].clone()
        try:
            exchange.finish_gradients()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(exchanges))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [{name: p.grad for name, p in exchange.test_model.named_parameters()} for exchange in exchanges]


def models(exchange: Any, like: dict[str, Tensor]) -> nn.Module:
    if not hasattr(exchange, "test_model"):
        random = torch.Generator().manual_seed(5)  # not the threads' common one
        model = nn.Module()
        for name, gradient in like.items():
            model.register_parameter(name, nn.Parameter(torch.randn(gradient.shape, generator=random)))
        exchange.test_model = exchange.attach(model)
    return exchange.test_model


def gradients(seed: int, world: int, scale: float = 1.0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {name: scale * torch.randn(shape, generator=random) for name, shape in SHAPES.items()} for _ in range(world)
    ]


SHAPES = {"wide": (7, 30), "bias": (7,), "kernel": (4, 3, 3, 3), "embedding": (20, 5)}


class Reference:
    """The published algorithm in float64, all workers at once, entry by entry where it matters."""

    def __init__(
        self, world: int, keep: float, m: float, nesterov: bool, masking: bool, clip: float | None, decay: float
    ):
        self.world, self.keep, self.m, self.nesterov, self.masking = world, keep, m, nesterov, masking
        self.clip, self.decay = clip, decay
        self.u: dict[Any, np.ndarray] = {}
        self.v: dict[Any, np.ndarray] = {}

    def push(self, key: Any, g: np.ndarray) -> np.ndarray:
        u = self.u.get(key, np.zeros_like(g))
        self.u[key] = self.m * (u + g) if self.nesterov else self.m * u + g
        return self.u[key] + g if self.nesterov else self.u[key]

    def step(self, name: str, grads: list[np.ndarray], weight: np.ndarray) -> np.ndarray:
        if self.clip is not None:
            most = self.clip / math.sqrt(self.world)
            grads = [g * min(1, most / np.sqrt((g**2).sum())) for g in grads]
        if weight.ndim < 2:
            return self.push(name, sum(grads) / self.world + self.decay * weight)
        d = np.zeros(weight.size)
        for rank, g in enumerate(grads):
            v = self.v.get((name, rank), np.zeros_like(g)) + self.push((name, rank), g)
            self.v[name, rank] = v
            order = sorted(range(v.size), key=lambda i: -abs(v.flat[i]))
            for i in order[: math.ceil(self.keep * v.size - 1e-9)]:
                d[i] += v.flat[i] / self.world
                v.flat[i] = 0
                if self.masking:
                    self.u[name, rank].flat[i] = 0
        return d.reshape(weight.shape) + self.push((name, "decay"), self.decay * weight)


@pytest.mark.parametrize("indices", ["int32", "gaps"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"nesterov": True},
        {"masking": False},
        {"clip": 3.0},
        {"weight_decay": 0.1},
        {"nesterov": True, "weight_decay": 0.1, "clip": 5.0, "momentum": 0.5},
    ],
    ids=str,
)
def test_steps_are_those_of_the_published_algorithm(variant: dict[str, Any], world: int, indices: str):
    settings = {"momentum": 0.9, "nesterov": False, "masking": True, "clip": None, "weight_decay": 0.0, **variant}
    exchanges = [
        DeepGradientCompression(0.03, values="float32", indices=indices, **settings)  # type: ignore[arg-type]
        for _ in range(world)
    ]
    reference = Reference(
        world, 0.03, settings["momentum"], settings["nesterov"], settings["masking"], settings["clip"],
        settings["weight_decay"],
    )  # fmt: skip
    for step in range(8):
        local = gradients(step, world)
        results = together(exchanges, local)
        for name in SHAPES:
            weight = exchanges[0].test_model.get_parameter(name).detach().double().numpy()  # type: ignore[attr-defined]
            expected = reference.step(name, [each[name].double().numpy() for each in local], weight)
            np.testing.assert_allclose(results[0][name].double(), expected, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(result[name], results[0][name]) for result in results)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


def trained(
    rank: int,
    world: int,
    exchange: DeepGradientCompression | None,
    steps: range = range(STEPS),
    cap_mb: float = 25.0,
    parts: int = 1,
    momentum: dict[str, Any] | None = None,
    state: list[Any] | None = None,
    before_step: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, Any]:
    """Train this process's share of the same batches, whatever the number of processes."""
    net = mlp()
    if state is not None:
        net.load_state_dict(state[rank]["model"])
    model: nn.Module = DistributedDataParallel(net, bucket_cap_mb=cap_mb) if world > 1 else net
    if exchange is not None:
        model = exchange.attach(model)
        if state is not None:
            exchange.load_state_dict(state[rank]["exchange"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, **(momentum or {}))
    losses, sent = [], []
    for step in steps:
        random = torch.Generator().manual_seed(step)
        x, y = torch.randn(24, 16, generator=random), torch.randint(4, (24,), generator=random)
        shares = list(zip(x.chunk(world)[rank].chunk(parts), y.chunk(world)[rank].chunk(parts), strict=True))
        for number, (inputs, targets) in enumerate(shares, start=1):
            last = number == len(shares)
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else torch.enable_grad():
                loss = nn.functional.cross_entropy(model(inputs), targets) / parts
                loss.backward()
        if exchange is not None:
            exchange.finish_gradients()
            sent.append(exchange.bytes_sent_per_step(model, world))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {
        "model": net.state_dict(),
        "exchange": exchange.state_dict() if exchange is not None else {},
        "losses": losses,
        "sent": sent,
        "predicted": exchange.predicted_bytes(list(net.parameters()), world) if exchange is not None else 0,
        "metrics": exchange.metrics() if exchange is not None else {},
    }


@pytest.mark.parametrize(
    "sgd", [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"nesterov": True, "weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize(("cap_mb", "parts"), [(25.0, 1), (0.001, 1), (0.001, 3)])
def test_keeping_everything_is_sgd_with_momentum(sgd: dict[str, Any], cap_mb: float, parts: int):
    whole = trained(0, 1, None, momentum={"momentum": 0.9, **sgd})["model"]

    def work(rank: int) -> dict[str, Tensor]:
        return trained(rank, 2, DeepGradientCompression(1.0, masking=False, **sgd), cap_mb=cap_mb, parts=parts)["model"]

    for model in in_processes(2, work):
        for name, weight in whole.items():
            assert (model[name] - weight).norm() <= 1e-6 * weight.norm()


@settings(max_examples=25)
@given(
    exponent=st.integers(-30, 25),
    world=st.integers(1, 3),
    keep=st.sampled_from([0.001, 0.05, 0.3]),
    form=st.sampled_from([("float16", "int32"), ("float16", "gaps"), ("float32", "int32")]),
    masking=st.booleans(),
)
def test_nothing_is_lost(exponent: int, world: int, keep: float, form: tuple[Any, Any], masking: bool):
    exchanges = [DeepGradientCompression(keep, values=form[0], indices=form[1], masking=masking) for _ in range(world)]
    for step in range(3):
        local = gradients(step, world, 10.0**exponent * 10.0**-step)
        before = [copy.deepcopy(exchange.state) for exchange in exchanges]
        results = together(exchanges, local)
        for name in SHAPES:
            if name == "bias":
                continue
            there, here = 0.0, world * results[0][name].flatten().double()
            for rank, exchange in enumerate(exchanges):
                old = before[rank].get(name, {"u": torch.zeros(1), "v": torch.zeros(1)})
                there = there + old["v"].double() + 0.9 * old["u"].double() + local[rank][name].flatten().double()
                here = here + exchange.state[name]["v"].double()
            assert (there - here).norm() <= 1e-6 * there.norm()


def test_the_layout_of_a_gradient_in_memory_does_not_matter():
    local = gradients(0, 2)
    strange = [{**each, "kernel": each["kernel"].to(memory_format=torch.channels_last)} for each in local]
    results = [together([DeepGradientCompression(0.05) for _ in range(2)], each)[0] for each in (local, strange)]
    assert strange[0]["kernel"].stride() != local[0]["kernel"].stride()
    assert all(torch.equal(results[0][name], results[1][name]) for name in SHAPES)


def test_what_16_bits_round_to_zero_stays_with_its_momentum():
    exchange = DeepGradientCompression(1e-3 * 2, exempt="bias")
    local = {"a": torch.zeros(1, 1000), "b": torch.zeros(1, 1000)}
    local["a"][0, 7], local["a"][0, 9], local["b"][0, 3], local["b"][0, 4] = 1e30, 1e29, 1e-3, 1e-4
    (result,) = together([exchange], [local])
    assert result["a"][0, 7] == pytest.approx(1e30, rel=2**-11)
    assert not result["b"].any()
    assert exchange.state["b"]["v"].nonzero().flatten().tolist() == [3, 4]
    assert exchange.state["b"]["u"].nonzero().flatten().tolist() == [3, 4]
    assert not exchange.state["a"]["u"].any()


def test_a_local_gradient_is_clipped_by_the_root_of_the_number_of_processes():
    exchanges = [DeepGradientCompression(1.0, momentum=0.0, clip=2.0) for _ in range(4)]
    local = [
        {"w": torch.full((5, 5), 10.0 ** (rank - 2)), "b": torch.full((4,), 10.0 ** (rank - 2))} for rank in range(4)
    ]
    norms = {"w": [0.05, 0.5, 1.0, 1.0], "b": [0.02, 0.2, 1.0, 1.0]}  # the limit is 2 / sqrt(4)
    for result in together(exchanges, local):
        for name, expected in norms.items():
            assert result[name].norm() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_warm_up_is_geometric_or_listed_and_counts_steps():
    exchange = DeepGradientCompression(0.001, warmup_steps=10)
    assert [exchange.keep_at(step) for step in range(0, 12, 2)] == pytest.approx(
        [0.31623, 0.1, 0.031623, 0.01, 0.0031623, 0.001], rel=1e-4
    )
    listed = DeepGradientCompression(0.001, warmup_steps=8, warmup=[0.25, 0.0625, 0.015625, 0.004])
    assert [listed.keep_at(step) for step in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10**9)] == [
        0.25, 0.25, 0.0625, 0.0625, 0.015625, 0.015625, 0.004, 0.004, 0.001, 0.001
    ]  # fmt: skip
    assert DeepGradientCompression(0.001).keep_at(0) == 0.001
    exchanges = [DeepGradientCompression(0.01, warmup_steps=2, warmup=[0.5, 0.1])]
    nonzero = []
    for step in range(4):
        (result,) = together(exchanges, gradients(step, 1))
        nonzero.append(int(result["embedding"].count_nonzero()))
        assert exchanges[0].metrics()["kept"] == pytest.approx([0.5, 0.1, 0.01, 0.01][step], abs=0.01)
    assert nonzero == [50, 10, 1, 1]


def test_a_dense_warm_up_goes_over_into_a_sparse_run_with_its_momentum():
    exchanges = [DeepGradientCompression(0.05, warmup_steps=3, warmup=[1.0]) for _ in range(2)]
    momentum = 0.0
    for step in range(3):
        local = gradients(step, 2)
        momentum = 0.9 * momentum + (local[0]["wide"] + local[1]["wide"]) / 2
        torch.testing.assert_close(together(exchanges, local)[0]["wide"], momentum)
    held = sum(exchange.state["wide"]["u"] for exchange in exchanges) / 2
    torch.testing.assert_close(held, momentum.flatten())
    assert not any(exchange.state["wide"]["v"].any() for exchange in exchanges)


def test_a_tensor_travels_whole_where_lists_would_be_longer():
    local = gradients(0, 8)
    exchanges = [DeepGradientCompression(0.25) for _ in range(8)]  # 7 x 6 bytes of a quarter, 14/8 x 4 bytes of all
    results = together(exchanges, local)
    mean = sum(each["wide"] for each in local) / 8
    torch.testing.assert_close(results[0]["wide"], mean)
    assert exchanges[0].metrics()["kept"] == 1.0
    assert DeepGradientCompression(0.25)._entries(1000, 0.25, 4) == 250


def test_exempt_tensors_travel_whole_and_have_no_residual():
    exchanges = [DeepGradientCompression(0.01, exempt="embed|head") for _ in range(2)]
    local = gradients(0, 2)
    results = together(exchanges, local)
    for name in ("embedding", "bias"):
        torch.testing.assert_close(results[0][name], (local[0][name] + local[1][name]) / 2)
        assert set(exchanges[0].state[name]) == {"u"}
    assert results[0]["wide"].count_nonzero() <= 2 * 3
    assert set(exchanges[0].state["wide"]) == {"u", "v"}


def test_a_tensor_that_one_process_did_not_use_keeps_what_it_withholds():
    exchanges = [DeepGradientCompression(0.01) for _ in range(2)]
    together(exchanges, gradients(0, 2))
    local = gradients(1, 2)
    local[0]["wide"].zero_()
    before = copy.deepcopy([exchange.state["wide"] for exchange in exchanges])
    results = together(exchanges, local)
    for key in ("u", "v"):
        assert torch.equal(exchanges[0].state["wide"][key], before[0][key])
        assert not torch.equal(exchanges[1].state["wide"][key], before[1][key])
    assert 1 <= results[0]["wide"].count_nonzero() <= 3
    local = gradients(2, 2)
    for each in local:
        each["wide"].zero_()
    assert not together(exchanges, local)[0]["wide"].any()


@pytest.mark.parametrize("name", ["wide", "bias"])
@pytest.mark.parametrize("indices", ["int32", "gaps"])
@pytest.mark.parametrize("keep", [0.01, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_taken_nowhere(name: str, indices: Any, keep: float, value: float):
    exchanges = [DeepGradientCompression(keep, indices=indices) for _ in range(3)]
    together(exchanges, gradients(0, 3))
    before = copy.deepcopy([exchange.state_dict() for exchange in exchanges])
    local = gradients(1, 3)
    local[1][name].view(-1)[2] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for result in together(exchanges, local):
            assert result[name].isnan().all()
    for exchange, old in zip(exchanges, before, strict=True):
        assert exchange.steps == old["steps"] == 1
        for tensor, entry in old["state"].items():
            assert all(torch.equal(exchange.state[tensor][key], entry[key]) for key in entry)


class Liar(Echo):
    """A channel whose other end sends what `lie` makes of our packet."""

    def __init__(self, lie: Callable[[Tensor], Tensor]) -> None:
        super().__init__(2)
        self.lie = lie

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor, self.lie(tensor.clone())])


def resealed(packet: Tensor, change: Callable[[Tensor], None]) -> Tensor:
    found = unseal(packet, Kind.TOP_K)
    payload = found.payload.clone()
    change(payload)
    return seal(Kind.TOP_K, payload, found.numel, found.tag)


def resealed_as(packet: Tensor, numel: int = 0, tag: int = 0, kind: Kind = Kind.TOP_K, length: int = 10**9) -> Tensor:
    """The same contents under another label, padded to the length that is received."""
    found = unseal(packet, Kind.TOP_K)
    other = seal(kind, found.payload[:length], numel or found.numel, tag or found.tag)
    return torch.cat([other, packet])[: packet.numel()]


@pytest.mark.parametrize(("lie", "message"), [
    (lambda packet: packet ^ (torch.arange(packet.numel()) == HEADER + 9).to(torch.uint8), "checksum"),
    (lambda packet: torch.zeros_like(packet), "not a packet"),
    (lambda packet: resealed(packet, lambda payload: payload[8:12].fill_(255)), "ascend"),
    (lambda packet: resealed(packet, lambda payload: payload[8:12].fill_(127)), "ascend"),
    (lambda packet: resealed(packet, lambda payload: payload[0:4].fill_(255)), "cannot have"),
    (lambda packet: resealed_as(packet, numel=10**6), "expected"),
    (lambda packet: resealed_as(packet, tag=5), "out of step"),
    (lambda packet: resealed_as(packet, kind=Kind.SIGNS), "kind"),
    (lambda packet: resealed_as(packet, length=3), "has no bytes"),
    (lambda packet: resealed_as(packet, length=40), "cannot have|begins with"),
])  # fmt: skip
def test_a_packet_that_cannot_be_ends_the_step_by_name_and_leaves_the_state(lie: Any, message: str):
    exchange = DeepGradientCompression(0.01)
    together([exchange], gradients(0, 1))
    before = copy.deepcopy(exchange.state)
    exchange.channel = Liar(lie)
    with pytest.raises(PacketError, match=message):
        exchange.finish_gradients()
    assert exchange.steps == 1
    assert all(torch.equal(exchange.state[name][key], before[name][key]) for name in before for key in before[name])


def test_a_peer_whose_numbers_are_not_finite_is_heard():
    exchange = DeepGradientCompression(0.01)
    models(exchange, gradients(0, 1)[0])
    for name, param in exchange.test_model.named_parameters():  # type: ignore[attr-defined]
        param.grad = gradients(0, 1)[0][name]
    exchange.channel = Liar(lambda packet: seal(
        Kind.TOP_K, (found := unseal(packet, Kind.TOP_K)).payload, found.numel, found.tag, Flag.NON_FINITE
    ))  # fmt: skip
    exchange.finish_gradients()
    assert all(p.grad.isnan().all() for p in exchange.test_model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", [
    {}, {"indices": "gaps"}, {"values": "float32"}, {"nesterov": True, "weight_decay": 0.01}, {"warmup_steps": 10},
], ids=str)  # fmt: skip
def test_a_run_that_was_ended_goes_on_bit_for_bit_with_other_buckets(settings: dict[str, Any]):
    def work(rank: int) -> list[Any]:
        whole = trained(rank, 2, DeepGradientCompression(0.02, **settings))
        state: list[Any] = [None, None]
        state[rank] = trained(rank, 2, DeepGradientCompression(0.02, **settings), range(8))
        rest = trained(rank, 2, DeepGradientCompression(0.02, **settings), range(8, STEPS), cap_mb=0.001, state=state)
        return [whole["model"], rest["model"], whole["sent"], whole["predicted"]]

    first, second = in_processes(2, work)
    for name, weight in first[0].items():
        assert torch.equal(weight, first[1][name])
        assert torch.equal(weight, second[0][name])
    assert first[2][-1] == first[3]
    assert len(set(first[2])) == (6 if "warmup_steps" in settings else 1)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("on_resize", ["mean", "drop"])
def test_a_run_goes_on_with_another_number_of_processes(on_resize: Any, world: int):
    def exchange() -> DeepGradientCompression:
        return DeepGradientCompression(0.02, on_resize=on_resize)

    old = in_processes(2, lambda rank: trained(rank, 2, exchange()))
    states = [each["exchange"] for each in old]
    resized = [exchange().resized(states, rank, world) for rank in range(world)]
    for name in ("0.weight", "2.weight", "4.weight"):
        if on_resize == "drop":
            assert not resized[0]["state"][name]
            continue
        for key in ("u", "v"):
            owed = sum(state["state"][name][key].double() for state in states) / 2
            held = sum(state["state"][name][key].double() for state in resized) / world
            torch.testing.assert_close(owed, held, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(resized[0]["state"]["0.bias"]["u"], states[0]["state"]["0.bias"]["u"])
    state = [{"model": old[0]["model"], "exchange": each} for each in resized]
    new = in_processes(world, lambda rank: trained(rank, world, exchange(), range(STEPS, STEPS + 5), state=state))
    assert all(torch.equal(new[0]["model"][name], each["model"][name]) for each in new for name in each["model"])
    assert np.isfinite(new[0]["losses"]).all()


def test_what_is_owed_when_the_number_of_processes_changes_is_what_a_flush_would_have_delivered():
    old = [DeepGradientCompression(0.02) for _ in range(2)]
    for step in range(4):
        together(old, gradients(step, 2))
    owed = sum(exchange.state["wide"]["v"] + 0.9 * exchange.state["wide"]["u"] for exchange in old) / 2
    assert owed.norm() > 10
    for on_resize, arriving in (("mean", owed), ("drop", torch.zeros_like(owed))):
        new = [DeepGradientCompression(1.0, on_resize=on_resize) for _ in range(3)]  # type: ignore[arg-type]
        local = gradients(9, 3)
        for rank, exchange in enumerate(new):
            models(exchange, local[rank])
            exchange.load_state_dict(exchange.resized([each.state_dict() for each in old], rank, 3))
        mean = sum(each["wide"] for each in local) / 3
        torch.testing.assert_close(together(new, local)[2]["wide"], mean + arriving.view(mean.shape))


def test_optimizers_that_would_push_twice_are_refused():
    params = list(mlp().parameters())
    exchange = DeepGradientCompression()
    exchange.connect([torch.optim.SGD(params, lr=0.1, weight_decay=0.1)])
    with pytest.raises(UsageError, match=r"momentum=0 there, and momentum=0\.9 here"):
        exchange.connect([torch.optim.SGD(params, lr=0.1, momentum=0.9)])
    with pytest.raises(UsageError, match="weight_decay=0 there"):
        DeepGradientCompression(weight_decay=0.1).connect([torch.optim.SGD(params, lr=0.1, weight_decay=0.1)])
    with pytest.warns(UserWarning, match=r"derived for torch\.optim\.SGD without momentum; AdamW will"):
        exchange.connect([torch.optim.AdamW(params)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exchange.check_optimizer(torch.optim.SGD)
    assert not exchange.clips


@pytest.mark.parametrize(("arguments", "message"), [
    ({"keep": 0.0}, "keep must be a share above 0"), ({"keep": 1.5}, "got 1.5"), ({"momentum": 1.0}, "momentum"),
    ({"weight_decay": -1.0}, "weight_decay"), ({"clip": 0.0}, "clip"), ({"warmup_steps": -1}, "warmup_steps"),
    ({"warmup": 0}, "warmup"), ({"warmup": []}, "warmup"), ({"warmup": [2.0]}, "a stage of warmup"),
    ({"exempt": "("}, "regular expression"), ({"on_resize": "flush"}, "on_resize"), ({"values": "int8"}, "values"),
    ({"indices": "int64"}, "indices"), ({"timeout_s": 0}, "timeout_s"),
])  # fmt: skip
def test_arguments_that_are_not_allowed_are_named(arguments: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        DeepGradientCompression(**arguments)


def test_state_of_another_form_of_momentum_is_refused():
    exchange = DeepGradientCompression()
    models(exchange, gradients(0, 1)[0])
    with pytest.raises(UsageError, match="nesterov"):
        exchange.load_state_dict(DeepGradientCompression(nesterov=True).state_dict())


class AlexNet(nn.Module):
    """Krizhevsky's, with its convolutions in two groups: 60,965,224 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Conv2d(3, 96, 11), nn.Conv2d(96, 256, 5, groups=2), nn.Conv2d(256, 384, 3),
            nn.Conv2d(384, 384, 3, groups=2), nn.Conv2d(384, 256, 3, groups=2),
            nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000),
        ])  # fmt: skip


class WordModel(nn.Module):
    """Two layers of 1500 and 10,000 words, whose embedding is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10_000, 1500)
        self.lstm = nn.LSTM(1500, 1500, 2)
        self.head = nn.Linear(1500, 10_000)
        self.head.weight = self.embedding.weight


class ResNet50(nn.Module):
    """Its convolutions, norms and head."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 64, 7)]
        into = 64
        for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for block in range(blocks):
                sizes += [(into, width, 1), (width, width, 3), (width, 4 * width, 1)]
                sizes += [(into, 4 * width, 1)] if block == 0 else []
                into = 4 * width
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, size, bias=False), nn.BatchNorm2d(b)) for a, b, size in sizes
        )
        self.head = nn.Linear(2048, 1000)


@pytest.mark.parametrize(("network", "whole_mib", "sent_mib"), [
    (AlexNet, 232.56, 0.39), (ResNet50, 97.49, 0.35), (WordModel, 194.68, 0.42),
])  # fmt: skip
def test_messages_have_the_published_sizes(network: type[nn.Module], whole_mib: float, sent_mib: float):
    with torch.device("meta"):
        params = list(network().parameters())
    assert sum(p.numel() for p in params) * 4 / 2**20 == pytest.approx(whole_mib, abs=0.005)
    exchange = DeepGradientCompression()
    assert exchange.message_bytes(params) / 2**20 == pytest.approx(sent_mib, abs=0.005)
    gathered = exchange.predicted_bytes(params, 2)
    assert gathered == pytest.approx(exchange.message_bytes(params), rel=0.01)
    assert DeepGradientCompression(indices="gaps").message_bytes(params) < exchange.message_bytes(params)


def test_gathering_pays_where_the_formula_says():
    matrix = [torch.empty(1000, 6000, device="meta")]
    for world in (2, 4, 8):
        dense = 2 * (world - 1) / world * 4 * 6e6
        assert dense / DeepGradientCompression().predicted_bytes(matrix, world) == pytest.approx(
            4000 / 3 / world, rel=0.01
        )
