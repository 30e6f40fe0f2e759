"""What entropy-coded averaging sends, and what that costs in accuracy.

    python -m benchmarks.exchange.entropy_coded

Four processes of this machine, joined by gloo, train an MLP on 10,000 images of Fashion-MNIST and a small LLaMA on
characters, each with its own quarter of the data, and meet every few steps. Bits are those of the packets that were
sent, headers and tables included; beside them stand the entropies of what is in them. Data is looked for in the folder
LEANTRAIN_DATA, by default ../shared/data.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.exchange.projected import PROCESSES, in_processes
from benchmarks.result import write_result
from leantrain.data.idx import read_idx
from leantrain.exchange.averaging import Averaging
from leantrain.exchange.codecs.entropy import Entropy
from leantrain.exchange.entropy_coded import EntropyCoded
from leantrain.histogram import integer_entropy
from leantrain.nn import Llama

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("LEANTRAIN_DATA", ROOT.parent / "shared" / "data"))
SEEDS = (0, 1)
IMAGES, EPOCHS, BATCH = 10_000, 8, 50
LM_STEPS, LM_BATCH, LM_CONTEXT = 300, 8, 64


@dataclass(frozen=True)
class Scheme:
    """How what is learned between two meetings travels."""

    name: str
    every: int = 5
    coded: dict[str, Any] | None = None
    """Settings of EntropyCoded; None: float32."""

    def exchange(self) -> Averaging:
        return Averaging(self.every) if self.coded is None else Measured(self.every, **self.coded)


def coded(name: str, every: int = 5, **settings: Any) -> Scheme:
    return Scheme(name, every, settings)


SCHEMES = [
    Scheme("float32"),
    *(coded(f"rel, c = {c}", mode="rel", step=c) for c in (0.5, 1, 2, 3)),
    *(coded(f"rel, c = {c}, no residual", mode="rel", step=c, residual=False) for c in (2, 3)),
    *(coded(f"abs, s = 1/{s}", mode="abs", step=1 / s) for s in (64, 16, 8, 4)),
    *(coded(f"abs, s = 1/{s}, no residual", mode="abs", step=1 / s, residual=False) for s in (16, 4)),
    Scheme("float32, every 10 steps", 10),
    coded("weights on 32 values, every 10 steps", 10, send="weights", bits=5),
]
LM_SCHEMES = [Scheme("float32"), coded("rel, c = 1", mode="rel")]


class Measured(EntropyCoded):
    """Can also say the entropy of what it sent."""

    told: Sequence[tuple[str, Tensor]] = ()

    def encode_all(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
        self.told = list(zip(names, tensors, strict=True))
        return super().encode_all(names, tensors)

    def ideal(self) -> float:
        """Bits a weight: the entropy of each tensor's whole numbers, and 64 bits for its grid."""
        codec, bits = self.codec, 0.0
        assert isinstance(codec, Entropy)
        for name, tensor in self.told:
            integers = codec.quantised(tensor, self.deviations[name]).integers
            bits += integers.numel() * integer_entropy(integers) + 64
        return bits / sum(tensor.numel() for _, tensor in self.told)


def main() -> None:
    found = in_processes(trained)
    rows = [row(found, "mlp", scheme) for scheme in SCHEMES] + [row(found, "llama", scheme) for scheme in LM_SCHEMES]
    write_result(
        "exchange/entropy_coded",
        title=f"Averaging between {PROCESSES} processes, entropy-coded",
        columns=["trained: what is sent", "test accuracy / validation loss", "difference from float32",
                 "bits a weight, sent", "entropy, bits", "bits, first → last quarter of meetings", "x fewer bytes",
                 "ms a meeting, loopback"],
        rows=rows,
        notes=[
            f"Means of {len(SEEDS)} seeds. MLP 784-256-256-10, {IMAGES:,} images of Fashion-MNIST, a quarter in each "
            f"process, batch {BATCH}, SGD 0.05 with momentum 0.9, cosine to 0, {EPOCHS} epochs. LLaMA of "
            f"{found['llama/parameters'] / 1e6:.2f} M parameters on the first 1 MB of tiny Shakespeare, character by "
            f"character, AdamW 3e-3, cosine, {LM_STEPS} steps of {PROCESSES} x {LM_BATCH} x {LM_CONTEXT} tokens. A "
            "meeting every 5 steps where nothing else is said, in real processes over gloo.",
            "Bits a weight: of the packets, with headers, tables and checksums. Entropy: of the whole numbers in them, "
            "tensor by tensor and each by itself, and 64 bits a tensor for the grid; codes of several numbers at once "
            "see that small changes have small neighbours, and can stay below it. Milliseconds: encoding, sending and "
            "decoding all four, the median, on a machine with fewer cores than processes: on loopback coding does not "
            "pay.",
        ],
    )  # fmt: skip


def row(found: dict[str, Any], task: str, scheme: Scheme) -> list[str]:
    """A scheme's line of the table: means over the seeds."""
    base = next(each for each in SCHEMES if each.coded is None and each.every == scheme.every)
    runs, bases = ([found[f"{task}/{each.name}/{seed}"] for seed in SEEDS] for each in (scheme, base))
    score = statistics.mean(run["score"] for run in runs)
    difference = score - statistics.mean(run["score"] for run in bases)
    rounds = [statistics.mean(each) for each in zip(*(run["bits"] for run in runs), strict=True)]
    quarter, bits = len(rounds) // 4, statistics.mean(rounds)
    digits = 2 if task == "mlp" else 4
    return [
        f"{'MLP' if task == 'mlp' else 'LLaMA'}: {scheme.name}",
        f"{score:.{digits}f}" + (" %" if task == "mlp" else ""),
        f"{difference:+.{digits}f}" if scheme.coded else "",
        f"{bits:.2f}",
        f"{statistics.mean(run['ideal'] for run in runs):.2f}" if scheme.coded else "",
        f"{statistics.mean(rounds[:quarter]):.2f} → {statistics.mean(rounds[-quarter:]):.2f}",
        f"{32 / bits:.1f}",
        f"{1e3 * statistics.mean(run['seconds'] for run in runs):.0f}",
    ]


def trained(rank: int) -> dict[str, Any]:
    """Every scheme and seed: what came out, and the bits of every meeting."""
    found: dict[str, Any] = {}
    images = fashion_mnist()
    text = characters()
    for seed in SEEDS:
        for scheme in SCHEMES:
            model = mlp(seed)
            found[f"mlp/{scheme.name}/{seed}"] = run = train_mlp(model, scheme.exchange(), images, rank, seed)
            if rank == 0:
                print(f"seed {seed}, {scheme.name}: {run['score']:.2f} %", file=sys.stderr)
        for scheme in LM_SCHEMES:
            lm = llama(seed)
            found[f"llama/{scheme.name}/{seed}"] = run = train_llama(lm, scheme.exchange(), text, rank, seed)
            if rank == 0:
                print(f"seed {seed}, LLaMA, {scheme.name}: {run['score']:.4f}", file=sys.stderr)
    found["llama/parameters"] = sum(param.numel() for param in lm.parameters())
    return found


def train_mlp(model: nn.Module, exchange: Averaging, images: list[Tensor], rank: int, seed: int) -> dict[str, Any]:
    inputs, labels, test_inputs, test_labels = images
    own = torch.arange(rank, IMAGES, PROCESSES)
    per_epoch = len(own) // BATCH
    order = torch.Generator().manual_seed(1000 * seed + rank)

    def loss(step: int) -> Tensor:
        nonlocal own
        if step % per_epoch == 0:
            own = own[torch.randperm(len(own), generator=order)]
        batch = own[step % per_epoch * BATCH :][:BATCH]
        return nn.functional.cross_entropy(model(inputs[batch]), labels[batch])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = train(model, exchange, optimizer, EPOCHS * per_epoch, loss)
    with torch.no_grad():
        right = (model(test_inputs).argmax(1) == test_labels).float().mean().item()
    return {**found, "score": 100 * right}


def train_llama(model: nn.Module, exchange: Averaging, text: list[Tensor], rank: int, seed: int) -> dict[str, Any]:
    mine = text[0].chunk(PROCESSES)[rank]
    places = torch.Generator().manual_seed(1000 * seed + rank)

    def loss_of(windows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def loss(step: int) -> Tensor:
        start = torch.randint(len(mine) - LM_CONTEXT, (LM_BATCH, 1), generator=places)
        return loss_of(mine[start + torch.arange(LM_CONTEXT + 1)])

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = train(model, exchange, optimizer, LM_STEPS, loss)
    held_out = text[1][: 200 * (LM_CONTEXT + 1)].view(200, -1)
    with torch.no_grad():
        return {**found, "score": loss_of(held_out).item()}


def train(
    model: nn.Module, exchange: Averaging, optimizer: torch.optim.Optimizer, steps: int, loss: Callable[[int], Tensor]
) -> dict[str, Any]:
    exchange.attach(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    bits, ideals, seconds = [], [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
        meets = step == steps - 1 or (step + 1) % exchange.every == 0
        if meets:
            exchange.channel.all_reduce(torch.zeros(1))  # wait for all, so that the meeting alone is timed
        began = time.perf_counter()
        exchange.after_step(last=step == steps - 1)
        if meets:
            seconds.append(time.perf_counter() - began)
            bits.append(Averaging.metrics(exchange)["bits_per_weight"])  # the entropy of all weights is not asked for
            ideals.append(exchange.ideal() if isinstance(exchange, Measured) else 0.0)
    return {"bits": bits, "ideal": statistics.mean(ideals), "seconds": statistics.median(seconds)}


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def llama(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Llama(vocab_size=128, context=LM_CONTEXT, preset="tiny")


def fashion_mnist() -> list[Tensor]:
    """Inputs and labels: a random 10,000 of the training images, and all test images."""
    folder = DATA / "fashion-mnist"
    chosen = np.random.default_rng(0).permutation(60_000)[:IMAGES]
    parts: list[Tensor] = []
    for part, rows in (("train", chosen), ("t10k", np.arange(10_000))):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")[rows]
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")[rows]
        parts += [(torch.tensor(images).float().flatten(1) / 255 - 0.286) / 0.353, torch.tensor(labels).long()]
    return parts


def characters() -> list[Tensor]:
    """1 MB of text to learn from, and what follows it; one number below 128 a character."""
    data = (DATA / "tinyshakespeare" / "input.txt").read_bytes()
    text = torch.tensor(list(data)).clamp_max(127)
    return [text[:1_000_000], text[1_000_000:]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
