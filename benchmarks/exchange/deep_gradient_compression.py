"""What withholding 99.9 % of the gradient costs in accuracy, what each part of the method is worth, and the codec.

    exchange/deep_gradient_compression         MNIST with 4 workers: dense, the method, and it with parts left out
    exchange/deep_gradient_compression_codec   finding, packing and unpacking the largest of 8 Mi entries on one core

Data is looked for in the folder LEANTRAIN_DATA, by default ../shared/data. Takes about five minutes on one quiet core.
"""

from __future__ import annotations

import copy
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.result import write_result
from leantrain.data.idx import read_idx
from leantrain.exchange import Dense
from leantrain.exchange.channel import Echo, ring_bytes
from leantrain.exchange.codecs.top_k import Form, TopK, at_least, kept, largest, sampled_threshold
from leantrain.exchange.deep_gradient_compression import DeepGradientCompression
from leantrain.exchange.hook import Bucket, GradientHook

DATA = Path(os.environ.get("LEANTRAIN_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mnist"
PROCESSES, BATCH, EPOCHS, SEEDS, HELD_OUT = 4, 32, 3, (0, 1, 2), 5000
KEEP, MOMENTUM = 0.001, 0.9
STAGES = (0.25, 0.0625, 0.015625, 0.004)
RATES = (0.02, 0.05, 0.1, 0.2)
NUMBERS = 8 * 2**20


class TopKHook(GradientHook):
    """Top-k without the method: what is left out is forgotten, or kept as it is, and momentum is the optimizer's."""

    def __init__(self, residual: bool, warmup_steps: int = 0) -> None:
        super().__init__()
        self.residual = residual
        self.schedule = DeepGradientCompression(KEEP, warmup_steps=warmup_steps, warmup=STAGES)

    def reduce(self, bucket: Bucket) -> list[Tensor]:
        if not bucket.finite:
            raise ValueError("a gradient is not finite")
        codec = TopK(self.schedule.keep_at(self.steps))
        results = []
        for name, grad in zip(bucket.names, bucket.grads, strict=True):
            if grad.dim() < 2:
                results.append(self.channel.all_reduce(grad.clone()) / self.world)
                continue
            held = self.committed(name, "residual")
            wanted = grad.flatten() + (0 if held is None else held)
            decoded = [codec.decode(each) for each in self.channel.all_gather_packets(codec.encode(wanted))]
            if self.residual:
                self.stage(name, "residual", wanted - decoded[self.rank])
            results.append((torch.stack(decoded).sum(0) / self.world).view_as(grad))
        return results


class Watched(DeepGradientCompression):
    """Adds up over all processes what a step took from them, and compares it with what it gave to everybody."""

    watching = False
    lost = 0.0

    def reduce(self, bucket: Bucket) -> list[Tensor]:
        results = super().reduce(bucket)
        for name, grad, result in zip(bucket.names, bucket.grads, results, strict=True) if self.watching else ():
            if grad.dim() > 1:
                v, u = self.committed(name, "v"), self.committed(name, "u")
                assert v is not None and u is not None
                taken = self.channel.all_reduce(v + self.momentum * u + grad.flatten() - self._staged[name]["v"])
                given = self.world * result.flatten()
                self.lost = max(self.lost, float((taken - given).norm() / given.norm()))
        return results


@dataclass(frozen=True)
class Scheme:
    """How gradients travel in a run, and where momentum is."""

    name: str
    exchange: Callable[[int], GradientHook] | None
    """Made for a number of warm-up steps; None: whole gradients."""
    momentum: float = MOMENTUM
    """Of the optimizer."""


def dgc(warm: bool, **settings: Any) -> Callable[[int], GradientHook]:
    return lambda steps: Watched(KEEP, MOMENTUM, warmup_steps=steps if warm else 0, warmup=STAGES, **settings)


SCHEMES = (
    Scheme("dense", None),
    Scheme("DGC", dgc(True), 0.0),
    Scheme("DGC without warm-up", dgc(False), 0.0),
    Scheme("DGC without masking", dgc(True, masking=False), 0.0),
    Scheme("residual of plain gradients, momentum at the receiver", lambda steps: TopKHook(True, steps)),
    Scheme("the same without warm-up", lambda steps: TopKHook(True)),
    Scheme("top-k without residual", lambda steps: TopKHook(False)),
)


def main() -> None:
    torch.set_num_threads(1)
    write_codec()
    write_quality()


# The codec.


def write_codec() -> None:
    values = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    gigabytes = 4 * NUMBERS / 1e9
    rows = []
    for keep in (0.001, 0.01):
        k = kept(NUMBERS, keep)
        chosen = largest(values, k)
        assert torch.equal(chosen, exact(values, k))
        candidates = at_least(values, sampled_threshold(values, k)).numel() / k
        slow, fast = timed([functools.partial(exact, values, k), functools.partial(largest, values, k)])
        for name, seconds, searched in (("exact search: torch.topk", slow, ""), ("sampled", fast, f"{candidates:.2f}")):
            times = [f"{1e3 * seconds:.1f}", f"{gigabytes / seconds:.2f}", f"{slow / seconds:.1f}"]
            rows.append([f"{keep:.1%}", name, *times, "", searched])
        for form in (Form(), Form(indices="gaps"), Form("float32")):
            codec = TopK(keep, form.values, form.indices)
            packet = codec.encode(values)
            encode, decode = timed([functools.partial(codec.encode, values), functools.partial(codec.decode, packet)])
            rows.append([
                f"{keep:.1%}",
                f"encode + decode, {form.values}, {form.indices}",
                f"{1e3 * encode:.1f} + {1e3 * decode:.1f}",
                f"{gigabytes / (encode + decode):.2f}",
                "",
                f"{packet.numel() / k:.3f}",
                "",
            ])  # fmt: skip
    write_result(
        "exchange/deep_gradient_compression_codec",
        title=f"The largest of {NUMBERS / 2**20:.0f} Mi float32 numbers: found, packed and unpacked on one core",
        columns=["kept", "what", "ms", "GB/s of float32", "x faster", "bytes per kept entry", "candidates / k"],
        rows=rows,
        notes=[
            "Normally distributed numbers; medians of 9 runs, alternating. Both searches find the same entries. "
            "Candidates: numbers at or above the sampled threshold, of which the k largest are then found exactly. "
            "Decoding makes a dense tensor; an exchange adds up lists without that."
        ],
    )  # fmt: skip


def exact(values: Tensor, k: int) -> Tensor:
    return values.abs().topk(k, sorted=False).indices.sort().values


def timed(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """The median seconds of each call, all of them in turn."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(10):
        for call, seconds in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in taken]


# The quality.


def write_quality() -> None:
    found = everything()
    dense = [found[f"dense/{seed}"]["accuracy"] for seed in SEEDS]
    rows = []
    for scheme in SCHEMES:
        runs = [found[f"{scheme.name}/{seed}"] for seed in SEEDS]
        accuracies = [run["accuracy"] for run in runs]
        rows.append([
            scheme.name,
            f"{statistics.mean(accuracies):.2f}",
            f"{min(accuracies):.2f} to {max(accuracies):.2f}",
            f"{statistics.mean(accuracies) - statistics.mean(dense):+.2f}",
            f"{runs[0]['bytes']:,}",
            f"{found['dense/0']['bytes'] / runs[0]['bytes']:.0f}",
            f"{found['dense/0']['matrices'] / runs[0]['matrices']:.0f}" if "matrices" in runs[0] else "",
            f"{max(run['lost'] for run in runs):.0e}" if "lost" in runs[0] else "",
        ])  # fmt: skip
    write_result(
        "exchange/deep_gradient_compression",
        title=f"MNIST with {PROCESSES} workers, {KEEP:.1%} of the entries of every matrix sent in a step",
        columns=["gradients", "test accuracy, %", "of the seeds", "difference from dense", "bytes a step and worker",
                 "x fewer", "x fewer, matrices alone", "lost by the exchange"],
        rows=rows,
        notes=[
            f"MLP 784-128-128-10, {PROCESSES} workers with {BATCH} images each, in threads of one process, SGD with "
            f"momentum {MOMENTUM}, {EPOCHS} epochs, {len(SEEDS)} seeds. The rate {found['rate']:g} is the best of "
            f"{', '.join(map(str, RATES))} for dense on {HELD_OUT:,} training images held out, and is everybody's. "
            "Warm-up: one epoch in four stages of 25, 6.25, 1.5625 and 0.4 %. Bytes: of the last step, biases and "
            "packet headers included; matrices alone: by formula, biases left out. Lost: what left u and v of all "
            "workers in a step, less what arrived in the gradient, as a share of it; the largest of all matrices.",
        ],
    )  # fmt: skip


def everything() -> dict[str, Any]:
    """All runs, one after the other."""
    rate = max(RATES, key=lambda lr: run(SCHEMES[0], 0, lr, tune=True)["accuracy"])
    found: dict[str, Any] = {"rate": rate}
    for scheme in SCHEMES:
        for seed in SEEDS:
            found[f"{scheme.name}/{seed}"] = run(scheme, seed, rate)
    return found


def run(scheme: Scheme, seed: int, lr: float, tune: bool = False) -> dict[str, float]:
    """Train, and test on the test images; to tune, on some training images that were not trained on."""
    (images, labels), (test_images, test_labels) = mnist("train"), mnist("t10k")
    if tune:
        test_images, test_labels = images[-HELD_OUT:], labels[-HELD_OUT:]
        images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    steps = len(images) // (PROCESSES * BATCH)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = SGD(net.parameters(), lr=lr, momentum=scheme.momentum)
    workers = Workers(net, [scheme.exchange(steps) for _ in range(PROCESSES)] if scheme.exchange else [])
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(100 * seed + epoch))
        for batch in order[: steps * PROCESSES * BATCH].view(steps, -1):
            optimizer.zero_grad()
            workers.backward(images[batch], labels[batch])
            optimizer.step()
    with torch.no_grad():
        accuracy = (net(test_images).argmax(1) == test_labels).float().mean().item()
    params = list(net.parameters())
    matrices = [p for p in params if p.dim() > 1]
    found = {"accuracy": 100 * accuracy}
    if not workers.exchanges:
        return {**found, "bytes": Dense().predicted_bytes(params, PROCESSES),
                "matrices": Dense().predicted_bytes(matrices, PROCESSES)}  # fmt: skip
    exchange = workers.exchanges[0]
    found["bytes"] = exchange.bytes_sent_per_step(net, PROCESSES)
    if isinstance(exchange, Watched):
        found["matrices"] = exchange.predicted_bytes(matrices, PROCESSES)
        for each in workers.exchanges:
            each.watching = True
        workers.backward(images[batch], labels[batch])
        found["lost"] = exchange.lost
    return found


class Workers:
    """PROCESSES workers in threads of this process: their exchanges are the real ones, on a channel between threads.

    They share the weights, which every exchange gives the same gradient. Without exchanges there is one worker, and it
    takes the whole batch, as dense averaging does.
    """

    def __init__(self, net: nn.Module, exchanges: list[Any]) -> None:
        self.exchanges = exchanges
        self.nets = [net, *(copy.deepcopy(net) for _ in exchanges[1:])]
        for other in self.nets[1:]:
            for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
                theirs.data = mine.data
        meeting: list[Any] = [None] * len(exchanges)
        barrier = threading.Barrier(max(1, len(exchanges)))
        for rank, exchange in enumerate(exchanges):
            exchange.attach(self.nets[rank])
            exchange.channel = Joined(rank, meeting, barrier)
        self.threads = ThreadPoolExecutor(max(1, len(exchanges)))

    def backward(self, images: Tensor, labels: Tensor) -> None:
        """Leave the exchanged gradient in the first net."""
        for net, x, y in zip(self.nets, images.chunk(len(self.nets)), labels.chunk(len(self.nets)), strict=True):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        list(self.threads.map(lambda exchange: exchange.finish_gradients(), self.exchanges))


class Joined(Echo):
    """A channel between threads of one process."""

    def __init__(self, rank: int, meeting: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(len(meeting))
        self.rank, self._meeting, self._barrier = rank, meeting, barrier

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        return torch.stack(self._swapped(tensor))

    def all_gather_packets(self, packet: Tensor) -> list[Tensor]:
        found = self._swapped(packet)
        self.sent += (self.size - 1) * (8 + max(each.numel() for each in found))
        return found

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        self.sent += ring_bytes(tensor.numel(), tensor.element_size(), self.size)
        return tensor.copy_(torch.stack(self._swapped(tensor.clone())).sum(0))

    def _swapped(self, tensor: Tensor) -> list[Tensor]:
        self._meeting[self.rank] = tensor
        self._barrier.wait(60)
        found = list(self._meeting)
        self._barrier.wait(60)
        return found


@functools.cache
def mnist(part: str) -> tuple[Tensor, Tensor]:
    """Images as [n, 784] of mean 0 and variance 1, and their labels."""
    images = torch.from_numpy(read_idx(DATA / f"{part}-images-idx3-ubyte.gz").copy()).flatten(1).float()
    labels = torch.from_numpy(read_idx(DATA / f"{part}-labels-idx1-ubyte.gz").copy()).long()
    return (images / 255 - 0.1307) / 0.3081, labels


if __name__ == "__main__":
    main()
