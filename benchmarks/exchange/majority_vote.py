"""The majority vote: how fast signs are packed, what is sent, what is learnt, and what liars can do about it.

    python -m benchmarks.exchange.majority_vote

Three tables. Speed: packing and unpacking on one core, beside the same with PyTorch's operations alone and beside a
plain copy, in one run. Bytes: by the formula of every exchange. Accuracy: a small network on the digits of
scikit-learn, whose workers' gradients are packed, voted on and unpacked by the library's own functions in this process.
Learning rates of the vote, of SGD and of Adam are chosen from grids of equal length, on a validation set, without
liars unless a row says otherwise. A liar runs the same code as everybody else on a changed gradient.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import starmap

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.result import write_result
from leantrain.exchange.channel import Echo
from leantrain.exchange.codecs.signs import _pack_in_torch, majority, pack_signs, unpack_signs
from leantrain.exchange.dense import Dense
from leantrain.exchange.hook import Bucket
from leantrain.exchange.majority_vote import MajorityVote
from leantrain.nn import Llama, ResNetCifar

SEEDS, EPOCHS, BATCH = 3, 30, 16
RATES = {
    "vote": (3e-4, 1e-3, 3e-3, 1e-2),
    "SGD": (0.03, 0.1, 0.3, 1.0),
    "Adam": (3e-4, 1e-3, 3e-3, 1e-2),
}
"""Constant factors apart; SGD has momentum 0.9. All fall linearly to zero."""

Attack = Callable[[Tensor, torch.Generator], Tensor]
"""From a worker's honest gradient to what it takes for its gradient."""

ATTACKS: dict[str, Attack] = {
    "none": lambda gradient, _: gradient,
    "inverts": lambda gradient, _: -gradient,
    "inverts, 1000 times as large": lambda gradient, _: -1000 * gradient,
    "random": lambda gradient, generator: (
        torch.randn(gradient.shape, generator=generator) * gradient.norm() / gradient.numel() ** 0.5
    ),
}


@dataclass(frozen=True)
class Case:
    """A training: who takes part, and what is done with the gradients."""

    method: str
    workers: int
    liars: int = 0
    attack: str = "none"
    adapted: bool = False
    """Whether its learning rate is chosen with the liars in it."""

    def described(self) -> str:
        name = {"vote": "majority vote", "SGD": "mean, SGD", "Adam": "mean, Adam"}[self.method]
        return f"{name}, rate chosen with the liars" if self.adapted else name


CASES = [
    Case("vote", 7), Case("SGD", 7), Case("Adam", 7),
    Case("vote", 3), Case("vote", 3, 1, "inverts"),
    Case("vote", 8), Case("vote", 8, 3, "inverts"),
    *(Case("vote", 7, liars, "inverts") for liars in (1, 2, 3, 4)),
    Case("SGD", 7, 3, "inverts"), Case("SGD", 7, 3, "inverts", adapted=True),
    Case("vote", 7, 1, "inverts, 1000 times as large"), Case("SGD", 7, 1, "inverts, 1000 times as large"),
    Case("vote", 7, 3, "inverts, 1000 times as large"),
    Case("vote", 7, 3, "random"), Case("SGD", 7, 3, "random"), Case("SGD", 7, 3, "random", adapted=True),
]  # fmt: skip


def main() -> None:
    speed()
    sent()
    accuracy()


def speed() -> None:
    rows = []
    for name, numbers, dtype in (
        ("float32, 1 M", 1 << 20, torch.float32),
        ("float32, 4 M", 1 << 22, torch.float32),
        ("bfloat16, 4 M", 1 << 22, torch.bfloat16),
        ("float16, 4 M", 1 << 22, torch.float16),
        ("float32, every second of 8 M", 1 << 22, torch.float32),
    ):
        apart = 2 if "second" in name else 1
        values = torch.randn(numbers * apart).to(dtype)[::apart]
        packed = pack_signs(values)
        plain_packed = _pack_in_torch(values.reshape(-1))
        assert torch.equal(packed, plain_packed)
        times = fastest(
            lambda values=values: pack_signs(values),
            lambda packed=packed, numbers=numbers, dtype=dtype: unpack_signs(packed, numbers, dtype),
            lambda values=values: _pack_in_torch(values.reshape(-1)),
            lambda packed=packed, dtype=dtype: unpack_in_torch(packed, dtype),
            lambda values=values: values.clone(),
        )
        size = numbers * dtype.itemsize / 1e9
        pack, unpack, torch_pack, torch_unpack, copy = times
        both, plain = pack + unpack, torch_pack + torch_unpack
        rows.append([
            name, f"{size / pack:.1f}", f"{size / unpack:.1f}", f"{size / both:.1f}", f"{size / plain:.2f}",
            f"{plain / both:.0f}", f"{size / copy:.1f}", f"{both / copy:.1f}",
        ])  # fmt: skip
    write_result(
        "exchange/majority_vote_speed",
        title="Signs packed and unpacked on one core: GB/s of numbers",
        columns=["numbers", "pack", "unpack", "pack and unpack", "PyTorch alone", "times as fast", "copy",
                 "time of so many copies"],
        rows=rows,
        notes=[
            "GB/s of numbers, not of signs; fastest of 30 turns, in which everything of a row has one. PyTorch alone: "
            "comparison, product with the powers of two, sum; back by shifts. New memory for every result.",
            *starmap(counting, ((3, 1 << 22), (8, 1 << 22))),
            whole_exchange(),
        ],
    )  # fmt: skip


def fastest(*works: Callable[[], object]) -> list[float]:
    """Seconds of each, the least of 30 turns in which each has one."""
    found = [torch.inf] * len(works)
    for _ in range(30):
        for place, work in enumerate(works):
            start = time.perf_counter()
            work()
            found[place] = min(found[place], time.perf_counter() - start)
    return found


def unpack_in_torch(packed: Tensor, dtype: torch.dtype) -> Tensor:
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    return (packed[:, None] >> shifts & 1).view(-1).to(dtype).mul_(2).sub_(1)


def counting(voters: int, numbers: int) -> str:
    stack = torch.stack([pack_signs(torch.randn(numbers)) for _ in range(voters)])
    numbers_each = [unpack_signs(each, numbers) for each in stack]
    packed, unpacked = fastest(
        lambda: majority(stack), lambda: torch.where(torch.stack(numbers_each).sum(0) >= 0, 1.0, -1.0)
    )
    return (
        f"The vote of {voters}: {numbers / packed / 1e9:.1f} G weights a second, {unpacked / packed:.0f} times as many "
        "as from unpacked signs."
    )


def whole_exchange() -> str:
    """All that a process computes for its step, with messages that cost nothing."""
    exchange = MajorityVote()
    exchange.channel = Echo(4)
    grads = [torch.randn(1024, 1024) for _ in range(8)]
    bucket = Bucket([str(place) for place in range(8)], grads, grads, 0, True)
    with torch.no_grad():
        (seconds,) = fastest(lambda: exchange.reduce(bucket))
    size = sum(each.numel() for each in grads) * 4 / 1e9
    return (
        f"A whole exchange among 4, momentum, checksums, count and all but the network: {size / seconds:.1f} GB/s of "
        "gradient."
    )


def sent() -> None:
    with torch.device("meta"):
        models = {
            "Llama, 512 wide": Llama(32_000, hidden=512, mlp_hidden=1376, layers=8, heads=8),
            "ResNet-18": ResNetCifar(18),
        }
    rows = []
    for name, model in models.items():
        params = list(model.parameters())
        weights = sum(param.numel() for param in params)
        for world in (2, 4, 16, 64):
            dense = Dense().predicted_bytes(params, world)
            sharded = MajorityVote().predicted_bytes(params, world)
            gathered = MajorityVote(route="gather").predicted_bytes(params, world)
            rows.append([
                f"{name}: {weights / 1e6:.1f} M weights", world, f"{dense / 1e6:.2f}", f"{sharded / 1e6:.3f}",
                f"{dense / sharded:.1f}", f"{8 * sharded / weights:.2f}", f"{gathered / 1e6:.3f}",
                f"{dense / gathered:.1f}",
            ])  # fmt: skip
    write_result(
        "exchange/majority_vote_bytes",
        title="What every process sends for a step, by the formulas",
        columns=["model", "processes", "dense float32, MB", "sharded, MB", "x fewer", "bits a weight", "gather, MB",
                 "x fewer than dense"],
        rows=rows,
        notes=["With headers and with the bits that say which rows have a gradient. bfloat16 gradients are half of the "
               "dense ones."],
    )  # fmt: skip


def accuracy() -> None:
    data = digits()
    rates = {method: chosen(Case(method, 7), data) for method in RATES}
    rows = []
    for case in CASES:
        rate = chosen(case, data) if case.adapted else rates[case.method]
        found = [trained(case, rate, seed, data)[1] for seed in range(SEEDS)]
        rows.append([
            case.workers, f"{case.liars} x {case.attack}" if case.liars else "none", case.described(),
            f"{100 * statistics.mean(found):.1f}", f"{100 * min(found):.1f} to {100 * max(found):.1f}",
        ])  # fmt: skip
    grids = "; ".join(f"{method} {rates[method]:g} of {', '.join(f'{r:g}' for r in RATES[method])}" for method in RATES)
    write_result(
        "exchange/majority_vote",
        title="Digits learnt by several workers, some of which lie",
        columns=["workers", "liars", "gradients", "accuracy on the test set, %", "three seeds, %"],
        rows=rows,
        notes=[
            f"A network 64-128-64-10, {EPOCHS} epochs, {BATCH} examples a worker and step, {len(data.test_y)} test "
            f"images. Learning rates, the best of four on validation images with 7 honest workers: {grids}; all fall "
            "linearly to zero. Momentum 0.9 on the workers (vote) or in the optimizer (SGD). Random gradients are "
            "as long as the honest ones.",
        ],
    )


@dataclass(frozen=True)
class Digits:
    """Images [n, 64] in 0..1 and their classes, in three parts."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    rest_x, test_x, rest_y, test_y = train_test_split(
        images / 16, labels, test_size=0.25, random_state=0, stratify=labels
    )
    train_x, validation_x, train_y, validation_y = train_test_split(
        rest_x, rest_y, test_size=0.2, random_state=0, stratify=rest_y
    )
    parts = (train_x, train_y, validation_x, validation_y, test_x, test_y)
    return Digits(*(torch.from_numpy(part).float() if part.ndim == 2 else torch.from_numpy(part) for part in parts))


def chosen(case: Case, data: Digits) -> float:
    """The learning rate with the best mean accuracy on the validation images."""

    def quality(rate: float) -> float:
        return statistics.mean(trained(case, rate, seed, data)[0] for seed in range(SEEDS))

    return max(RATES[case.method], key=quality)


def trained(case: Case, rate: float, seed: int, data: Digits) -> tuple[float, float]:
    """Accuracies on the validation and on the test images."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer: torch.optim.Optimizer
    if case.method == "Adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9 if case.method == "SGD" else 0.0)
    order, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    size = BATCH * case.workers
    steps = EPOCHS * (len(data.train_x) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    momenta = torch.zeros(case.workers, sum(param.numel() for param in model.parameters()))

    def loss(params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (images,)), labels)

    everybodys = vmap(grad(loss), in_dims=(None, 0, 0))
    for step in range(steps):
        if step % (len(data.train_x) // size) == 0:
            places = torch.randperm(len(data.train_x), generator=order)
        mine, places = places[:size].view(case.workers, BATCH), places[size:]
        params = {name: param.detach() for name, param in model.named_parameters()}
        gradients = everybodys(params, data.train_x[mine], data.train_y[mine])
        flat = torch.cat([each.flatten(1) for each in gradients.values()], 1)
        for liar in range(case.liars):
            flat[liar] = ATTACKS[case.attack](flat[liar], noise)
        if case.method == "vote":
            momenta.lerp_(flat, 0.1)
            result = unpack_signs(majority(torch.stack([pack_signs(each) for each in momenta])), flat.shape[1])
        else:
            result = flat.mean(0)
        start = 0
        for param in model.parameters():
            param.grad = result[start : start + param.numel()].view_as(param)
            start += param.numel()
        optimizer.step()
        schedule.step()

    def right(images: Tensor, labels: Tensor) -> float:
        return (model(images).argmax(1) == labels).float().mean().item()

    return right(data.validation_x, data.validation_y), right(data.test_x, data.test_y)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
